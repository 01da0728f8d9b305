"""Moved to mlx_zimage.convert.layout."""

from ..moved import moved

__getattr__ = moved(__name__, {}, {"plan_folder": "convert.layout.lay_out_folder"})
