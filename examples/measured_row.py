"""Make a machine's row for the table in examples/measurements.md, from the JSON files of doctor and bench.

mlx-zimage doctor --json > doctor.json
mlx-zimage bench --q-bits 4 --size 512x512 --count 1 --json bench.json
python examples/measured_row.py doctor.json bench.json
"""

import json
import sys
from pathlib import Path

CHIP = ("device", "architecture", "macos", "mlx")  # the same in both files


def row(doctor: dict, bench: dict) -> str:
    """The row in Markdown: seconds as medians, memory as the largest peak."""
    machine, case = doctor["machine"], bench["case"]
    if any(machine[name] != bench["machine"][name] for name in CHIP):
        raise SystemExit(
            f"the files are of two machines or versions: {machine} and {bench['machine']}; run both commands again"
        )
    if not doctor["passed"]:
        wrong = sorted({check["name"] for check in doctor["checks"] if not passed(check)})
        raise SystemExit(f"this machine computes wrong results for {', '.join(wrong)}: open an issue instead of a row")
    system = f"macOS {machine['macos']}" if machine["macos"] else "Linux"
    rate = f"{doctor['speeds']['product_tflops']:.3g} TFLOP/s"
    weights = f"{case['bits']} bits, {case['dtype']}" if case["bits"] else case["dtype"]
    phases = [bench[name] for name in ("encode", "steps", "decode")]
    memory = f"{machine['memory_budget'] / 1e9:.0f} GB for the GPU"
    cells = [
        f"{machine['device']}, {memory}, {system}, MLX {machine['mlx']}, {rate}",
        weights,
        f"{case['width']}x{case['height']}",
        *(f"{phase['median_s']:.3f}" for phase in phases),
        f"{max(phase['peak_gb'] for phase in phases):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def passed(check: dict) -> bool:
    return check["error"] is not None and check["error"] <= check["limit"]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: python {sys.argv[0]} doctor.json bench.json")
    print(row(*(json.loads(Path(file).read_text()) for file in sys.argv[1:])))
