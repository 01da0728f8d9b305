"""Which layers quantization hurts: quantize one kind of layer at a time and compare the images.

    python examples/sensitivity.py [MODEL] [BITS] [PROMPTS]

Prints, for each kind, the relative error of the final latents, and that error squared per million parameters. The
importances in convert/choose.py come from it.
"""

import sys
import tempfile
from math import prod
from pathlib import Path

import numpy as np
from quality import PROMPTS

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.quantization import Quantization
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.quantize import QUANTIZED

KINDS = {kind: ("transformer", f".{kind}.") for kind in ("to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3")}
KINDS["text encoder"] = "text_encoder", ""


def latents(model: str | Path, prompts: list[str]) -> np.ndarray:
    pipe = ZImagePipeline.from_pretrained(model, dtype="float32")
    generated = []
    for seed, prompt in enumerate(prompts):
        *_, last = pipe.denoise(GenerateRequest(prompt=prompt, width=64, height=64, seed=seed, steps=4))
        generated.append(np.array(last.latents))
    return np.stack(generated)


def main(model: str = "pocket", bits: int = 3, prompts: int = 6) -> None:
    shapes = {part.name: part.config.shapes() for part in open_checkpoint(model).components}
    exact = latents(model, PROMPTS[:prompts])
    for kind, (network, part) in KINDS.items():

        def recipe(component, name, shape, network=network, part=part):
            chosen = component == network and part in name and QUANTIZED[network].fullmatch(name)
            return Quantization(bits) if chosen else None

        with tempfile.TemporaryDirectory() as folder:
            packed = convert(model, Path(folder) / "packed", recipe=recipe)
            difference = latents(packed, PROMPTS[:prompts]) - exact
        error = np.sqrt(np.square(difference).mean() / np.square(exact).mean())
        millions = sum(prod(s) for name, s in shapes[network].items() if recipe(network, name, s)) / 1e6
        print(f"{kind:12}  error {error:.4f}  squared per million parameters {error**2 / millions:.5f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
