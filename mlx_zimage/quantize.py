"""Moved: quantization modes to mlx_zimage.quantization, the choice of layers to mlx_zimage.weights.quantize."""

from .moved import moved

__getattr__ = moved(
    __name__,
    {"quantization": ("MODES", "Quantization", "default_quantization"), "weights.quantize": ("QUANTIZED",)},
    {"recipe": "weights.quantize.tensor_quantization"},
)
