"""Write a checkpoint of Z-Image-Turbo's full size and official layout with random weights (33 GB).

    python examples/full_size.py FOLDER

For trying memory, speed and conversion without the real weights: it draws noise, but every name, shape and dtype is
as published (the shards are smaller). The tokenizer is the pocket model's. One shard is held at a time.
"""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx

from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.models.vae import VAEConfig
from mlx_zimage.weights import POCKET

SHARD_BYTES = 2 * 10**9  # the published shards are 10 GB, which few machines could hold here
COMPONENTS = {  # component -> (architecture, dtype as published, name of the files)
    "transformer": (TransformerConfig(), mx.float32, "diffusion_pytorch_model"),
    "text_encoder": (TextEncoderConfig(), mx.bfloat16, "model"),
    "vae": (VAEConfig(), mx.bfloat16, "diffusion_pytorch_model"),
}
CONFIGS = {  # where the architecture's own fields do not say all
    "transformer": {"all_patch_size": [2], "all_f_patch_size": [1], "n_kv_heads": 30, "qk_norm": True},
    "text_encoder": {"model_type": "qwen3", "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    "vae": {"in_channels": 3, "out_channels": 3, "force_upcast": True, "use_quant_conv": False},
}


def random_weight(name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A weight that keeps activations near unit size: norms near one, matrices scaled by their input width."""
    if len(shape) == 1:
        return (mx.ones(shape) if name.endswith("weight") else mx.zeros(shape)).astype(dtype)
    fan_in = (
        1 if name.endswith(("pad_token", "embed_tokens.weight")) else shape[1] * (shape[2] ** 2 if shape[2:] else 1)
    )
    return (mx.random.normal(shape, dtype=mx.float32) * fan_in**-0.5).astype(dtype)


def write_component(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: mx.Dtype, stem: str) -> None:
    """Write shards of at most SHARD_BYTES and their index."""
    folder.mkdir(parents=True)
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = mx.zeros(()).astype(dtype).nbytes
        for side in shape:
            nbytes *= side
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: random_weight(name, shapes[name], dtype) for name in names}
        mx.save_safetensors(str(folder / file), weights, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(folder / file, flush=True)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main(folder: Path) -> None:
    shutil.copytree(POCKET / "tokenizer", folder / "tokenizer")
    shutil.copytree(POCKET / "scheduler", folder / "scheduler")
    shutil.copy(POCKET / "model_index.json", folder)
    for name, (config, dtype, stem) in COMPONENTS.items():
        write_component(folder / name, config.shapes(), dtype, stem)
        values = vars(config) | CONFIGS[name]
        (folder / name / "config.json").write_text(json.dumps(values, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
