from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..errors import NumericsError


@click.command(epilog="Example: mlx-zimage doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Check this machine: system, MLX build, memory, disk and MLX's arithmetic.

    "limited" marks a restriction, with its consequence; images can still be generated. The operations that the networks
    are built from are compared with NumPy; if any is wrong, no image from this machine can be trusted, and the exit
    code is 8.
    """
    from ..doctor import machine, self_test, verdicts

    facts, judged = machine(), verdicts()
    if not as_json:
        for name, fact in facts.items():
            click.echo(f"{name:18}{fact}")
        for verdict in judged:
            click.echo(f"{verdict.name:18}{'ok' if verdict.will_do else 'limited':7}  {verdict.told}")
    checks = []
    for check in self_test():
        checks.append(check)
        if not as_json:
            result = "ok" if check.passed else "WRONG"
            click.echo(f"{check.name:37}{result:5}  error {check.error:.1e}, limit {check.limit:.0e}")
    wrong = [check.name for check in checks if not check.passed]
    if as_json:
        lists = {"verdicts": [asdict(verdict) for verdict in judged], "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps({**facts, "passed": not wrong, **lists}))
    if wrong:
        raise NumericsError(
            f"wrong results on this machine for {', '.join(wrong)}; try another version of MLX (pip install -U mlx)"
        )
