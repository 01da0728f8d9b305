"""Moved: the modes of quantization to mlx_zimage.quantization, the recipe to mlx_zimage.weights.quantize."""

from .moved import moved

__getattr__ = moved(
    __name__,
    {"quantization": ("MODES", "Quantization", "default_quantization"), "weights.quantize": ("QUANTIZED",)},
)
