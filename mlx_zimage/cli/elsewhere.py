"""Habits from other programs: several values after one --seed, and flags that have a different name here."""

from __future__ import annotations

from itertools import pairwise

import click

BY_BITS = "convert the model once, with `mlx-zimage convert Tongyi-MAI/Z-Image-Turbo DEST --q-bits 4`"
BY_MEMORY = "use --memory 6GB, which determines what is streamed from disk and how images are decoded"
NO_LORA = "LoRAs are not supported; convert a checkpoint that has the LoRA merged into it"
FROM_TEXT = "images are generated from a prompt only"
ELSEWHERE = {  # flags of mflux and other programs, and what to use instead
    "--quantize": BY_BITS,
    "--mlx-cache-limit-gb": BY_MEMORY,
    "--vae-tiling": BY_MEMORY,
    "--vae-tile-size": BY_MEMORY,
    "--float32": "use --dtype float32",
    "--compute-precision": "use --dtype bfloat16, float16 or float32",
    "--image-count": "use --count N to generate N images",
    "--num-images": "use --count N to generate N images",
    "--batch-size": "use --count N to generate N images, one after another",
    "--num-inference-steps": "use --steps",
    "--guidance-scale": "use --guidance",
    "--cfg": "use --guidance, where 0 is off",
    "--make-conf": "every image stores its request; `generate --from IMAGE` generates it again",
    "--base-model": "leave it out; --model takes a folder or an id, and its configs identify the model",
    "--scheduler": "use --shift; examples/custom_schedule.py shows a custom schedule",
    "--lora": NO_LORA,
    "--lora-paths": NO_LORA,
    "--lora-scales": NO_LORA,
    "--image": FROM_TEXT,
    "--image-path": FROM_TEXT,
    "--image-strength": FROM_TEXT,
}


class ForgivingCommand(click.Command):
    """Accepts several seeds, and answers an unsupported flag with what to use instead."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any(word == "-q" and bits in ("3", "4", "5", "6", "8") for word, bits in pairwise(args)):
            raise click.UsageError(f"-q is --quiet and takes no number; {BY_BITS}", ctx)
        try:
            return super().parse_args(ctx, join_seeds(args))
        except click.NoSuchOption as error:
            if error.option_name in ELSEWHERE:
                raise click.UsageError(
                    f"No such option: {error.option_name}; {ELSEWHERE[error.option_name]}", ctx
                ) from None
            raise


def join_seeds(args: list[str]) -> list[str]:
    """Turn --seed 1 2 3 into --seed 1,2,3."""
    joined: list[str] = []
    for i, word in enumerate(args):
        if word == "--":
            return joined + args[i:]
        if word.isdecimal() and joined[-2:-1] == ["--seed"]:
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined
