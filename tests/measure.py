"""How much memory a process takes, for tests and fuzzing."""

import resource
import subprocess
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak() -> int:
    """The most bytes of memory that this process has had at once."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, getrusage never says less than what the process that started this one took.
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def measured(imports: str, work: str, *args: object) -> tuple[str, int]:
    """What a program prints in a process of its own, and the bytes by which the process grows after its imports."""
    program = "\n".join(
        [
            f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nfrom measure import peak",
            imports,
            "before = peak()",
            work,
            "print(peak() - before)",
        ]
    )
    words = [sys.executable, "-", *map(str, args)]
    done = subprocess.run(words, input=program, stdout=subprocess.PIPE, text=True, check=True)
    *printed, grown = done.stdout.splitlines()
    return "\n".join(printed), int(grown)
