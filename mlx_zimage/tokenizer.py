"""From a prompt to token ids: Z-Image's fixed chat template and the checkpoint's own tokenizer.json.

A tokenizer.json is a program for the tokenizers library, which may abort the process or never end if it is not one that
the library's own trainers wrote. So it is accepted only if it is like Z-Image's in all but its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .untrusted import brief, parse_json, read_bytes

# One user turn with thinking enabled, as Qwen3's chat template renders it. The model was trained on this string.
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

MAX_TOKENIZER_BYTES = 16 * 2**20  # of a file; Qwen3's is 11 MB
MAX_TOKENIZER_VALUES = 700_000  # in a file; Qwen3's has 600,000
MAX_ENTRIES = 200_000  # of the vocabulary (or keys of all objects), and merges; Qwen3's has 152,000 of each
MAX_ADDED = 1000  # the most tokens added to the vocabulary, and characters in one; Qwen3 adds 26
MAX_ADDED_TOTAL = 20_000  # characters in all of them, since the library takes 300 bytes for each; Qwen3's have 400
# Qwen's expression for words; others may take forever for some prompts.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
# The steps that each part of the file may have, in this order and at most once: each ByteLevel lengthens what the one
# before it made, so that 20 of them fill the memory.
PARTS = {
    "normalizer": ("NFC",),
    "pre_tokenizer": ("Split", "ByteLevel"),
    "post_processor": ("ByteLevel",),
    "decoder": ("ByteLevel",),
}
# The values allowed for each part of its model, besides the tokens.
MODEL: dict[str, tuple[object, ...]] = {
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}


def most_ids(prompt: str) -> int:
    """A number of ids that a prompt in its template cannot exceed: one per byte of its NFC form, which may have three
    times as many."""
    return len(TEMPLATE) + 3 * len(prompt.encode())


class PromptTruncated(UserWarning):
    """The prompt has more tokens than the model reads; the rest is ignored."""


class Tokenizer:
    """A tokenizer.json; content is the file's content, if it has been read already.

    size is the number of its ids: one more than the highest.
    """

    def __init__(self, file: Path, content: bytes | None = None):
        # imported late, since `mlx-zimage info` does not need it
        from tokenizers import Tokenizer as Backend

        self._file = file
        with self._guarded():
            content = read_bytes(file, MAX_TOKENIZER_BYTES) if content is None else content
            if content.count(b":") > MAX_ENTRIES:
                raise ValueError(f"it has more than {MAX_ENTRIES:,} tokens")
            declared = check(parse_json(content, MAX_TOKENIZER_VALUES))
            self._backend = Backend.from_buffer(content)
            self.size = max(declared, self._backend.get_vocab_size())
            self._backend.no_padding()
            self._backend.no_truncation()
        self._empty: list[int] = []
        self._empty = self.encode("")

    def encode(self, prompt: str) -> list[int]:
        """All ids of the prompt in its template, without truncation."""
        with self._guarded():
            ids = self._backend.encode(TEMPLATE.format(prompt=prompt), add_special_tokens=False).ids
        if ids == self._empty and (prompt or not ids):
            raise CheckpointError(f"{self._file} has no tokens for the prompt {brief(prompt)}; download it again")
        if max(ids) >= self.size:
            raise CheckpointError(
                f"{self._file} assigns the id {max(ids)} to a token of the prompt, but has only {self.size} tokens"
            )
        return ids

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Within the block, an error of the library, even a panic, names the file."""
        try:
            yield
        except BaseException as error:  # the library raises bare Exception, and panics with a BaseException of its own
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{self._file} is not a valid tokenizer ({error}); download it again") from error


def check(values: Any) -> int:
    """The number of ids of a tokenizer.json, parsed. ValueError if it does what Z-Image's does not."""
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise ValueError("it has no model of type BPE")
    for key, value in model.items():
        if key not in ("vocab", "merges") and value not in MODEL.get(key, ()):
            raise ValueError(f"its model has {key:.80} {brief(value)}, unlike Z-Image's")
    for part, allowed in PARTS.items():
        left: Iterator[Any] = iter(allowed)
        for number, step in enumerate(_steps(values.get(part)), start=1):
            kind = step.get("type") if isinstance(step, dict) else step
            # `in` advances the iterator, so that only what follows this kind is left
            if kind not in left or (kind == "Split" and step != SPLIT):
                raise ValueError(f"step {number} of its {part} is {brief(step)}, unlike Z-Image's")
    vocabulary, merges, added = model.get("vocab"), model.get("merges") or [], values.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(added, list) or len(added) > MAX_ADDED:
        raise ValueError(f"it has no vocabulary, or more than {MAX_ADDED} added tokens")
    if not isinstance(merges, list) or len(merges) > MAX_ENTRIES:
        raise ValueError(f"it has more than {MAX_ENTRIES:,} merges")
    if any(not isinstance(token, dict) or len(str(token.get("content"))) > MAX_ADDED for token in added):
        raise ValueError(f"an added token is longer than {MAX_ADDED} characters")
    if sum(len(str(token.get("content"))) for token in added) > MAX_ADDED_TOTAL:
        raise ValueError(f"its added tokens have more than {MAX_ADDED_TOTAL:,} characters")
    ids = [*vocabulary.values(), *(token.get("id") for token in added)]
    if not ids or not all(isinstance(number, int) and number >= 0 for number in ids):
        raise ValueError("its ids are not whole numbers")
    return max(ids) + 1


def _steps(part: Any) -> list:
    """What a part of a tokenizer.json does: several things in turn, one or nothing."""
    if isinstance(part, dict) and part.get("type") == "Sequence" and isinstance(part.get("pretokenizers"), list):
        return part["pretokenizers"]
    return [] if part is None else [part]
