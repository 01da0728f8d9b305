from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..errors import NumericsError


@click.command(epilog="Example: mlx-zimage doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Tell whether this machine, its system, MLX build, memory and disk will do, and test MLX's arithmetic.

    "limits" beside one of them says what to expect; pictures are drawn all the same. The operations that the networks
    are made of are compared with NumPy; exits with 8 if any is wrong, as then no picture from this machine can be
    trusted.
    """
    from ..doctor import machine, self_test, verdicts

    facts, judged = machine(), verdicts()
    if not as_json:
        for name, fact in facts.items():
            click.echo(f"{name:18}{fact}")
        for verdict in judged:
            click.echo(f"{verdict.name:18}{'will do' if verdict.will_do else 'limits '}  {verdict.told}")
    checks = []
    for check in self_test():
        checks.append(check)
        if not as_json:
            result = "right" if check.passed else "WRONG"
            click.echo(f"{check.name:37}{result}  error {check.error:.1e}, at most {check.limit:.0e} is right")
    wrong = [check.name for check in checks if not check.passed]
    if as_json:
        lists = {"verdicts": [asdict(verdict) for verdict in judged], "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps({**facts, "passed": not wrong, **lists}))
    if wrong:
        raise NumericsError(
            f"this machine computes {', '.join(wrong)} wrongly; try another version of MLX (pip install -U mlx)"
        )
