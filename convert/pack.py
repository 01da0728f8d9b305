"""Moved to mlx_zimage.convert.rounding."""

from ..moved import moved

__getattr__ = moved(
    __name__, {}, {"pack": "convert.rounding.quantize_rows", "unpack": "convert.rounding.dequantize_rows"}
)
