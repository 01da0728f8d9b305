"""ComfyUI's quantized layers: what a file declares about them, the rows that they represent, and writing them.

A layer is marked by a tensor LAYER.comfy_quant or in the file's metadata, as JSON such as {"format": "nvfp4"}. Its
weight and scales are tensors next to each other; some layers are rotated first (ConvRot).

Source: ComfyUI's comfy/ops.py and comfy/utils.py, and comfy-kitchen 0.2.40. Rows equal comfy-kitchen's in float32 bit
for bit, except those of rotated layers, which are summed in an exact order here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from ..dtypes import FLOAT_SPELLINGS
from ..errors import CheckpointError, NumericsError
from ..quantization import Quantization
from ..untrusted import brief, parse_json
from ..weights.component import Entry
from .rounding import dequantize_rows
from .rows import FP8, Packing, Tensor, read_rows, stored_bytes, stored_rows
from .shards import Slot, Task

MARK, METADATA = "comfy_quant", "_quantization_metadata"
MAX_MARK = 4096  # bytes of JSON in a comfy_quant; ComfyUI writes 90
# The names of what is stored next to a weight. Scales of inputs are needed only for products with quantized inputs.
PARTS = (
    *("weight_scale", "weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction"),
    *("scale_weight", "pre_quant_scale"),
)
IGNORED = (MARK, "input_scale", "scale_input")
# In the metadata, some programs name layers without the prefix that tensors have.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
FP8_FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FP8_SCALES = ("weight_scale", "scale_weight")  # newer and older
FP8_MOST = 448  # the largest number in e4m3
FP4 = np.multiply.outer([1, -1], [0, 0.5, 1, 1.5, 2, 3, 4, 6]).astype(np.float32).ravel()
BLOCK_ROWS, BLOCK_COLUMNS = 128, 4  # of the blocks that scales of tensor cores are stored in
MXFP8 = Quantization(8, 32, "mxfp8")
MOST_POWER = 246  # of mxfp8: with 247, 448 times 2**(247 - 127) would exceed float32; 255 means NaN

Declared = dict[str, Any]
ReadRows = Callable[[int, int], mx.array]


@dataclass(frozen=True)
class Layer:
    """A layer as stored: its weight, the tensors that go with it, and what the file declares; label is the file."""

    name: str
    settings: Declared
    parts: Mapping[str, Entry]
    label: str

    @property
    def weight(self) -> Entry:
        return self.parts["weight"]

    @property
    def form(self) -> str | None:
        """The declared format; files of fp8 may declare none."""
        return self.settings.get("format", FP8_FORMATS.get(self.weight.dtype))

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def fault(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.label}: {self.name}{message}; download another version")

    def matrix(self, *dtypes: str) -> int:
        """The bytes per row of the weight, which must be a matrix in one of these dtypes."""
        self._check("weight", dtypes, len(self.weight.shape) == 2 and 0 not in self.weight.shape, "a matrix")
        return self.weight.shape[1]

    def part(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Entry:
        """The tensor stored as name, which must have one of these dtypes and shapes."""
        if name not in self.parts:
            raise self.fault(f" is {self.form}, but {self.name}.{name} is missing")
        own = self.parts[name].shape
        self._check(name, dtypes, own in shapes, " or ".join(map(str, dict.fromkeys(shapes))))
        return self.parts[name]

    def _check(self, name: str, dtypes: tuple[str, ...], fits: bool, shape: str) -> None:
        own = self.parts[name]
        if own.dtype not in dtypes:
            raise self.fault(f".{name} has dtype {own.dtype}, expected {' or '.join(dtypes)}")
        if not fits:
            raise self.fault(f".{name} has shape {own.shape}, expected {shape}")

    def setting(self, key: str, default: object) -> object:
        """One of the settings, which older files have within "params"."""
        params = self.settings.get("params") or {}
        if not isinstance(params, dict):
            raise self.fault(f" declares params {brief(params)}, expected an object")
        return self.settings.get(key, params.get(key, default))

    def number(self, key: str, default: int) -> int:
        value = self.setting(key, default)
        if type(value) is not int or not 1 <= value <= 2**20:
            raise self.fault(f" declares {key} {brief(value)}, expected a whole number above 0")
        return value

    def group(self, width: int) -> int:
        """The columns that are rotated together, a power of 4."""
        size = self.number("convrot_groupsize", 256)
        if size < 4 or size & (size - 1) or size.bit_length() % 2 == 0 or width % size:
            raise self.fault(f" declares convrot_groupsize {size}, expected a power of 4 that divides {width}")
        return size

    def scale(self, name: str = "weight_scale", single: bool = True) -> Callable[[int, int], mx.array]:
        """A reader for the scales of rows, (n, 1) or, if one scale is allowed for all, (1, 1); float32."""
        alone = ((), (1,), (1, 1)) if single else ()
        entry = self.part(name, FLOAT_SPELLINGS, *alone, (self.rows,), (self.rows, 1))
        whole = stored_rows(entry)(0, entry.shape[0] if entry.shape else 1).astype(mx.float32).reshape(-1, 1)
        return lambda start, stop: whole if whole.size == 1 else whole[start:stop]

    def not_finite(self) -> NumericsError:
        return NumericsError(f"{self.name}.weight contains NaN or infinity; download the source model again")

    def tensor(self, shape: tuple[int, ...], read: ReadRows, packing: Packing | None = None, padded: int = 1) -> Tensor:
        nbytes = sum(part.nbytes for part in self.parts.values())
        return Tensor(f"{self.name}.weight", shape, nbytes, read, packing, padded)


def declared(entries: Mapping[str, Entry], metadata: Sequence[Mapping[str, str]], label: str) -> dict[str, Declared]:
    """The settings of each quantized layer, by its stored name; metadata is that of each file.

    As in ComfyUI, metadata overrides marks.
    """
    found = {}
    for name, entry in entries.items():
        layer, _, part = name.rpartition(".")
        if part == MARK and f"{layer}.weight" in entries:
            if len(entry.shape) != 1 or entry.nbytes > MAX_MARK:
                raise CheckpointError(
                    f"{label}: {name} has shape {entry.shape}, expected one axis of at most {MAX_MARK} bytes; "
                    "download the file again"
                )
            found[layer] = _settings(bytes(stored_bytes(entry)(0, entry.shape[0])), name, label)
    for own in metadata:
        for layer, settings in _listed(own, label).items():
            named = [f"{prefix}{layer}" for prefix in PREFIXES if f"{prefix}{layer}.weight" in entries]
            if not named:
                raise CheckpointError(
                    f"{label}: {METADATA} lists {brief(layer)}, which is not in the file; download the file again"
                )
            found[named[0]] = _checked(settings, f"{METADATA} of {layer:.80}", label)
    return found


def _listed(metadata: Mapping[str, str], label: str) -> dict[str, object]:
    """What a file's metadata lists as quantized, by layer."""
    if METADATA not in metadata:
        return {}
    layers = _parsed(metadata[METADATA], METADATA, label).get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f'{label}: {METADATA} has no object "layers"; download the file again')
    return layers


def _settings(content: bytes, name: str, label: str) -> Declared:
    return _checked(_parsed(content, name, label), name, label)


def _parsed(content: bytes | str, name: str, label: str) -> dict:
    try:
        parsed = parse_json(content if isinstance(content, bytes) else content.encode())
    except ValueError as error:
        raise CheckpointError(f"{label}: {name} is not valid ({error}); download the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{label}: {name} is not valid (expected an object); download the file again")
    return parsed


def _checked(settings: object, name: str, label: str) -> Declared:
    form = settings.get("format") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(form, str):
        raise CheckpointError(f"{label}: {name} is not valid (it declares no format); download the file again")
    if form not in DEQUANTIZERS:
        raise CheckpointError(
            f"{label}: {name} declares {brief(form)}, expected {' or '.join(DEQUANTIZERS)}; download another version"
        )
    return settings


def dequantized(layer: Layer) -> Tensor:
    """The weight of a quantized layer. Raises if its parts do not fit what is declared."""
    form = layer.form
    if form is None:
        raise layer.fault(f" has {' and '.join(layer.parts)}, but no {MARK} that declares its format")
    if "pre_quant_scale" in layer.parts and form != "nvfp4":
        raise layer.fault(f" declares {form} but has a pre_quant_scale, which only nvfp4 uses")
    return DEQUANTIZERS[form](layer)


# ---- formats


def _fp8(layer: Layer) -> Tensor:
    """fp8 of any shape, times a scale if there is one."""
    own = next(dtype for dtype, form in FP8_FORMATS.items() if form == layer.form)
    weight = layer.part("weight", (own,), layer.weight.shape or (1,))
    name = next((name for name in FP8_SCALES if name in layer.parts), None)
    values, scale = stored_rows(weight), layer.scale(name) if name else None

    def read(start: int, stop: int) -> mx.array:
        if scale is None:
            return values(start, stop)
        return values(start, stop) * scale(start, stop).reshape(-1, *[1] * (len(weight.shape) - 1))

    return layer.tensor(weight.shape, read)


def _int8(layer: Layer) -> Tensor:
    """Whole numbers times a scale, rotated if the file declares it."""
    width, rotated = layer.matrix("I8"), layer.setting("convrot", False)
    if rotated not in (True, False, None):
        raise layer.fault(f" declares convrot {brief(rotated)}, expected true or false")
    weight, scale, group = stored_bytes(layer.weight), layer.scale(), layer.group(width) if rotated else 1

    def read(start: int, stop: int) -> mx.array:
        codes = mx.array(weight(start, stop).view(np.int8)).astype(mx.float32)
        return unrotated(codes, group) * scale(start, stop)

    return layer.tensor((layer.rows, width), read)


def _w4a4(layer: Layer) -> Tensor:
    """Rotated: whole numbers from -8 to 7, two per byte, low half first, times a scale per row."""
    width = 2 * layer.matrix("I8", "U8")
    weight, scale, group = stored_bytes(layer.weight), layer.scale(single=False), layer.group(width)

    def read(start: int, stop: int) -> mx.array:
        codes = mx.array(_halves(weight(start, stop)).astype(np.int8)).astype(mx.float32)
        return unrotated(codes - 16 * (codes > 7), group) * scale(start, stop)

    return layer.tensor((layer.rows, width), read)


def _w4a8(layer: Layer) -> Tensor:
    """Rotated: codes of 4 or 6 bits, as the values of a codebook or centred, times a scale per group, rounded to whole
    numbers from -127 to 127, and times a scale per row."""
    nbytes, size = layer.matrix("I8", "U8"), layer.number("group_size", 16)
    # The number of bits is not declared: it follows from the number of groups.
    six = "weight_s_rel" in layer.parts and layer.parts["weight_s_rel"].shape == (layer.rows, nbytes * 4 // (3 * size))
    bits = 6 if six and nbytes % 3 == 0 else 4
    width = nbytes * 8 // bits
    if width % size or width % 16:
        raise layer.fault(f" declares group_size {size}, expected one that divides {width}")
    groups = width // size
    weight, scale, group = stored_bytes(layer.weight), layer.scale("weight_s_channel", False), layer.group(width)
    inner = layer.part("weight_s_rel", ("F8_E4M3", "U8", "F32"), (layer.rows, groups))
    relative = stored_bytes(inner)
    values = np.arange(2**bits, dtype=np.float32) - 2 ** (bits - 1)
    if "weight_codebook" in layer.parts:
        values = np.array(stored_rows(layer.part("weight_codebook", ("F32",), (2**bits,)))(0, 2**bits))
    correction = None
    if "weight_correction" in layer.parts:
        correction = stored_rows(layer.part("weight_correction", FLOAT_SPELLINGS, (groups, layer.rows)))(0, groups)

    @np.errstate(over="ignore", invalid="ignore")
    def read(start: int, stop: int) -> mx.array:
        raw, scales = weight(start, stop), relative(start, stop)
        codes = _halves(raw[:, : width // 2])
        if bits == 6:
            high = (raw[:, width // 2 :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
            codes = codes | (high.reshape(-1, width) << 4)
        by_group = scales.view(np.float32) if inner.dtype == "F32" else FP8["F8_E4M3"][scales]
        products = values[codes].reshape(-1, groups, size) * by_group[..., None]
        if not np.isfinite(products).all():
            raise layer.not_finite()  # clipping would hide it
        levels = np.clip(np.round(products), -127, 127)
        rows = unrotated(mx.array(levels.reshape(-1, width)), group) * scale(start, stop)
        if correction is None:
            return rows
        return rows + unrotated(mx.repeat(correction[:, start:stop].T.astype(mx.float32), size, axis=1), group)

    return layer.tensor((layer.rows, width), read)


def _nvfp4(layer: Layer) -> Tensor:
    """Two fp4 per byte, high half first, times a scale in fp8 per 16 columns and one for all."""
    width = 2 * layer.matrix("U8")
    if width % 16:
        raise layer.fault(f".weight has {width} columns, expected a multiple of 16")
    weight = stored_bytes(layer.weight)
    scales = _blocked(layer, ("F8_E4M3", "U8"), width // 16)
    single = layer.part("weight_scale_2", FLOAT_SPELLINGS, (), (1,))
    overall = np.array(stored_rows(single)(0, 1).astype(mx.float32).reshape(()))
    columns = np.ones(width, np.float32)
    if "pre_quant_scale" in layer.parts:  # of the inputs, so of the columns
        scale = layer.part("pre_quant_scale", FLOAT_SPELLINGS, (width,))
        columns = np.array(stored_rows(scale)(0, width).astype(mx.float32))

    @np.errstate(over="ignore", invalid="ignore")  # read_rows refuses what is not finite
    def read(start: int, stop: int) -> mx.array:
        by_group = (FP8["F8_E4M3"][scales(start, stop)] * overall)[..., None]
        values = FP4[_halves(weight(start, stop), high_first=True)].reshape(stop - start, -1, 16)
        return mx.array((values * by_group).reshape(-1, width) * columns)

    return layer.tensor((layer.rows, width), read, padded=16)


def _mxfp8(layer: Layer) -> Tensor:
    """fp8 with a power of 2 per 32 columns: MLX's mode of that name, with its scales in another order."""
    width = layer.matrix("F8_E4M3")
    if width % MXFP8.group_size:
        raise layer.fault(f".weight has {width} columns, expected a multiple of {MXFP8.group_size}")
    weight = stored_bytes(layer.weight)
    scales = _blocked(layer, ("U8", "F8_E8M0"), width // MXFP8.group_size)

    def read(start: int, stop: int) -> list[mx.array]:
        values, powers = weight(start, stop), scales(start, stop)
        if ((values & 127) == 127).any() or (powers > MOST_POWER).any():
            raise layer.not_finite()
        return [mx.array(values.view(np.uint32)), mx.array(powers)]

    packing = Packing(MXFP8, read)
    return layer.tensor((layer.rows, width), lambda a, b: dequantize_rows(read(a, b), MXFP8), packing, padded=32)


DEQUANTIZERS: dict[str, Callable[[Layer], Tensor]] = {
    "float8_e4m3fn": _fp8,
    "float8_e5m2": _fp8,
    "int8_tensorwise": _int8,
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    "convrot_w4a4": _w4a4,
    "asym_w4a8_int8": _w4a8,
}


# ---- writing

WRITTEN = ("fp8", "int8")


@dataclass(frozen=True)
class Quantized(Task):
    """A task that writes its tensors, stacked, as one layer in fp8 (one scale) or int8 (a scale per row, rotated)."""

    form: str = "int8"

    @classmethod
    def of(cls, component: str, tensors: Sequence[Tensor], name: str, form: str) -> Quantized:
        """The layer name of tensors (out, in) with equally long rows."""
        rows, width = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
        dtype, scales = ("F8_E4M3", ()) if form == "fp8" else ("I8", (rows, 1))
        layer, mark = name.removesuffix(".weight"), render_mark(form, width)
        slots = Slot(name, dtype, (rows, width)), Slot(f"{layer}.weight_scale", "F32", scales)
        return cls(component, tuple(tensors), (*slots, Slot(f"{layer}.{MARK}", "U8", (len(mark),))), form=form)

    def arrays(self, dtype: str) -> Iterator[mx.array]:
        width = self.tensors[0].shape[1]
        if self.form == "fp8":
            most = mx.array(0.0)
            for rows in self._rows():
                most = mx.maximum(most, mx.abs(rows).max())
                mx.eval(most)
            scale = mx.where(most > 0, most / FP8_MOST, 1.0)
            for rows in self._rows():
                yield mx.to_fp8(rows / scale)
            yield scale
        else:
            scales = []
            for rows in self._rows():
                turned = unrotated(rows, largest_group(width))
                scales.append(mx.maximum(mx.abs(turned).max(axis=1, keepdims=True) / 127, 1e-30))
                yield mx.clip(mx.round(turned / scales[-1]), -128, 127).astype(mx.int8)
            yield mx.concatenate(scales)
        yield mx.array(np.frombuffer(render_mark(self.form, width), np.uint8))

    def _rows(self) -> Iterator[mx.array]:
        for tensor in self.tensors:
            yield from read_rows(tensor, "float32")


def render_mark(form: str, width: int) -> bytes:
    if form == "fp8":
        return json.dumps({"format": "float8_e4m3fn"}).encode()
    settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": largest_group(width)}
    return json.dumps(settings if largest_group(width) > 1 else {"format": "int8_tensorwise"}).encode()


def largest_group(width: int) -> int:
    """The columns to rotate together: 256 as in ComfyUI, or a smaller power of 4 that divides the width."""
    return next(group for group in (256, 64, 16, 4, 1) if width % group == 0)


# ---- bits and orders


def _halves(raw: np.ndarray, high_first: bool = False) -> np.ndarray:
    """(n, k) bytes -> (n, 2k) values 0..15: both halves of each byte."""
    low, high = raw & 15, raw >> 4
    return np.stack([high, low] if high_first else [low, high], axis=-1).reshape(len(raw), -1)


def _blocked(layer: Layer, dtypes: tuple[str, ...], columns: int) -> Callable[[int, int], np.ndarray]:
    """A reader for the bytes of scales, (n, columns), which are stored in the blocks that tensor cores take.

    Source: cuBLAS, "1D block scaling factors layout". A block is 128 rows of 4 columns, stored as 32 rows of 4 pieces.
    """
    down, across = -(-layer.rows // BLOCK_ROWS), -(-columns // BLOCK_COLUMNS)
    whole = (down * BLOCK_ROWS, across * BLOCK_COLUMNS)
    entry = layer.part("weight_scale", dtypes, whole, (prod(whole),))
    blocks = stored_bytes(replace(entry, shape=(down, across * BLOCK_ROWS * BLOCK_COLUMNS)))

    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)
        raw = blocks(first, last).reshape(-1, across, 32, 4, BLOCK_COLUMNS)
        rows = raw.transpose(0, 3, 2, 1, 4).reshape(-1, across * BLOCK_COLUMNS)
        skipped = first * BLOCK_ROWS
        return np.ascontiguousarray(rows[start - skipped : stop - skipped, :columns])

    return read


def unrotated(rows: mx.array, group: int) -> mx.array:
    """rows (n, width) with each group of columns times the regular Hadamard matrix of that order, its own inverse.

    That matrix is a Kronecker power of 1/2 [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], so it is
    applied to 4 columns at a time: half their sum, minus the column opposite. Whole numbers stay exact until the end.
    """
    x, step = rows, 1
    while step < group:
        x = x.reshape(-1, 4, step)
        x = x.sum(1, keepdims=True) - 2 * x[:, ::-1]
        step *= 4
    return x.reshape(rows.shape) * group**-0.5
