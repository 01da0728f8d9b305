"""How full this machine's battery is: macOS tells by `pmset`, Linux in /sys."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

POWER = Path("/sys/class/power_supply")


def charge() -> int | None:
    """The charge in percent of a battery that is being drawn from; None on mains, or where there is none."""
    if platform.system() == "Darwin":
        try:
            return of_pmset(subprocess.run(["pmset", "-g", "batt"], capture_output=True, text=True).stdout)
        except OSError:
            return None
    return of_folder(POWER)


def of_pmset(told: str) -> int | None:
    """From what `pmset -g batt` prints."""
    found = re.search(r"InternalBattery\S*.*?(\d+)%; discharging", told)
    return int(found[1]) if found else None


def of_folder(power: Path) -> int | None:
    """From Linux's folder of power supplies: the fullest battery, if any is discharging."""
    charges = []
    for battery in power.glob("BAT*"):
        try:
            if (battery / "status").read_text().strip() == "Discharging":
                charges.append(int((battery / "capacity").read_text()))
        except (OSError, ValueError):
            continue
    return max(charges, default=None)
