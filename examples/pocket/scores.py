"""The table of scores by precision, drawn by mlx_zimage: python examples/pocket/scores.py CHECKPOINT

Every row draws the same fresh held-out prompts from the same seeds, so that rows can be compared
prompt by prompt: "lost" and "won" count the prompts that became wrong and right against float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from data import held_out_scenes
from evaluate import draw_with_mlx, pictures_of
from judge import judge, scores


@dataclass(frozen=True)
class Recipe:
    name: str
    dtype: str = "float32"  # what is computed in
    quantization: dict | None = None  # bits, group_size, mode of mlx_zimage.convert


RECIPES = (
    Recipe("float32"),
    Recipe("bfloat16", dtype="bfloat16"),
    *(Recipe(f"{bits} bits", "bfloat16", {"bits": bits, "group_size": 64, "mode": "affine"}) for bits in (8, 6, 5, 4)),
    Recipe("mxfp4", "bfloat16", {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    Recipe("nvfp4", "bfloat16", {"bits": 4, "group_size": 16, "mode": "nvfp4"}),
)


def judge_recipe(recipe: Recipe, checkpoint: Path, scenes: list, seed: int) -> list:
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint
        if recipe.quantization:
            from mlx_zimage.convert import convert

            source = Path(folder) / "converted"
            convert(checkpoint, source, **recipe.quantization)
        pictures = pictures_of(draw_with_mlx(source, recipe.dtype), scenes, seed)
    return [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-n", "--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2027)
    parser.add_argument("--only", nargs="*", help="names of rows; all by default")
    options = parser.parse_args()
    scenes = held_out_scenes(options.count, options.seed)
    print("| weights | everything right % | en | zh | lost | won | s a picture |\n|---|---|---|---|---|---|---|")
    baseline = None
    for recipe in RECIPES:
        if options.only and recipe.name not in options.only:
            continue
        started = time.perf_counter()
        verdicts = judge_recipe(recipe, options.checkpoint, scenes, options.seed)
        seconds = (time.perf_counter() - started) / len(scenes)
        table = {score.group: score for score in scores(scenes, verdicts)}
        right = [verdict.is_right for verdict in verdicts]
        baseline = baseline or right
        lost = sum(before and not after for before, after in zip(baseline, right, strict=True))
        won = sum(after and not before for before, after in zip(baseline, right, strict=True))
        row = table["all"]
        print(
            f"| {recipe.name} | {row.right:.1f} ± {row.error:.1f} | {table['en'].right:.1f} | "
            f"{table['zh'].right:.1f} | {lost} | {won} | {seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
