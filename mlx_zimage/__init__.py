"""Z-Image-Turbo on Apple Silicon: text to pictures through MLX.

from mlx_zimage import ZImagePipeline

pipe = ZImagePipeline.from_pretrained("pocket")
pipe("a red circle on a blue background", seed=1).images[0].save("circle.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "ZImagePipeline": "pipeline",
    "Generated": "pipeline",
    "GenerateRequest": "request",
    "Step": "sampling",
    "PromptTruncated": "tokenizer",
    "ZImageError": "errors",
    "RequestError": "errors",
    "LockedError": "errors",
    "MemoryBudgetError": "errors",
    "ModelNotFoundError": "errors",
    "CheckpointError": "errors",
    "NumericsError": "errors",
    "OutputError": "errors",
}
__all__ = [
    "CheckpointError",
    "GenerateRequest",
    "Generated",
    "LockedError",
    "MemoryBudgetError",
    "ModelNotFoundError",
    "NumericsError",
    "OutputError",
    "PromptTruncated",
    "RequestError",
    "Step",
    "ZImageError",
    "ZImagePipeline",
    "__version__",
]

if TYPE_CHECKING:
    from .errors import (
        CheckpointError,
        LockedError,
        MemoryBudgetError,
        ModelNotFoundError,
        NumericsError,
        OutputError,
        RequestError,
        ZImageError,
    )
    from .pipeline import Generated, ZImagePipeline
    from .request import GenerateRequest
    from .sampling import Step
    from .tokenizer import PromptTruncated


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
