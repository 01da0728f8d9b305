"""pytest tests/faults --table: each class of attack, and how many were tried, withstood, and went wrong.

An attack is withstood if it is refused as its test says, or does no harm. The table has the most processor time that
one took, with its processes, and the most memory that this process took for it, which macOS does not report.
"""

import resource
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

PEAK = Path("/proc/self/clear_refs")
OUTCOMES = ("passed", "failed", "error")


def pytest_addoption(parser):
    parser.addoption("--table", action="store_true", help="print a table of the attacks that were tried")


def processor_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def resident(field: str) -> int:
    """Bytes of memory, VmRSS now or VmHWM at most since 5 was written to PEAK."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return 1024 * int(lines[field].split()[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not item.config.getoption("--table", False):
        return (yield)
    before, start = 0, processor_s()
    if PEAK.exists():
        PEAK.write_text("5")
        before = resident("VmRSS")
    try:
        return (yield)
    finally:
        used = resident("VmHWM") - before if PEAK.exists() else 0
        item.user_properties += [("seconds", processor_s() - start), ("bytes", used)]


def pytest_terminal_summary(terminalreporter):
    if not terminalreporter.config.getoption("--table", False):
        return
    counts: dict[str, Counter] = defaultdict(Counter)
    most: dict[str, Counter] = defaultdict(Counter)
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            own = Path(report.location[0]).stem.removeprefix("test_").replace("_", " ")
            for kind in (own, "all"):
                counts[kind][outcome] += 1
                for name, value in report.user_properties:
                    most[kind][name] = max(most[kind][name], value)
    terminalreporter.section("attacks")
    terminalreporter.line(f"{'class':18}{'tried':>8}{'withstood':>11}{'wrong':>7}{'slowest':>10}{'memory':>9}")
    for kind in sorted(counts, key=lambda kind: (kind == "all", kind)):
        tried, held = counts[kind].total(), counts[kind]["passed"]
        cost = f"{most[kind]['seconds']:8.1f} s{most[kind]['bytes'] / 1e6:6.0f} MB"
        terminalreporter.line(f"{kind:18}{tried:8}{held:11}{tried - held:7}{cost}")
