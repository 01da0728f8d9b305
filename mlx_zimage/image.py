"""Pixels in and out of files. With metadata.py the only place that knows PIL."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from .errors import NumericsError, RequestError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def to_uint8(pixels: mx.array) -> np.ndarray:
    """Decoded pixels (H, W, 3), nominally in [-1, 1], to uint8 as diffusers rounds them."""
    if not mx.isfinite(pixels).all().item():
        raise NumericsError("the decoded picture is not finite; nothing was drawn. Try dtype float32")
    unit = np.clip(np.array(pixels, dtype=np.float32) / 2 + 0.5, 0, 1)
    return (unit * 255).round().astype(np.uint8)


def check_output(path: Path) -> None:
    """Refuse, before any work, a picture file that could not be written."""
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"the picture's name must end in {', '.join(FORMATS)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise RequestError(f"there is no folder {path.parent} for {path.name}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"the folder {path.parent} cannot be written to; choose another for {path.name}")


def save(pixels: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 to path in the format its ending names: aside first, then renamed."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as stream:
            quality = {} if path.suffix.lower() == ".png" else {"quality": 95}
            Image.fromarray(pixels).save(stream, format=FORMATS[path.suffix.lower()], **quality)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
