"""From a model's name to checked weights: finding, opening, reading, caching."""

from ..moved import moved

__getattr__ = moved(__name__, {"weights.checkpoint": ("open_checkpoint", "resolve"), "weights.hub": ("POCKET",)})
