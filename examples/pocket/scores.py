"""The table of scores by precision, with mlx_zimage: python examples/pocket/scores.py CHECKPOINT --keep DIR

Every row uses the same new held-out prompts and the same seeds, so that rows can be compared prompt
by prompt: "lost" and "won" count the prompts that became wrong or right compared with float32.
Quantized weights are multiplied in the type that --dtype names. Other rows: diffusers' unmodified
pipeline, and two upper bounds of every score, perfect images and their reconstructions.

With --jobs N, N processes of one thread each share the work. With --keep, verdicts are kept in a
folder, one file for every few images: an interrupted run continues where it stopped, and a longer one
generates only what is new. A file made with other weights, sizes or code is ignored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from evaluate import Generate, generate_with_diffusers, generate_with_mlx, images_of, reconstructions_of
from judge import Score, Verdict, as_markdown, judge, scores
from render import ground_truth
from scenes import Scene, held_out_scenes

CHUNK = 20  # images per file of verdicts


@dataclass(frozen=True)
class Row:
    name: str
    made_by: str = "mlx_zimage"
    dtype: str | None = None  # compute dtype, for rows that show its effect
    quantization: dict | None = None  # arguments of mlx_zimage.convert

    @property
    def file_name(self) -> str:
        return self.name.replace(" ", "-")


ROWS = (
    Row("float32", dtype="float32"),
    Row("bfloat16", dtype="bfloat16"),
    *(Row(f"{bits} bits", quantization={"bits": bits, "group_size": 64}) for bits in (8, 6, 5, 4)),
    Row("mxfp4", quantization={"mode": "mxfp4"}),
    Row("nvfp4", quantization={"mode": "nvfp4"}),
    Row("diffusers", made_by="diffusers", dtype="float32"),
    Row("reconstructions", made_by="autoencoder", dtype="float32"),
    Row("ground truth", made_by="nothing", dtype="float32"),
)
BASE = ROWS[0]
MEASURED = tuple(row for row in ROWS if row.name in ("float32", "diffusers", "reconstructions", "ground truth"))


@dataclass(frozen=True)
class Part:
    """A few images of a row, for one process. `stamp` identifies what the verdicts are about."""

    row: Row
    checkpoint: Path
    dtype: str
    count: int
    seed: int
    start: int
    stop: int
    stamp: str
    keep: Path

    @property
    def file(self) -> Path:
        return self.keep / f"{self.row.file_name}-{self.seed}-{self.start:05d}.json"

    def kept(self) -> list[Verdict] | None:
        if not self.file.exists():
            return None
        kept = json.loads(self.file.read_text())
        if kept["stamp"] != self.stamp or len(kept["verdicts"]) != self.stop - self.start:
            return None
        return [Verdict(**one) for one in kept["verdicts"]]


def parts_of(row: Row, checkpoint: Path, digest: str, options: argparse.Namespace, keep: Path) -> Iterator[Part]:
    dtype = row.dtype or options.dtype
    stamp = f"{digest} {row.name} {dtype}"
    for start in range(0, options.count, CHUNK):
        stop = min(start + CHUNK, options.count)
        yield Part(row, checkpoint, dtype, options.count, options.seed, start, stop, stamp, keep)


def judge_part(part: Part) -> Part:
    """Generate, judge and keep; runs in a worker process."""
    scenes = _scenes(part.count, part.seed)[part.start : part.stop]
    if part.row.made_by == "nothing":
        images = ground_truth(scenes)
    elif part.row.made_by == "autoencoder":
        images = reconstructions_of(part.checkpoint, scenes)
    else:
        images = images_of(_generate(part.row.made_by, part.checkpoint, part.dtype), scenes, part.seed + part.start)
    verdicts = [asdict(judge(image, scene)) for image, scene in zip(images, scenes, strict=True)]
    unfinished = part.file.with_suffix(".part")
    unfinished.write_text(json.dumps({"stamp": part.stamp, "verdicts": verdicts}))
    unfinished.replace(part.file)
    return part


@lru_cache(maxsize=1)
def _scenes(count: int, seed: int) -> list[Scene]:
    return held_out_scenes(count, seed)


@lru_cache(maxsize=1)  # a process goes from row to row, and needs one pipeline at a time
def _generate(made_by: str, checkpoint: Path, dtype: str) -> Generate:
    return {"mlx_zimage": generate_with_mlx, "diffusers": generate_with_diffusers}[made_by](checkpoint, dtype)


def digest_of(checkpoint: Path) -> str:
    """A digest of what verdicts depend on, except libraries: the checkpoint, and the world's and judge's code."""
    here = Path(__file__).parent
    code = [here / f"{name}.py" for name in ("captions", "evaluate", "judge", "palette", "render", "scenes")]
    sha = hashlib.sha256()
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()) + code:
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def one_thread_each() -> None:
    """For this process' children: as many processes as cores, so one thread in each."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def judge_rows(rows: list[Row], options: argparse.Namespace, keep: Path) -> dict[str, list[Verdict]]:
    """One verdict per prompt, by the name of the row."""
    parts, digest = [], digest_of(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            checkpoint = options.checkpoint
            if row.quantization:
                from mlx_zimage.convert import convert

                checkpoint = convert(checkpoint, Path(folder) / row.file_name, **row.quantization)
            parts += parts_of(row, checkpoint, digest, options, keep)
        # rows that are not about precision come first, in case time runs out
        todo = sorted((part for part in parts if part.kept() is None), key=lambda part: part.row not in MEASURED)
        started = time.monotonic()
        one_thread_each()
        # spawned: what was imported here, and its threads, stay here
        with multiprocessing.get_context("spawn").Pool(min(options.jobs, max(1, len(todo)))) as pool:
            for number, part in enumerate(pool.imap_unordered(judge_part, todo), 1):
                spent = time.monotonic() - started
                print(f"{number} of {len(todo)} parts, {spent:.0f} s: {part.row.name}", file=sys.stderr, flush=True)
    verdicts: dict[str, list[Verdict]] = {row.name: [] for row in rows}
    for part in parts:
        verdicts[part.row.name] += part.kept()
    return verdicts


def as_table(rows: list[Row], scenes: list[Scene], verdicts: dict[str, list[Verdict]]) -> str:
    """A line for each row; lost and won are left out where float32 was not generated."""
    lines = ["| weights | everything right % | en | zh | shapes | lost | won |", "|---|---|---|---|---|---|---|"]
    base = [verdict.is_right for verdict in verdicts[BASE.name]] if BASE.name in verdicts else None
    for row in rows:
        table = {score.group: score for score in scores(scenes, verdicts[row.name])}
        right = [verdict.is_right for verdict in verdicts[row.name]]
        changes = list(zip(base, right, strict=True)) if base else []
        lost, won = changes.count((True, False)), changes.count((False, True))
        score, en, zh = table["all"], _percent(table.get("en")), _percent(table.get("zh"))
        lines.append(
            f"| {row.name} | {score.right:.1f} ± {score.error:.1f} | {en} | {zh} | {score.checks['shapes']:.1f} | "
            + (f"{lost} | {won} |" if base else "| |")
        )
    return "\n".join(lines)


def _percent(score: Score | None) -> str:
    return f"{score.right:.1f}" if score else ""


def seconds_per_image(checkpoint: Path, dtype: str, seed: int, count: int = 20) -> list[float]:
    """Seconds per 128x128 image, sorted, once the model is loaded and has generated one."""
    scenes = held_out_scenes(count + 1, seed, (128, 128))
    generate, taken = generate_with_mlx(checkpoint, dtype), []
    for i, scene in enumerate(scenes):
        started = time.perf_counter()
        generate([scene.caption], 128, 128, [seed + i])
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-n", "--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2027, help="seed of the prompts and of the first image")
    parser.add_argument("--dtype", default="float32", help="dtype in which quantized weights are multiplied")
    parser.add_argument("--only", nargs="*", choices=[row.name for row in ROWS], help="names of rows; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--keep", type=Path, help="a folder for the verdicts")
    parser.add_argument("--speed", action="store_true", help="only measure the seconds per image, in one process")
    options = parser.parse_args()
    if options.speed:
        taken = seconds_per_image(options.checkpoint, options.dtype, options.seed)
        print(
            f"{statistics.median(taken):.2f} s per 128x128 image in {options.dtype} once loaded "
            f"(median of {len(taken)}, {taken[0]:.2f} to {taken[-1]:.2f})"
        )
        return
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        keep = options.keep or Path(folder)
        keep.mkdir(parents=True, exist_ok=True)
        verdicts = judge_rows(rows, options, keep)
    scenes = _scenes(options.count, options.seed)
    print(as_table(rows, scenes, verdicts))
    for row in MEASURED:
        if row in rows:
            print(f"\n{row.name}:\n\n{as_markdown(scores(scenes, verdicts[row.name]))}")


if __name__ == "__main__":
    main()
