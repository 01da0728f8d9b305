"""From a name to checked weights, and what is kept of them: in memory, and on this machine."""

from ..moved import moved

__getattr__ = moved(__name__, {"weights.checkpoint": ("open_checkpoint",), "weights.hub": ("resolve",)})
