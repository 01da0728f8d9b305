"""Names of Z-Image's tensors in ComfyUI, LDM, GGUF (llama.cpp), mflux and mlx-vlm files -> diffusers' names.

Each naming scheme is a table of anchored patterns. They can all be tried in turn on any name, since none matches the
result of another; so a file that mixes schemes is read like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError
from ..variants import TURBO

# A pattern for the beginning of a name, and its replacement.
Row = tuple[str, str | Callable[[re.Match[str]], str]]

# The prefix of each network's names in an all-in-one checkpoint.
PREFIXES = {
    "transformer": re.compile(r"(model\.)?diffusion_model\."),
    "text_encoder": re.compile(r"text_encoders\.[^.]+\.(transformer\.)?|cond_stage_model\.([^.]+\.)?transformer\."),
    "vae": re.compile(r"first_stage_model\.|vae\."),
}
# How each network's names begin when they have no prefix; the first network that matches owns the tensor.
OWN_NAMES = {
    "text_encoder": re.compile(
        r"(model\.)?(layers\.\d+\.(self_attn|mlp|input_layernorm|post_attention_layernorm)\.|embed_tokens\.|norm\.weight)"
        r"|lm_head\.|blk\.\d+\.|token_embd\.|output(_norm)?\.weight|rotary_emb\."
    ),
    "transformer": re.compile(
        r"(layers|noise_refiner|context_refiner)\.\d+\.|(all_)?(x_embedder|final_layer)\."
        r"|(t|cap)_embedder\.|(x|cap)_pad_token|norm_final\.|rope_embedder\."
    ),
    "vae": re.compile(r"(encoder|decoder)\."),
}
# Not weights of these networks: buffers that they compute themselves, ComfyUI's markers, a norm that no block uses.
DROPPED = re.compile(r"norm_final\.weight|rotary_emb\.inv_freq|rope_embedder\.freqs_cis\..*|scaled_fp8|logit_scale")

# Names of tensors in a LoRA (in any trainer's spelling) and in a ControlNet.
FOREIGN = {
    "LoRA": re.compile(r"(^|[._])(lora|lokr|hada|oft|boft|dora)_|\.lora\.|\.(alpha|magnitude|diff|diff_b)$"),
    "ControlNet": re.compile(r"(^|\.)control(net)?_"),
}

TWINFLOW = re.compile(r"(^|\.)t_embedder_2\.")

RENAMED: dict[str, list[Row]] = {
    "transformer": [
        # ComfyUI and the original code
        (r"x_embedder\.", "all_x_embedder.2-1."),
        (r"final_layer\.", "all_final_layer.2-1."),
        (r"(.*\.attention)\.out\.", r"\1.to_out.0."),
        (r"(.*\.attention)\.(q|k)_norm\.", r"\1.norm_\2."),
        # mflux and mlx-vlm
        (r"t_embedder\.linear1\.", "t_embedder.mlp.0."),
        (r"t_embedder\.linear2\.", "t_embedder.mlp.2."),
        (r"all_final_layer\.2-1\.adaLN_modulation\.0\.", "all_final_layer.2-1.adaLN_modulation.1."),
    ],
    "text_encoder": [
        # llama.cpp
        (r"token_embd\.", "model.embed_tokens."),
        (r"output_norm\.", "model.norm."),
        (r"output\.", "lm_head."),
        (r"blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
        (r"blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (r"blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
        (r"blk\.(\d+)\.attn_(q|k)_norm\.", r"model.layers.\1.self_attn.\2_norm."),
        (r"blk\.(\d+)\.attn_(q|k|v)\.", r"model.layers.\1.self_attn.\2_proj."),
        (r"blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
        # saved from the bare model
        (r"(layers|embed_tokens|norm)\.", r"model.\1."),
    ],
    "vae": [
        # LDM, which numbers the decoder's levels from the other end
        (r"(.*)\.nin_shortcut\.", r"\1.conv_shortcut."),
        (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"decoder\.up\.([0-3])\.block\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.resnets."),
        (r"decoder\.up\.([0-3])\.upsample\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.upsamplers.0."),
        (r"(encoder|decoder)\.mid\.block_(1|2)\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}."),
        (r"(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
        (r"(encoder|decoder)\.mid\.attn_1\.(q|k|v)\.", r"\1.mid_block.attentions.0.to_\2."),
        (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
        (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        # older versions of diffusers
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.(q|k|v)(uery|ey|alue)\.", r"\1.mid_block.attentions.0.to_\2."),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.proj_attn\.", r"\1.mid_block.attentions.0.to_out.0."),
        # mflux
        (r"(encoder|decoder)\.(conv_in|conv_out)\.conv(2d)?\.", r"\1.\2."),
        (r"(encoder|decoder)\.conv_norm_out\.norm\.", r"\1.conv_norm_out."),
        # mlx-vlm
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.(?!0\.)", r"\1.mid_block.attentions.0.to_out.0."),
    ],
}
# Back to ComfyUI's names; the VAE's are those of LDM.
TO_COMFYUI: dict[str, list[Row]] = {
    "transformer": [
        (r"all_x_embedder\.2-1\.", "x_embedder."),
        (r"all_final_layer\.2-1\.", "final_layer."),
        (r"(.*\.attention)\.to_out\.0\.", r"\1.out."),
        (r"(.*\.attention)\.norm_(q|k)\.", r"\1.\2_norm."),
        (r"(.*\.attention)\.to_[qkv]\.", r"\1.qkv."),
    ],
    "text_encoder": [],
    "vae": [
        (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"decoder\.up_blocks\.([0-3])\.resnets\.", lambda m: f"decoder.up.{3 - int(m[1])}.block."),
        (r"decoder\.up_blocks\.([0-3])\.upsamplers\.0\.", lambda m: f"decoder.up.{3 - int(m[1])}.upsample."),
        (r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.", lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}."),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0\.", r"\1.mid.attn_1.proj_out."),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_(q|k|v)\.", r"\1.mid.attn_1.\2."),
        (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
        (r"(.*)\.conv_shortcut\.", r"\1.nin_shortcut."),
    ],
}
COMFYUI_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "vae": "vae.",
}
FUSED = re.compile(r"(.*\.attention)\.qkv\.(weight|bias)(?:\.(1|2))?")


@dataclass(frozen=True)
class Place:
    """A tensor of a network inside a stored tensor: piece `part` when the rows are cut into `parts` equal pieces."""

    component: str
    name: str
    part: int = 0
    parts: int = 1


def places(name: str, beside: Container[str] = ()) -> list[Place] | None:
    """The tensors that a stored tensor holds: several if it is fused, none if it is not a weight; None if unknown.

    `beside` has the names stored with it.
    """
    component, own = _split(name)
    if DROPPED.fullmatch(own):
        return []
    if component is None:
        return None
    own = _rename(own, RENAMED[component])
    fused = FUSED.fullmatch(own) if component == "transformer" else None
    # stable-diffusion.cpp writes separate queries, keys and values as qkv.weight, qkv.weight.1 and qkv.weight.2.
    if fused and (fused[3] or f"{name}.1" in beside):
        return [Place(component, f"{fused[1]}.to_{'qkv'[int(fused[3] or 0)]}.{fused[2]}")]
    if fused:
        return [Place(component, f"{fused[1]}.to_{x}.{fused[2]}", i, 3) for i, x in enumerate("qkv")]
    return [Place(component, own)]


def arrange(names: Collection[str], label: object) -> dict[str, dict[str, tuple[str, Place]]]:
    """The networks that stored tensors make up: by network and name, the stored tensor that holds it, and where.

    Raises CheckpointError if a tensor is unknown, or if one is stored twice; label is the file or folder.
    """
    check_sampler(names, label)
    if kind := foreign_kind(names):
        use = "apply it with --lora (load_lora in Python)" if kind == "LoRA" else "expected the weights of Z-Image"
        raise CheckpointError(f"{label} is a {kind}, not a model; {use}")
    found: dict[str, dict[str, tuple[str, Place]]] = {}
    unknown = []
    for stored in names:
        held = places(stored, names)
        if held is None:
            unknown.append(stored)
        for place in held or ():
            own = found.setdefault(place.component, {})
            if place.name in own:
                raise CheckpointError(f"{label}: {place.component} {place.name} is stored twice, once as {stored}")
            own[place.name] = stored, place
    if unknown:
        raise CheckpointError(f"{label}: not part of Z-Image: {some(unknown)}; is this another model?")
    if not found:
        raise CheckpointError(f"{label} contains no weights; give a file with the weights of Z-Image")
    return found


def networks_of(names: Collection[str]) -> list[str]:
    """The networks that stored tensors belong to, quantized or not."""
    return list(dict.fromkeys(place.component for name in names for place in places(name) or ()))


def check_sampler(names: Collection[str], label: object) -> None:
    """Refuse TwinFlow, whose names are otherwise those of Z-Image."""
    if any(TWINFLOW.search(name) for name in names):
        raise CheckpointError(
            f"{label} is TwinFlow, which has a second time embedder and needs a sampler of its own; use Z-Image-Turbo, "
            f"which takes {TURBO.steps} steps"
        )


def some(names: Sequence[str]) -> str:
    """The first five names, for an error."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def foreign_kind(names: Collection[str]) -> str | None:
    """ "LoRA" or "ControlNet" if most of the names belong to one, otherwise None."""
    most = len(names) // 2
    return next((kind for kind, own in FOREIGN.items() if sum(bool(own.search(name)) for name in names) > most), None)


def comfyui_name(component: str, name: str) -> str:
    """ComfyUI's name, without prefix, for a diffusers tensor; queries, keys and values share one."""
    return _rename(name, TO_COMFYUI[component])


def _rename(name: str, table: list[Row]) -> str:
    for pattern, new in table:
        name = re.sub(rf"\A{pattern}", new, name)
    return name


def _split(name: str) -> tuple[str | None, str]:
    """The network that a name belongs to, and the name without its prefix."""
    for component, prefix in PREFIXES.items():
        if found := prefix.match(name):
            return component, name[found.end() :]
    return next((component for component, own in OWN_NAMES.items() if own.match(name)), None), name
