"""The table of scores by precision, drawn by mlx_zimage: python examples/pocket/scores.py CHECKPOINT

Every row draws the same fresh held-out prompts from the same seeds, so that rows can be compared
prompt by prompt: "lost" and "won" count the prompts that became wrong and right against the first
row. Quantized weights are multiplied in the type that --dtype names; with --keep, an interrupted
run goes on where it was, and a longer one draws only what is new.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from data import Scene, held_out_scenes
from evaluate import draw_with_mlx, pictures_of
from judge import Verdict, judge, scores

CHUNK = 25  # pictures between two savings


@dataclass(frozen=True)
class Recipe:
    name: str
    dtype: str | None = None  # what is computed in, where that is the point
    quantization: dict | None = None  # arguments of mlx_zimage.convert


RECIPES = (
    Recipe("float32", dtype="float32"),
    Recipe("bfloat16", dtype="bfloat16"),
    *(Recipe(f"{bits} bits", quantization={"bits": bits, "group_size": 64}) for bits in (8, 6, 5, 4)),
    Recipe("mxfp4", quantization={"mode": "mxfp4"}),
    Recipe("nvfp4", quantization={"mode": "nvfp4"}),
)


def judge_recipe(recipe: Recipe, checkpoint: Path, scenes: list[Scene], seed: int, dtype: str, kept: Path | None):
    """One verdict a scene; those that the file `kept` already has are not drawn again."""
    verdicts = [Verdict(**one) for one in json.loads(kept.read_text())] if kept and kept.exists() else []
    if len(verdicts) >= len(scenes):
        return verdicts[: len(scenes)]
    with tempfile.TemporaryDirectory() as folder:
        if recipe.quantization:
            from mlx_zimage.convert import convert

            checkpoint = convert(checkpoint, Path(folder) / "converted", **recipe.quantization)
        draw = draw_with_mlx(checkpoint, recipe.dtype or dtype)
        while len(verdicts) < len(scenes):
            start = len(verdicts)
            part = scenes[start : start + CHUNK]
            pictures = pictures_of(draw, part, seed + start)
            verdicts += [judge(picture, scene) for picture, scene in zip(pictures, part, strict=True)]
            if kept:
                kept.write_text(json.dumps([asdict(verdict) for verdict in verdicts]))
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-n", "--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2027, help="of the prompts, and of the first picture")
    parser.add_argument("--dtype", default="float32", help="what quantized weights are multiplied in")
    parser.add_argument("--only", nargs="*", help="names of rows; all by default")
    parser.add_argument("--keep", type=Path, help="a folder for the verdicts")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(options.count, options.seed)
    print("| weights | everything right % | en | zh | shapes | lost | won |\n|---|---|---|---|---|---|---|")
    baseline = None
    for recipe in RECIPES:
        if options.only and recipe.name not in options.only:
            continue
        kept = options.keep / f"{recipe.name.replace(' ', '-')}-{options.seed}.json" if options.keep else None
        verdicts = judge_recipe(recipe, options.checkpoint, scenes, options.seed, options.dtype, kept)
        table = {score.group: score for score in scores(scenes, verdicts)}
        right = [verdict.is_right for verdict in verdicts]
        baseline = baseline or right
        lost = sum(before and not after for before, after in zip(baseline, right, strict=True))
        won = sum(after and not before for before, after in zip(baseline, right, strict=True))
        row = table["all"]
        print(
            f"| {recipe.name} | {row.right:.1f} ± {row.error:.1f} | {table['en'].right:.1f} | "
            f"{table['zh'].right:.1f} | {row.checks['shapes']:.1f} | {lost} | {won} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
