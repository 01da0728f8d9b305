"""Score a checkpoint on new held-out prompts: python examples/pocket/evaluate.py CHECKPOINT

Anything that generates images can be scored: `images_of` takes a function (prompts, width, height, seeds)
-> images, (height, width, 3) uint8 each. This file has one for diffusers and one for mlx_zimage.
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

Generate = Callable[[list[str], int, int, list[int]], list[np.ndarray]]


def images_of(generate: Generate, scenes: list[Scene], seed: int = 0, batch: int = 10) -> list[np.ndarray]:
    """One image per scene; the i-th is generated from seed + i, whatever the batches."""
    images: list = [None] * len(scenes)
    sizes = sorted({(scene.width, scene.height) for scene in scenes})
    for width, height in sizes:
        chosen = [i for i, scene in enumerate(scenes) if (scene.width, scene.height) == (width, height)]
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            generated = generate([scenes[i].caption for i in part], width, height, [seed + i for i in part])
            for i, image in zip(part, generated, strict=True):
                images[i] = image
    return images


def generate_with_diffusers(
    folder: Path, dtype: str = "float32", steps: int = 8, device: str = "cpu", lora: Path | None = None
) -> Generate:
    """An unmodified ZImagePipeline, without guidance; its own loader reads a LoRA."""
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)

    def generate(prompts, width, height, seeds):
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

    return generate


def generate_with_mlx(folder: Path, dtype: str = "float32", steps: int = 8) -> Generate:
    from mlx_zimage import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype)

    def generate(prompts, width, height, seeds):
        generated = (
            pipe(prompt, width=width, height=height, num_inference_steps=steps, seed=seed, output_type="np")
            for prompt, seed in zip(prompts, seeds, strict=True)
        )
        return [as_bytes(one.images[0]) for one in generated]

    return generate


def as_bytes(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def reconstructions_of(folder: Path, scenes: list[Scene]) -> list[np.ndarray]:
    """Perfect images, through the checkpoint's autoencoder and back."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    images = []
    with torch.no_grad():
        for image in ground_truth(scenes):
            x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
            y = vae.decode(vae.encode(x).latent_dist.mean).sample[0].permute(1, 2, 0).numpy()
            images.append(as_bytes(y / 2 + 0.5))
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-n", "--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2027, help="seed of the prompts and of the first image")
    parser.add_argument(
        "--with",
        dest="what",
        default="diffusers",
        choices=("diffusers", "mlx", "reconstructions", "ground-truth"),
        help="what makes the images",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="PyTorch device, for diffusers")
    parser.add_argument("--size", help="WxH: only that size; all training sizes by default")
    parser.add_argument("--verdicts", type=Path, help="write every prompt's verdict here, as JSON")
    options = parser.parse_args()
    canvas = tuple(int(side) for side in options.size.split("x")) if options.size else None
    scenes = held_out_scenes(options.count, options.seed, canvas)
    if options.what == "ground-truth":
        images = ground_truth(scenes)
    elif options.what == "reconstructions":
        images = reconstructions_of(options.checkpoint, scenes)
    elif options.what == "mlx":
        generate = generate_with_mlx(options.checkpoint, options.dtype, options.steps)
        images = images_of(generate, scenes, options.seed)
    else:
        generate = generate_with_diffusers(options.checkpoint, options.dtype, options.steps, options.device)
        images = images_of(generate, scenes, options.seed)
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
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
