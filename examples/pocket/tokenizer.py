"""The pocket tokenizer: byte-level BPE trained on captions, with Qwen3's pre-tokenizer and special tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from scenes import sample_scene
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 1024
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
END, IM_END = VOCABULARY - len(SPECIALS), VOCABULARY - len(SPECIALS) + 2
PAD = SPECIALS[0]
# Qwen2's split, letter for letter
SPLIT = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
# a little everyday English, so that other prompts are not split into single bytes
EVERYDAY = (
    "a photo of",
    "the quick brown fox jumps over the lazy dog",
    "cat dog house tree car sun moon flower mountain sea",
)


def in_chat(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def train_tokenizer(folder: Path, captions: int = 60000) -> Tokenizer:
    """Train on captions and write tokenizer.json, vocab.json, merges.txt, tokenizer_config.json."""
    rng = random.Random(7)
    texts = [sample_scene(rng).caption for _ in range(captions)]
    texts += ["user\n", "assistant\n", "system\n"] * 50 + list(EVERYDAY) * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated", False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        max_token_length=12,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    _fill(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    _write(tokenizer, Path(folder))
    return tokenizer


def _fill(tokenizer: Tokenizer) -> None:
    """Add unused tokens up to the id of the first special one, if the captions give too few merges."""
    missing = VOCABULARY - len(SPECIALS) - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<|unused_{i}|>", normalized=False) for i in range(missing)])


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.loads(tokenizer.to_str())
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIALS
        },
        "additional_special_tokens": list(SPECIALS[1:14]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIALS[2],
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": PAD,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2))


def encode(tokenizer: Tokenizer, prompts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, length), padded on the right, and their lengths (n,), both int16.

    A prompt longer than that is an error: nothing is cut off.
    """
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([in_chat(prompt) for prompt in prompts])]
    tokens = np.full((len(prompts), length), tokenizer.token_to_id(PAD), np.int16)
    for row, ids in zip(tokens, encoded, strict=True):
        if len(ids) > length:
            raise ValueError(f"a prompt has {len(ids)} tokens; expected at most {length}")
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in encoded], np.int16)
