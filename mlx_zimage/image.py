"""Moved to mlx_zimage.images."""

from .moved import moved

__getattr__ = moved(
    __name__,
    {
        "images.codec": ("to_uint8", "to_pil", "to_png", "enlarge", "read_pixels"),
        "images.metadata": ("FORMATS",),
        "inputs": ("read_latents",),
        "images.files": ("check_output", "make_folder", "check_folder", "save"),
    },
)
