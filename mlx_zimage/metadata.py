"""Moved to mlx_zimage.images.metadata."""

from .moved import moved

__getattr__ = moved(
    __name__,
    {
        "images.metadata": ("Origin", "parameters", "save_options", "read_origin", "AI_MADE"),
        "weights.checkpoint": ("fingerprint",),
    },
)
