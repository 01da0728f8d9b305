"""This machine's battery charge: from `pmset` on macOS, from /sys on Linux."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

POWER = Path("/sys/class/power_supply")


def charge() -> int | None:
    """The charge in percent of a battery that is discharging; None on mains power, or without a battery."""
    if platform.system() == "Darwin":
        try:
            return parse_pmset(subprocess.run(["pmset", "-g", "batt"], capture_output=True, text=True).stdout)
        except OSError:
            return None
    return read_power_supplies(POWER)


def parse_pmset(output: str) -> int | None:
    """The charge in the output of `pmset -g batt`."""
    found = re.search(r"InternalBattery\S*.*?(\d+)%; discharging", output)
    return int(found[1]) if found else None


def read_power_supplies(power: Path) -> int | None:
    """The charge of the fullest discharging battery in Linux's folder of power supplies."""
    charges = []
    for battery in power.glob("BAT*"):
        try:
            if (battery / "status").read_text().strip() == "Discharging":
                charges.append(int((battery / "capacity").read_text()))
        except (OSError, ValueError):
            continue
    return max(charges, default=None)
