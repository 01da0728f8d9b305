"""What users of other programs type: several values after one --seed, and flags that have another name here."""

from __future__ import annotations

from itertools import pairwise

import click

BY_BITS = "the model is converted once, as in `mlx-zimage convert Tongyi-MAI/Z-Image-Turbo DEST --q-bits 4`"
BY_MEMORY = "--memory 6GB keeps to a budget, and chooses what to read as needed and how to decode"
NO_LORA = "LoRAs are not applied; a checkpoint that has one merged into it can be converted"
FROM_TEXT = "pictures are drawn from a prompt only"
ELSEWHERE = {  # flags of mflux and others, and what to use here
    "--quantize": BY_BITS,
    "--mlx-cache-limit-gb": BY_MEMORY,
    "--vae-tiling": BY_MEMORY,
    "--vae-tile-size": BY_MEMORY,
    "--float32": "--dtype float32 computes in it",
    "--compute-precision": "--dtype chooses bfloat16, float16 or float32",
    "--image-count": "--count N draws N pictures",
    "--num-images": "--count N draws N pictures",
    "--batch-size": "--count N draws N pictures, one after the other",
    "--num-inference-steps": "--steps says how often the transformer is called",
    "--guidance-scale": "--guidance is its name here",
    "--cfg": "--guidance is its name here, and counts from 0",
    "--make-conf": "every picture carries its request, and `generate --from PICTURE` draws it again",
    "--base-model": "--model takes a folder or an id, whose configs tell what it is",
    "--scheduler": "--shift bends the schedule, and examples/custom_schedule.py draws by one of one's own",
    "--lora": NO_LORA,
    "--lora-paths": NO_LORA,
    "--lora-scales": NO_LORA,
    "--image": FROM_TEXT,
    "--image-path": FROM_TEXT,
    "--image-strength": FROM_TEXT,
}


class ForgivingCommand(click.Command):
    """Takes them, or says what to type instead."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any(word == "-q" and bits in ("3", "4", "5", "6", "8") for word, bits in pairwise(args)):
            raise click.UsageError(f"-q is --quiet and takes no number: {BY_BITS}", ctx)
        try:
            return super().parse_args(ctx, join_seeds(args))
        except click.NoSuchOption as error:
            if error.option_name in ELSEWHERE:
                raise click.UsageError(
                    f"There is no {error.option_name}: {ELSEWHERE[error.option_name]}", ctx
                ) from None
            raise


def join_seeds(args: list[str]) -> list[str]:
    """--seed 1 2 3 as --seed 1,2,3."""
    joined: list[str] = []
    for i, word in enumerate(args):
        if word == "--":
            return joined + args[i:]
        if word.isdecimal() and joined[-2:-1] == ["--seed"]:
            joined[-1] += f",{word}"
        else:
            joined.append(word)
    return joined
