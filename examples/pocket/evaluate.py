"""Scores a checkpoint on fresh held-out prompts: python examples/pocket/evaluate.py CHECKPOINT

Anything that draws can be scored: `pictures_of` takes a function (prompts, width, height, seeds)
-> pictures, (height, width, 3) uint8 each. This file has one for diffusers and one for mlx_zimage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from judge import as_markdown, judge, scores
from render import ground_truth
from scenes import Scene, held_out_scenes

Draw = Callable[[list[str], int, int, list[int]], list[np.ndarray]]


def pictures_of(draw: Draw, scenes: list[Scene], seed: int = 0, batch: int = 10) -> list[np.ndarray]:
    """One picture a scene; the i-th is drawn from seed + i, whatever the batches."""
    pictures: list = [None] * len(scenes)
    sizes = sorted({(scene.width, scene.height) for scene in scenes})
    for width, height in sizes:
        chosen = [i for i, scene in enumerate(scenes) if (scene.width, scene.height) == (width, height)]
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            drawn = draw([scenes[i].caption for i in part], width, height, [seed + i for i in part])
            for i, picture in zip(part, drawn, strict=True):
                pictures[i] = picture
    return pictures


def draw_with_diffusers(folder: Path, dtype: str = "float32", steps: int = 8, device: str = "cpu") -> Draw:
    """An unmodified ZImagePipeline, without guidance."""
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompts, width, height, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(
            prompt=prompts,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=generators,
        ).images
        return [np.asarray(image) for image in images]

    return draw


def draw_with_mlx(folder: Path, dtype: str = "float32", steps: int = 8) -> Draw:
    from mlx_zimage import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype)

    def draw(prompts, width, height, seeds):
        drawn = (
            pipe(prompt, width, height, steps, seed=seed, output_type="np")
            for prompt, seed in zip(prompts, seeds, strict=True)
        )
        return [as_bytes(one.images[0]) for one in drawn]

    return draw


def as_bytes(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def draw_reconstructions(folder: Path, scenes: list[Scene]) -> list[np.ndarray]:
    """The perfect pictures, through the checkpoint's autoencoder and back."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    pictures = []
    with torch.no_grad():
        for picture in ground_truth(scenes):
            x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            y = vae.decode(vae.encode(x).latent_dist.mean).sample[0].permute(1, 2, 0).numpy()
            pictures.append(as_bytes(y / 2 + 0.5))
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-n", "--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2027, help="of the prompts, and of the first picture")
    parser.add_argument(
        "--with",
        dest="what",
        default="diffusers",
        choices=("diffusers", "mlx", "reconstructions", "ground-truth"),
        help="what draws",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="for diffusers")
    parser.add_argument("--size", help="WxH: only that size; all training sizes by default")
    parser.add_argument("--verdicts", type=Path, help="write every prompt's verdict here, as JSON")
    options = parser.parse_args()
    canvas = tuple(int(side) for side in options.size.split("x")) if options.size else None
    scenes = held_out_scenes(options.count, options.seed, canvas)
    if options.what == "ground-truth":
        pictures = ground_truth(scenes)
    elif options.what == "reconstructions":
        pictures = draw_reconstructions(options.checkpoint, scenes)
    elif options.what == "mlx":
        draw = draw_with_mlx(options.checkpoint, options.dtype, options.steps)
        pictures = pictures_of(draw, scenes, options.seed)
    else:
        draw = draw_with_diffusers(options.checkpoint, options.dtype, options.steps, options.device)
        pictures = pictures_of(draw, scenes, options.seed)
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    print(as_markdown(scores(scenes, verdicts)))
    if options.verdicts:
        rows = [
            {
                "caption": scene.caption,
                "kind": scene.kind,
                "width": scene.width,
                "height": scene.height,
                "right": verdict.is_right,
                **vars(verdict),
            }
            for scene, verdict in zip(scenes, verdicts, strict=True)
        ]
        options.verdicts.write_text(json.dumps(rows, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
