"""The LoRA that training writes, and the state that it resumes from.

A LoRA has ai-toolkit's keys, which ComfyUI, diffusers, mflux and sd.cpp read, too. It is in bfloat16, and has no alpha:
`up` includes the scale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from .. import atomic
from ..errors import CheckpointError, OutputError, RequestError, ZImageError
from ..models.transformer import TransformerConfig
from ..untrusted import parse_json
from ..version import __version__
from ..weights import headers
from ..weights.deltas import LowRank
from ..weights.store import digest
from .factors import Factors, arrays_of, deltas
from .optimizer import AdamW
from .settings import Settings

PARTS = ("factors", "first", "second")
BASE = "mlx_zimage.base_sha256"  # in a LoRA's metadata
FREE = ("steps",)  # what may be changed when a run is resumed
# what a run knows only by a checksum
BY_CHECKSUM = {"base_sha256": "model", "adapter": "adapter", "dataset": "dataset"}
# of options that are not named as in Python
OPTION_NAMES = {"extras": "--also (extras in Python)", "warm_up": "--warm-up (warm_up in Python)"}


def check_name(output: Path) -> None:
    """RequestError unless a LoRA can be written under this name."""
    if output.suffix != ".safetensors":
        raise RequestError(f"the output must be a .safetensors file, got {output}")


def is_ours(path: Path) -> bool:
    """Whether training wrote this file."""
    try:
        return BASE in headers.read(path)[1]
    except (KeyError, TypeError, ValueError):
        return False


def stored(factors: Factors, scale: float, config: TransformerConfig) -> dict[str, LowRank]:
    """The differences that a LoRA of these factors contains."""
    return {
        name: LowRank(delta.down.astype(mx.bfloat16), delta.up.astype(mx.bfloat16))
        for name, delta in deltas(factors, scale, config).items()
    }


def write_factors(
    path: Path, factors: Factors, settings: Settings, config: TransformerConfig, model: str, run: Mapping[str, object]
) -> None:
    """Write factors as a LoRA; model and `run`, as for `write_state`, say what it was trained on."""
    tensors = {}
    for name, delta in stored(factors, settings.scale, config).items():
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = delta.down
        tensors[f"{layer}.lora_B.weight"] = delta.up
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.title": path.stem,
        "modelspec.implementation": f"mlx-zimage {__version__}",
        "ss_base_model_version": "zimage",
        "ss_network_dim": str(settings.rank),
        "mlx_zimage.base": model,
        BASE: str(run["base_sha256"]),
        "mlx_zimage.settings": json.dumps(
            {**settings.to_dict(), "dtype": _shown(run["dtype"]), "adapter_sha256": run["adapter"]}, ensure_ascii=False
        ),
    }
    if settings.trigger is not None:
        metadata["modelspec.trigger_phrase"] = settings.trigger
    _write(path, tensors, metadata)


def write_state(path: Path, factors: Factors, optimizer: AdamW, run: Mapping[str, object]) -> None:
    """Write everything that a run needs to be resumed exactly; `run` identifies it."""
    trees = (factors, optimizer.first, optimizer.second)
    tensors = {
        f"{part}/{block}/{layer}/{name}": array
        for part, tree in zip(PARTS, trees, strict=True)
        for block, layers in tree.items()
        for layer, own in layers.items()
        for name, array in own.items()
    }
    metadata = {"format": "mlx", "step": str(optimizer.step), "run": json.dumps(run)}
    _write(path, tensors, metadata | {"sha256": _checksum(tensors, metadata)})


def read_state(path: Path, new: Factors, run: Mapping[str, object]) -> tuple[Factors, AdamW] | None:
    """What `write_state` wrote, if the file exists; RequestError if it belongs to another run.

    `new` has the factors that the run starts with. What is read has their order, so that sums are the same.
    """
    if not path.exists():
        return None
    try:
        _, metadata, _ = headers.read(path)
        other, step = parse_json(metadata["run"]), int(metadata["step"])
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        if "sha256" not in metadata:
            raise ValueError("it has no checksum, perhaps because an older version wrote it")
        if metadata["sha256"] != _checksum(arrays, metadata):
            raise ValueError("its checksum differs")
        _check_run(path, other, run)
        factors, first, second = (
            {
                block: {
                    layer: {name: arrays[f"{part}/{block}/{layer}/{name}"] for name in own}
                    for layer, own in layers.items()
                }
                for block, layers in new.items()
            }
            for part in PARTS
        )
        for tree in (factors, first, second):
            if [array.shape for array in arrays_of(tree)] != [array.shape for array in arrays_of(new)]:
                raise ValueError("its factors do not have the expected shapes")
        mx.eval(factors, first, second)
    except RequestError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); to start again, delete {path.parent}, and the LoRA next to it if it exists"
        ) from error
    return factors, AdamW(first, second, step)


def _checksum(tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of a state's content."""
    content = [f"{name} {tensors[name].dtype} {digest(tensors[name])}" for name in sorted(tensors)]
    return hashlib.sha256("\n".join([*content, metadata["step"], metadata["run"]]).encode()).hexdigest()


def _check_run(path: Path, other: Mapping[str, object], run: Mapping[str, object]) -> None:
    for key, value in run.items():
        if other.get(key) == value:
            continue
        if key in BY_CHECKSUM:
            name = BY_CHECKSUM[key]
            differs = f"the {name} differs from that of the run in {path.parent}"
        else:
            name = OPTION_NAMES.get(key, key)
            differs = f"{name} is {_shown(value)}, but {_shown(other.get(key))} for the run in {path.parent}"
        raise RequestError(f"{differs}; use the same {name} to resume it, or another output to start a new run")


def _shown(value: object) -> str:
    if value in (None, []):
        return "not set"
    return ", ".join(value) if isinstance(value, list) else str(value).removeprefix("mlx.core.")


def _write(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    mx.eval(tensors)  # so that no error of the GPU is taken for one of the disk
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, lambda file: mx.save_safetensors(str(file), tensors, metadata))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OutputError if this file cannot be written."""
    try:
        yield
    except ZImageError:
        raise
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"could not write {path}: {reason}; fix that, and run the same command again") from error
