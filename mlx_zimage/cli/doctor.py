from __future__ import annotations

import json

import click

from ..dtypes import FLOATS
from ..errors import NumericsError
from ..variants import TURBO
from .elsewhere import Command
from .output import echo
from .values import ModelName, sides, size_options


@click.command(cls=Command, epilog="Example: mlx-zimage doctor --model z-image-4bit --json > doctor.json")
@click.option(
    "--model",
    type=ModelName(converted=True),
    help="Also measure the speed of the disk that holds this model, and check only this model's quantization.",
)
@size_options
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(sorted(FLOATS)),
    multiple=True,
    help="Check arithmetic in this dtype only; repeatable.  [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    model: str | None, size: str | None, width: int | None, height: int | None, dtypes: tuple[str, ...], as_json: bool
) -> None:
    """Check this machine: system, MLX build, memory, disk and MLX's arithmetic.

    A line marked "limited" names a restriction and its effect; images can still be generated. The operations that the
    networks are built from are compared with NumPy; if any is wrong, no image from this machine can be trusted, and the
    exit code is 8. The measured speed is stored, so that later commands split work into pieces short enough for this
    GPU. The time that the longest piece takes is estimated for images of the size that you give.
    """
    from .. import doctor, selftest
    from ..machine import is_virtual
    from ..weights.checkpoint import open_checkpoint

    sides(size, width, height, TURBO.size)  # refuses what can be refused before a model is opened
    checkpoint = open_checkpoint(model) if model else None
    width, height = sides(size, width, height, checkpoint.vae.config.sample_size if checkpoint else TURBO.size)
    quantizations = selftest.quantizations_of(checkpoint) if checkpoint else selftest.every_quantization()
    dtypes = dtypes or tuple(dtype for dtype in FLOATS if dtype != "bfloat16" or not is_virtual())
    facts, speeds = doctor.facts(), doctor.speeds(width, height, checkpoint)
    verdicts = doctor.verdicts(facts, speeds)
    if not as_json:
        for name, fact in facts.items():
            echo(f"{name:18}{'-' if fact is None else fact}")
        echo(f"{'products':18}{speeds.product_rate / 1e12:.3g} TFLOP/s in {facts['dtype']}")
        for verdict in verdicts:
            _print_verdict(verdict)
    checks = []
    for check in selftest.self_test(dtypes, quantizations):
        checks.append(check)
        if not as_json:
            result = "ok" if check.passed else "WRONG"
            error = check.problem or f"error {check.error:.1e}, limit {check.limit:.0e}"
            echo(f"{f'{check.name} in {check.dtype}':45}{result:7}{error}")
    passed = all(check.passed for check in checks)
    retried = doctor.without_matrix_units(dtypes, model) if not passed and facts["matrix_units"] else None
    verdicts.append(doctor.judge_numbers(checks, retried))
    otherwise = doctor.packed_otherwise(quantizations)
    if as_json:
        click.echo(json.dumps(doctor.report(facts, speeds, verdicts, checks, retried, otherwise)))
    else:
        _print_verdict(verdicts[-1], "WRONG")
    if not passed:
        raise NumericsError(f"{verdicts[-1].message}; {verdicts[-1].advice}")


def _print_verdict(verdict, otherwise: str = "limited") -> None:
    advice = f"; {verdict.advice}" if verdict.advice else ""
    echo(f"{verdict.name:18}{'ok' if verdict.ok else otherwise:9}{verdict.message}{advice}")
