"""How a weight is quantized. Modes, group sizes and the config.json block are mlx-lm's, so its tools can read ours."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import RequestError
from .untrusted import brief

# mode -> (bits allowed, group sizes allowed); the first group size is the default
MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Quantization:
    """How one weight is quantized: `bits` per value, one scale per `group_size` values in a row."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self):
        if self.mode not in MODES:
            raise RequestError(f"quantization mode must be one of {', '.join(MODES)}, got {brief(self.mode)}")
        bits, groups = MODES[self.mode]
        if type(self.bits) is not int or self.bits not in bits:
            raise RequestError(f"{self.mode} quantization takes {_either(bits)} bits, got {brief(self.bits)}")
        if type(self.group_size) is not int or self.group_size not in groups:
            raise RequestError(
                f"{self.mode} quantization takes a group size of {_either(groups)}, got {brief(self.group_size)}"
            )

    def __str__(self) -> str:
        """Such as "4-bit affine", with the group if it is not the mode's own."""
        own = self.group_size == MODES[self.mode][1][0]
        return f"{self.bits}-bit {self.mode}" + ("" if own else f" in groups of {self.group_size}")

    def packed(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that replace the dense weight `name` of `shape` (out, in)."""
        layer = name.removesuffix(".weight")
        *rows, width = shape
        groups = (*rows, width // self.group_size)
        tensors = {name: (*rows, width * self.bits // 32), f"{layer}.scales": groups}
        if self.mode == "affine":
            tensors[f"{layer}.biases"] = groups
        return tensors

    def to_dict(self) -> dict:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @classmethod
    def from_dict(cls, block: dict) -> Quantization:
        return cls(block["bits"], block["group_size"], block.get("mode", "affine"))

    @classmethod
    def of_shapes(cls, dense: tuple[int, ...] | None, parts: Mapping[str, tuple[int, ...]]) -> Quantization | None:
        """The quantization that gives a dense weight parts ("weight", "scales", "biases") of these shapes, if any."""
        if not dense or not {"weight", "scales"} <= parts.keys() or not parts["weight"] or not parts["scales"]:
            return None
        for mode, (allowed_bits, groups) in MODES.items():
            for bits, group in itertools.product(allowed_bits, groups):
                q = cls(bits, group, mode)
                expected = q.packed("x.weight", dense)
                if dense[-1] % group == 0 and {f"x.{part}": shape for part, shape in parts.items()} == expected:
                    return q
        return None


def default_quantization(bits: int | None, group_size: int | None = None, mode: str = "affine") -> Quantization:
    """A Quantization with the mode's defaults filled in: its only number of bits (4 if affine) and its group size."""
    allowed_bits, groups = MODES.get(mode, ((bits or 4,), (64,)))
    if bits is None:
        bits = 4 if mode == "affine" else allowed_bits[0]
    return Quantization(bits, group_size or groups[0], mode)


def _either(values: tuple[int, ...]) -> str:
    *others, last = map(str, sorted(values))
    return f"{', '.join(others)} or {last}" if others else last
