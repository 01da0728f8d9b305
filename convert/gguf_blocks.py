"""The blocks of GGUF's quantization types, and their values. Each decoder maps b, blocks (n, bytes), to (n, values).

Source: ggml's ggml-quants.c.
"""

from __future__ import annotations

from base64 import b85decode
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .gguf_grids import STORED_GRIDS


@dataclass(frozen=True)
class BlockKind:
    """A quantization type: the numbers of values and bytes per block, and how to decode blocks.

    decode maps blocks (n, block_bytes) uint8 to (n, values) float32.
    """

    name: str
    values: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def _half(b: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, (n, 1) float32."""
    return b[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(b: np.ndarray) -> np.ndarray:
    """(n, k) bytes -> (n, 2k) values 0..15: all low halves, then all high halves."""
    return np.concatenate([b & 15, b >> 4], axis=1)


def _fifth_bits(b: np.ndarray) -> np.ndarray:
    """4 bytes -> 32 values 0 or 16."""
    return np.unpackbits(b, axis=1, bitorder="little") << 4


def _q4_0(b):
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.int8) - 8)


def _q4_1(b):
    return _half(b, 0) * _nibbles(b[:, 4:]) + _half(b, 2)


def _q5_0(b):
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.int8) - 16)


def _q5_1(b):
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])) + _half(b, 2)


def _q8_0(b):
    return _half(b, 0) * b[:, 2:].view(np.int8)


def _shifted(b: np.ndarray, shifts: tuple[int, ...], mask: int, width: int = 32) -> np.ndarray:
    """(n, k) bytes -> (n, k / width, len(shifts), width): each run of bytes shifted by each of shifts, masked."""
    runs = b.reshape(len(b), -1, 1, width)
    return (runs >> np.array(shifts, np.uint8).reshape(1, 1, -1, 1)) & mask


def _q2_k(b):
    scales, q = b[:, :16], _shifted(b[:, 16:80], (0, 2, 4, 6), 3)
    d, dmin = _half(b, 80) * (scales & 15), _half(b, 82) * (scales >> 4)
    return (d[:, :, None] * q.reshape(-1, 16, 16) - dmin[:, :, None]).reshape(-1, 256)


def _q3_k(b):
    high, q, packed = b[:, :32], _shifted(b[:, 32:96], (0, 2, 4, 6), 3).reshape(-1, 16, 16), b[:, 96:108]
    low = _shifted(packed[:, :8], (0, 4), 15, 8).reshape(-1, 16)
    top = _shifted(packed[:, 8:], (0, 2, 4, 6), 3, 4).reshape(-1, 16)
    scales = (low | (top << 4)).astype(np.int8) - 32
    # if the high bit is clear, 4 is subtracted
    less = (~_shifted(high, tuple(range(8)), 1) & 1).reshape(-1, 16, 16) << 2
    d = _half(b, 108) * scales
    return (d[:, :, None] * (q.astype(np.int8) - less.astype(np.int8))).reshape(-1, 256)


def _scale_min(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, as Q4_K and Q5_K pack them."""
    d, m, md = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([d & 63, (md & 15) | ((d >> 2) & 48)], axis=1)
    return scales, np.concatenate([m & 63, (md >> 4) | ((m >> 2) & 48)], axis=1)


def _q4_k(b):
    scales, minima = _scale_min(b[:, 4:16])
    q = _shifted(b[:, 16:], (0, 4), 15).reshape(-1, 8, 32)
    return ((_half(b, 0) * scales)[:, :, None] * q - (_half(b, 2) * minima)[:, :, None]).reshape(-1, 256)


def _q5_k(b):
    scales, minima = _scale_min(b[:, 4:16])
    high = _shifted(b[:, 16:48], tuple(range(8)), 1).reshape(-1, 8, 32)
    q = _shifted(b[:, 48:], (0, 4), 15).reshape(-1, 8, 32) | (high << 4)
    return ((_half(b, 0) * scales)[:, :, None] * q - (_half(b, 2) * minima)[:, :, None]).reshape(-1, 256)


def _q6_k(b):
    low = _shifted(b[:, :128], (0, 4), 15, 64).reshape(-1, 16, 16)
    high = _shifted(b[:, 128:192], (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    d = _half(b, 208) * b[:, 192:208].view(np.int8)
    return (d[:, :, None] * ((low | (high << 4)).astype(np.int8) - 32)).reshape(-1, 256)


def _bf16(b):
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


# ---- IQ and TQ


@cache
def _grid(name: str) -> np.ndarray:
    """The vectors of an IQ type, (vectors, values in each) float32."""
    vectors, width, values, text = STORED_GRIDS[name]
    bits = (len(values) - 1).bit_length()
    raw = np.unpackbits(np.frombuffer(b85decode(text), np.uint8), bitorder="little").reshape(-1, bits)
    codes = raw @ (1 << np.arange(bits))
    return np.array(values, np.float32)[codes].reshape(vectors, width)


# Seven stored signs, and the eighth, which makes the number of minus signs even.
SIGNS = np.array([x | (x.bit_count() & 1) << 7 for x in range(128)], np.uint8)
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _signed(b: np.ndarray) -> np.ndarray:
    """(...) bytes -> (..., 8) float32: -1 for each set bit, otherwise 1."""
    return 1 - 2 * np.unpackbits(b[..., None], axis=-1, bitorder="little").astype(np.float32)


def _four_bits(b: np.ndarray) -> np.ndarray:
    """(n, k) bytes -> (n, 2k) values 0..15: both halves of each byte, the low one first."""
    return np.stack([b & 15, b >> 4], axis=-1).reshape(len(b), -1)


def _words(b: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(b).view(dtype)


def _scaled_vectors(scale: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(n, k) scales times (n, k, ...) values in as many groups -> (n, 256)."""
    return (scale.reshape(*scale.shape, *[1] * (vectors.ndim - 2)) * vectors).reshape(-1, 256)


def _packed_signs(words: np.ndarray) -> np.ndarray:
    """(n, k) uint32 with four groups of seven signs, from the lowest bit -> (n, k, 4, 8) signs."""
    return _signed(SIGNS[words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127])


def _iq2_xxs(b):
    words = _words(b[:, 2:], "<u4").reshape(len(b), 8, 2)
    scale = _half(b, 0) * (np.float32(0.5) + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    index = _words(words[..., 0], "u1").reshape(len(b), 8, 4)
    return _scaled_vectors(scale, _grid("IQ2_XXS")[index] * _packed_signs(words[..., 1]))


def _iq2_xs(b):
    words, scales = _words(b[:, 2:66], "<u2"), _four_bits(b[:, 66:])
    scale = _half(b, 0) * (np.float32(0.5) + scales) * np.float32(0.25)
    vectors = _grid("IQ2_XS")[words & 511] * _signed(SIGNS[words >> 9])
    return _scaled_vectors(scale, vectors.reshape(len(b), 16, 2, 8))


def _iq2_s(b):
    low, signs, high, scales = b[:, 2:34], b[:, 34:66], b[:, 66:74], _four_bits(b[:, 74:])
    index = low | _shifted(high, (0, 2, 4, 6), 3, 1).reshape(len(b), -1).astype(np.uint16) << 8
    scale = _half(b, 0) * (np.float32(0.5) + scales) * np.float32(0.25)
    return _scaled_vectors(scale, (_grid("IQ2_S")[index] * _signed(signs)).reshape(len(b), 16, 2, 8))


def _iq3_xxs(b):
    index, words = b[:, 2:66], _words(b[:, 66:], "<u4")
    scale = _half(b, 0) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return _scaled_vectors(scale, _grid("IQ3_XXS")[index].reshape(len(b), 8, 4, 8) * _packed_signs(words))


def _iq3_s(b):
    low, high, signs, scales = b[:, 2:66], b[:, 66:74], b[:, 74:106], _four_bits(b[:, 106:])
    index = low | np.unpackbits(high, axis=1, bitorder="little").astype(np.uint16) << 8
    scale = _half(b, 0) * (1 + 2 * scales)
    vectors = _grid("IQ3_S")[index].reshape(len(b), 32, 8) * _signed(signs)
    return _scaled_vectors(scale, vectors.reshape(len(b), 8, 4, 8))


def _iq1(scale: np.ndarray, low: np.ndarray, high: np.ndarray, less: np.ndarray) -> np.ndarray:
    """Vectors of -1, 0 and 1, plus an eighth, or minus an eighth where `less` is set."""
    delta = np.where(less, np.float32(-0.125), np.float32(0.125))
    vectors = _grid("IQ1_S")[low | high.astype(np.uint16) << 8]
    return (scale[..., None] * (vectors + delta[..., None])).reshape(-1, 256)


def _iq1_s(b):
    words = _words(b[:, 34:], "<u2")
    scale = np.repeat(_half(b, 0) * (2 * (words >> 12 & 7) + 1), 4, axis=1)
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(b), -1)
    return _iq1(scale, b[:, 2:34], high, np.repeat(words & 0x8000 > 0, 4, axis=1))


def _iq1_m(b):
    # the only type with its float16 in parts: the top four bits of each word of scales
    words, high = _words(b[:, 48:], "<u2"), _four_bits(b[:, 32:48])
    parts = words >> 12
    whole = parts[:, 0] | parts[:, 1] << 4 | parts[:, 2] << 8 | parts[:, 3] << 12
    d = whole.astype(np.uint16).view(np.float16).astype(np.float32)[:, None]
    scales = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(b), -1)
    return _iq1(np.repeat(d * (2 * scales + 1), 2, axis=1), b[:, :32], high & 7, high & 8 > 0)


def _iq4_nl(b):
    return _half(b, 0) * IQ4_VALUES[_nibbles(b[:, 2:])]


def _iq4_xs(b):
    high = _words(b[:, 2:4], "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (_four_bits(b[:, 4:8]) | high.astype(np.uint8) << 4).astype(np.int8) - 32
    values = IQ4_VALUES[_shifted(b[:, 8:], (0, 4), 15, 16)]
    return _scaled_vectors(_half(b, 0) * scales.astype(np.float32), values.reshape(len(b), 8, 32))


def _digits(b: np.ndarray, width: int, digits: int) -> np.ndarray:
    """(n, k) bytes of base-3 digits -> (n, k * digits) values 0 to 2: the first digit of each run, and so on."""
    powers = np.array([1, 3, 9, 27, 81][:digits], np.uint8).reshape(1, 1, -1, 1)
    return (b.reshape(len(b), -1, 1, width) * powers).reshape(len(b), -1).astype(np.uint16) * 3 >> 8


def _tq1_0(b):
    digits = [_digits(b[:, :32], 32, 5), _digits(b[:, 32:48], 16, 5), _digits(b[:, 48:52], 4, 4)]
    return _half(b, 52) * (np.concatenate(digits, axis=1).astype(np.float32) - 1)


def _tq2_0(b):
    return _half(b, 64) * (_shifted(b[:, :64], (0, 2, 4, 6), 3).reshape(len(b), -1).astype(np.float32) - 1)


BLOCK_KINDS = {
    0: BlockKind("F32", 1, 4, lambda b: b.view("<f4")),
    1: BlockKind("F16", 1, 2, lambda b: b.view("<f2").astype(np.float32)),
    2: BlockKind("Q4_0", 32, 18, _q4_0),
    3: BlockKind("Q4_1", 32, 20, _q4_1),
    6: BlockKind("Q5_0", 32, 22, _q5_0),
    7: BlockKind("Q5_1", 32, 24, _q5_1),
    8: BlockKind("Q8_0", 32, 34, _q8_0),
    10: BlockKind("Q2_K", 256, 84, _q2_k),
    11: BlockKind("Q3_K", 256, 110, _q3_k),
    12: BlockKind("Q4_K", 256, 144, _q4_k),
    13: BlockKind("Q5_K", 256, 176, _q5_k),
    14: BlockKind("Q6_K", 256, 210, _q6_k),
    16: BlockKind("IQ2_XXS", 256, 66, _iq2_xxs),
    17: BlockKind("IQ2_XS", 256, 74, _iq2_xs),
    18: BlockKind("IQ3_XXS", 256, 98, _iq3_xxs),
    19: BlockKind("IQ1_S", 256, 50, _iq1_s),
    20: BlockKind("IQ4_NL", 32, 18, _iq4_nl),
    21: BlockKind("IQ3_S", 256, 110, _iq3_s),
    22: BlockKind("IQ2_S", 256, 82, _iq2_s),
    23: BlockKind("IQ4_XS", 256, 136, _iq4_xs),
    29: BlockKind("IQ1_M", 256, 56, _iq1_m),
    30: BlockKind("BF16", 1, 2, _bf16),
    34: BlockKind("TQ1_0", 256, 54, _tq1_0),
    35: BlockKind("TQ2_0", 256, 66, _tq2_0),
}
# Types that are not supported, by number; named in errors.
OTHER_BLOCK_KINDS = {
    **{9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 39: "MXFP4", 40: "NVFP4"},
    **{41: "Q1_0"},
}
