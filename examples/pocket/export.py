"""Writes trained modules as a checkpoint in the official diffusers folder layout, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import SCHEDULE_SHIFT, TEXT_ENCODER
from safetensors.torch import save_file
from tokenizer import END, IM_END

DIFFUSERS_VERSION = "0.36.0.dev0"  # as in the official files


def export(vae, encoder, transformer, folder: Path) -> None:
    """Everything but tokenizer/, which `train_tokenizer` writes."""
    folder = Path(folder)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.to(torch.bfloat16).contiguous() for name, weight in encoder.state_dict().items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    _write(
        folder / "text_encoder" / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": END,
            "eos_token_id": IM_END,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 40960,
            "max_window_layers": TEXT_ENCODER["num_hidden_layers"],
            "model_type": "qwen3",
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            **TEXT_ENCODER,
        },
    )
    _write(
        folder / "text_encoder" / "generation_config.json",
        {
            "bos_token_id": END,
            "eos_token_id": [IM_END, END],
            "pad_token_id": END,
            "do_sample": True,
        },
    )
    _write(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": DIFFUSERS_VERSION,
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": False,
            "shift": SCHEDULE_SHIFT,
        },
    )
    _write(
        folder / "model_index.json",
        {
            "_class_name": "ZImagePipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors lets only the owner read the file


def folder_size(folder: Path) -> int:
    """The bytes of everything in it."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
