from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..errors import NumericsError


@click.command(epilog="Example: mlx-zimage doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json):
    """Tell whether this machine will do: its versions and memory, and a numeric self-test of MLX.

    The operations that the networks are made of are compared with NumPy; exits with 8 if any is wrong, as then no
    picture from this machine can be trusted.
    """
    from ..doctor import machine, self_test

    facts = machine()
    if not as_json:
        for name, fact in facts.items():
            click.echo(f"{name:18}{fact}")
    checks = []
    for check in self_test():
        checks.append(check)
        if not as_json:
            verdict = "right" if check.passed else "WRONG"
            click.echo(f"{check.name:30}{verdict}  error {check.error:.1e}, at most {check.limit:.0e} is right")
    wrong = [check.name for check in checks if not check.passed]
    if as_json:
        click.echo(json.dumps({**facts, "passed": not wrong, "checks": [asdict(check) for check in checks]}))
    if wrong:
        raise NumericsError(
            f"this machine computes {', '.join(wrong)} wrongly; try another version of MLX (pip install -U mlx)"
        )
