"""What is planned on Macs that nobody has measured: golden/macs.md, which running this file writes again."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_zimage import MemoryBudgetError, machine
from mlx_zimage.dtypes import ITEM_BYTES
from mlx_zimage.memory import Planner, Workload
from mlx_zimage.models import NETWORKS
from mlx_zimage.quantization import default_quantization
from mlx_zimage.sizes import rounded_up
from mlx_zimage.weights.component import Entry
from mlx_zimage.weights.quantize import tensor_quantization

TABLE = Path(__file__).parent / "golden" / "macs.md"
SIDES = (512, 1024, 2048)
GIB = 2**30


@dataclass(frozen=True)
class Mac:
    """What MLX reports about a GPU: its name, memory, recommended working set and the largest buffer in bytes."""

    name: str
    memory: int
    working_set: int
    buffer: int

    @classmethod
    def of(cls, name: str, gib: int) -> Mac:
        """As macOS describes Macs by default: a buffer may hold half of the memory, as reported for a Mac with 16
        GB."""
        memory = gib * GIB
        return cls(name, memory, machine.mac_working_set(memory), memory // 2)

    @property
    def facts(self) -> dict:
        return {
            "device_name": self.name,
            "memory_size": self.memory,
            "max_recommended_working_set_size": self.working_set,
            "max_buffer_length": self.buffer,
        }


MACS = {
    "GitHub's runner": Mac("Apple Paravirtual device", 7 * GIB, 5_010_000_000, 3_760_000_000),  # reported
    "8 GB M1": Mac.of("Apple M1", 8),
    "16 GB M2": Mac.of("Apple M2", 16),
    "36 GB M4 Max": Mac.of("Apple M4 Max", 36),
    "512 GB M3 Ultra": Mac.of("Apple M3 Ultra", 512),
}
MODELS = {"4 bits": 4, "8 bits": 8, "bfloat16": None}


def stand_in(patch: pytest.MonkeyPatch, mac: Mac, home: Path) -> None:
    """Nothing is computed here: the planner only asks what MLX would compute on."""
    patch.setenv("MLX_ZIMAGE_HOME", str(home))
    patch.setattr(mx, "default_device", lambda: mx.gpu)
    patch.setattr(mx.metal, "is_available", lambda: True)
    patch.setattr(mx, "device_info", lambda device=None: mac.facts)


def full_size(bits: int | None) -> SimpleNamespace:
    """A checkpoint of Z-Image's own sizes, of which there are only the headers."""
    quantization = default_quantization(bits) if bits else None
    networks = {name: component(name, config(), quantization) for name, config in NETWORKS.items()}
    return SimpleNamespace(networks=networks, **networks)


def component(name: str, config, quantization) -> SimpleNamespace:
    entries = {}
    for weight, shape in config.shapes().items():
        q = tensor_quantization(name, weight, shape, quantization)
        for part, size in (q.packed(weight, shape) if q else {weight: shape}).items():
            dtype = "U32" if q and part == weight else "BF16"
            entries[part] = Entry(Path(), part, 0, ITEM_BYTES[dtype] * prod(size), tuple(size), dtype)
    return SimpleNamespace(config=config, shapes=config.shapes(), entries=entries)


def rows(home: Path) -> list[list[str]]:
    found = []
    checkpoints = {name: full_size(bits) for name, bits in MODELS.items()}
    for title, mac in MACS.items():
        for model, checkpoint in checkpoints.items():
            with pytest.MonkeyPatch.context() as patch:
                stand_in(patch, mac, home)
                planner = Planner(checkpoint, getattr(mx, machine.default_dtype()))
                for side in SIDES:
                    found.append([title, model, f"{side}x{side}", *cells(planner, side)])
    return found


def cells(planner: Planner, side: int) -> list[str]:
    budget = machine.machine_budget()
    try:
        plan = planner.plan(Workload(side, side, 1, 128, 8), budget)
    except MemoryBudgetError as error:
        return [rounded_up(budget), str(error)] + [""] * 6
    assert plan.room <= budget and plan.buffer <= planner.max_buffer
    blocks = planner.footprints["transformer"].blocks
    streamed = len(plan.streamed & blocks.keys())
    return [
        rounded_up(budget),
        "kept" if plan.keep else "one by one",
        f"{streamed} of {len(blocks)}" if streamed else "-",
        "lean" if plan.lean else "-",
        "whole" if plan.strip_bytes is None else f"{plan.strip_bytes // 2**20} MB",
        rounded_up(plan.room),
        rounded_up(plan.buffer),
        f"{plan.flops / machine.product_rate():.2f} s",
    ]


def render(home: Path) -> str:
    head = ["Mac", "model", "size", "budget", "networks", "blocks streamed", "blocks", "decoded", "memory"]
    head += ["largest tensor", "longest kernel"]
    lines = [head, ["---"] * len(head), *rows(home)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# Plans for Macs, none of which has been measured

These plans are for one image of 8 steps and a prompt of 128 tokens. `python tests/test_macs.py` computes them from the
facts and rates in that file and in `mlx_zimage/machine.py`. The time of the longest kernel is calculated from the rate
of matrix products; attention and convolutions reach about half of it. Networks are kept in memory for the next image,
or read and unloaded one by one; lean blocks free memory halfway through; images are decoded whole, or in strips of the
size under *decoded*. M1, M2 and virtual machines compute in float16, the others in bfloat16.

{text}
"""


def test_the_table_of_macs_is_what_is_planned(tmp_path):
    assert TABLE.read_text() == render(tmp_path), "run python tests/test_macs.py and look at what changed"


@pytest.mark.parametrize("title", MACS)
@pytest.mark.parametrize("side", [256, 1024, 4096])
def test_no_kernel_is_predicted_to_take_a_second_and_no_tensor_exceeds_a_buffer(title, side, tmp_path, monkeypatch):
    stand_in(monkeypatch, MACS[title], tmp_path)
    planner = Planner(full_size(4), getattr(mx, machine.default_dtype()))
    plan = planner.best(Workload(side, side, 4, 512, 8), 10**13)
    assert plan.flops <= machine.KERNEL_S * machine.product_rate()
    assert plan.buffer <= planner.max_buffer


@pytest.mark.parametrize("tile", [1024, 0], ids=["in tiles", "whole"])
@pytest.mark.parametrize("bits", MODELS.values(), ids=MODELS)
def test_a_mac_of_16_gb_has_room_to_enlarge_an_image_to_4096x4096(bits, tile, tmp_path, monkeypatch):
    stand_in(monkeypatch, MACS["16 GB M2"], tmp_path)
    planner = Planner(full_size(bits), getattr(mx, machine.default_dtype()))
    plan = planner.plan(Workload(4096, 4096, 1, 512, 8, from_image=True, tile=tile), machine.machine_budget())
    assert plan.buffer <= planner.max_buffer and plan.flops <= machine.KERNEL_S * machine.product_rate()


def test_a_refusal_names_the_buffer_and_the_size_that_fits(tmp_path, monkeypatch):
    stand_in(monkeypatch, MACS["GitHub's runner"], tmp_path)
    planner = Planner(full_size(4), mx.float32)
    with pytest.raises(MemoryBudgetError, match=r"hold at most 3\.76 GB; the largest size that fits is \d+x"):
        planner.plan(Workload(8192, 8192, 1, 128, 8), 10**13)


if __name__ == "__main__":
    TABLE.write_text(render(Path("nowhere")))
