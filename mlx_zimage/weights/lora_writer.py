"""Writes a LoRA with the names that ComfyUI or diffusers expects; both use diffusers' names of layers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from .. import atomic
from ..errors import OutputError, RequestError
from .deltas import Delta, Dense, DoRA, Hadamard, Kronecker, LowRank, Replacement
from .lora import HEADER_CONFIG, Lora

PREFIXES = {
    "comfyui": {"transformer": "diffusion_model.", "text_encoder": "text_encoders.qwen3_4b.transformer."},
    "diffusers": {"transformer": "transformer."},
}


def write_lora(lora: Lora, path: Path, to: str) -> None:
    """Write a LoRA to a safetensors file for "comfyui" or "diffusers", with its metadata.

    diffusers reads low-rank factors of the transformer only; RequestError if the LoRA has anything else. OutputError if
    the file cannot be written.
    """
    tensors: dict[str, mx.array] = {}
    for network, deltas in lora.deltas.items():
        if network not in PREFIXES[to]:
            raise RequestError(f"{to} cannot read the text encoder's part of {lora.file}; convert it for comfyui")
        for name, delta in deltas.items():
            layer, _, kind = name.rpartition(".")
            path_in_file = PREFIXES[to][network] + (layer if kind in ("weight", "bias") else name)
            if to == "diffusers" and not isinstance(delta, LowRank):
                raise RequestError(
                    f"diffusers cannot read {name} of {lora.file}: expected low-rank factors but got "
                    f"{type(delta).__name__}; convert it for comfyui"
                )
            own = _folded(delta) if to == "diffusers" and isinstance(delta, LowRank) else _parts(delta, kind == "bias")
            tensors |= {f"{path_in_file}.{part}": array for part, array in own.items()}
    # The tensors now include the scales.
    metadata = {key: value for key, value in lora.metadata.items() if key != HEADER_CONFIG} | {"format": "pt"}
    try:
        atomic.write(path, lambda file: mx.save_safetensors(str(file), tensors, metadata))
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}") from error


def _folded(delta: LowRank) -> dict[str, mx.array]:
    """Factors without an alpha, as PEFT names them."""
    up = (delta.scale * delta.up.astype(mx.float32)).astype(delta.up.dtype)
    return {"lora_A.weight": delta.down, "lora_B.weight": up}


def _parts(delta: Delta, bias: bool) -> dict[str, mx.array]:
    """The tensors that ComfyUI reads for a difference, by the ends of their keys."""
    if isinstance(delta, DoRA):
        return {**_parts(delta.inner, bias), "dora_scale": delta.magnitude}
    if isinstance(delta, LowRank):
        return {"lora_A.weight": delta.down, "lora_B.weight": delta.up, "alpha": mx.array(delta.scale * delta.rank)}
    if isinstance(delta, Hadamard):
        names = ("w1_a", "w1_b", "w2_a", "w2_b")
        factors = {f"hada_{name}": getattr(delta, name) for name in names}
        return {**factors, "alpha": mx.array(delta.scale * len(delta.w1_b))}
    if isinstance(delta, Kronecker):
        return {"lokr_w1": (delta.scale * delta.w1.astype(mx.float32)).astype(delta.w1.dtype), "lokr_w2": delta.w2}
    if isinstance(delta, Replacement):
        return {"set_weight": delta.value}
    assert isinstance(delta, Dense)
    return {"diff_b" if bias else "diff": delta.diff}
