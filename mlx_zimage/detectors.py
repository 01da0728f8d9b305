"""Straight lines, poses and depth of a photo as control images, by the libraries of the extra `control`.

OpenCV finds lines. ONNX Runtime runs the networks for poses and depth, on the CPU and outside the memory budget; their
files are downloaded when they are first needed, and used only if their checksums are those listed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .errors import CheckpointError, RequestError
from .images.poses import Network, normalized, pose
from .weights.hub import fetch_pinned, pinned
from .weights.manifest import sha256

LIBRARIES = {
    "lines": ("cv2", "OpenCV"),
    "pose": ("onnxruntime", "ONNX Runtime"),
    "depth": ("onnxruntime", "ONNX Runtime"),
}
SHORTEST = 1 / 20  # of the shorter side: shorter lines are texture
DRAWN_AT = 512  # pixels of the shorter side at which lines are a pixel wide
DEPTH_SIDE, DEPTH_PATCH = 518, 14  # pixels of the shorter side that the network for depth sees, and of its patches
DEPTH_LONGEST = 4 * DEPTH_SIDE


@dataclass(frozen=True)
class ModelFile:
    """A network's file at a commit of a Hugging Face repository."""

    repository: str
    revision: str
    name: str
    nbytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.repository}:{self.name}"

    def fetch(self) -> Path:
        """Its path in the hub's cache, downloaded if it is missing; CheckpointError if its checksum differs."""
        path = fetch_pinned(self.repository, self.revision, self.name)
        if sha256(path) != self.sha256:
            raise CheckpointError(
                # not the link to it in the hub's cache: if only that is deleted, the hub links to the same file again
                f"{path.resolve()} is damaged: its SHA-256 is not that of {self}; delete it to download it again"
            )
        return path


MODELS = {
    "pose": (
        ModelFile(
            "yzd-v/DWPose", "1a7144101628d69ee7a3768d1ee3a094070dc388", "yolox_l.onnx", 216_746_733,
            "7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
        ),
        ModelFile(
            "yzd-v/DWPose", "1a7144101628d69ee7a3768d1ee3a094070dc388", "dw-ll_ucoco_384.onnx", 134_399_116,
            "724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
        ),
    ),
    "depth": (
        ModelFile(
            "onnx-community/depth-anything-v2-small", "4472b7362082ad9968fee890ca0f1e5aca36b93d", "onnx/model.onnx",
            99_060_839, "afb6a5c28f3b6bf1618c6e43f02073ef9dfdc70e937502d51603e57b0a1df10c",
        ),
    ),
}  # fmt: skip


def is_installed(kind: str) -> bool:
    """Whether the library that this kind of control image needs is installed; most kinds need none."""
    return kind not in LIBRARIES or find_spec(LIBRARIES[kind][0]) is not None


def check_library(kind: str | None) -> None:
    """RequestError if this kind of control image needs a library that is not installed."""
    if kind is not None and not is_installed(kind):
        raise RequestError(
            f"making a control image of kind {kind} from a photo needs {LIBRARIES[kind][1]}: pip install "
            f"'mlx-zimage[control]', or give a control image that is ready to use"
        )


def is_downloaded(kind: str | None) -> bool:
    """Whether this kind of control image can be made without downloading anything."""
    return all(pinned(model.repository, model.revision, model.name) for model in MODELS.get(kind or "", ()))


def detected(pixels: np.ndarray, kind: str) -> np.ndarray:
    """An image (H, W, 3) uint8 as the control image of a kind in LIBRARIES: (H, W, 3) uint8. The last four are cached.

    RequestError if nothing is found in it.
    """
    height, width, _ = pixels.shape
    return np.frombuffer(_detected(pixels.tobytes(), height, width, kind), np.uint8).reshape(pixels.shape)


@lru_cache(maxsize=4)
def _detected(content: bytes, height: int, width: int, kind: str) -> bytes:
    pixels = np.frombuffer(content, np.uint8).reshape(height, width, 3)
    if kind == "lines":
        made = lines(pixels)
    elif kind == "depth":
        made = depth(pixels, *networks(kind))
    else:
        made = pose(pixels, *networks(kind))
    if made is None:
        raise RequestError(
            f"this photo shows nothing that a control image of kind {kind} could be made from; give another photo, or "
            "a control image that is ready to use"
        )
    return made.tobytes()


def networks(kind: str) -> list[Network]:
    """The networks of a kind in MODELS, downloaded if needed."""
    return [network(file) for file in [model.fetch() for model in MODELS[kind]]]


def network(file: Path) -> Network:
    """An ONNX network with one input, float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: session.run(None, {name: np.ascontiguousarray(values, np.float32)})


def lines(pixels: np.ndarray) -> np.ndarray | None:
    """The straight lines of an image, white on black; None if there are none."""
    import cv2

    height, width, _ = pixels.shape
    found = cv2.createLineSegmentDetector().detect(np.asarray(Image.fromarray(pixels).convert("L")))[0]
    ends = np.zeros((0, 4)) if found is None else np.reshape(found, (-1, 4))
    shorter = min(width, height)
    long = ends[np.hypot(ends[:, 2] - ends[:, 0], ends[:, 3] - ends[:, 1]) >= SHORTEST * shorter]
    if not len(long):
        return None
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for line in long.tolist():
        draw.line(line, fill=(255, 255, 255), width=max(1, round(shorter / DRAWN_AT)))
    return np.asarray(image)


def depth(pixels: np.ndarray, estimator: Network) -> np.ndarray | None:
    """How near each pixel is, from black to white; None if all are at the same distance.

    Source: Depth Anything V2's preprocessing: the shorter side is DEPTH_SIDE pixels, and both sides are a whole number
    of patches.
    """
    height, width, _ = pixels.shape
    scale = min(DEPTH_SIDE / min(width, height), DEPTH_LONGEST / max(width, height))
    across, down = (max(1, round(side * scale / DEPTH_PATCH)) * DEPTH_PATCH for side in (width, height))
    seen = Image.fromarray(pixels).resize((across, down), Image.Resampling.BICUBIC)
    near = np.reshape(estimator(normalized(seen))[0], (down, across))
    least, most = near.min(), near.max()
    if not most > least:
        return None
    grey = Image.fromarray(((near - least) * (255 / (most - least))).round().astype(np.uint8))
    return np.repeat(np.asarray(grey.resize((width, height), Image.Resampling.BICUBIC))[..., None], 3, axis=-1)
