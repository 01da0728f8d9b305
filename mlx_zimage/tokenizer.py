"""From a prompt to token ids: Z-Image's fixed chat template and the checkpoint's own tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError

# One user turn with thinking enabled, as Qwen3's chat template renders it. The model was trained on this string.
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


class PromptTruncated(UserWarning):
    """The prompt has more tokens than the model reads; the rest is ignored."""


class Tokenizer:
    """A tokenizer.json; content is the file's content, if it has been read already."""

    def __init__(self, file: Path, content: bytes | None = None):
        # imported late, since `mlx-zimage info` does not need it
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_buffer(content) if content is not None else Backend.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(f"{file} is not a valid tokenizer ({error}); download it again") from error
        self._backend.no_padding()
        self._backend.no_truncation()

    @property
    def size(self) -> int:
        """Number of tokens, including added ones."""
        return self._backend.get_vocab_size()

    def encode(self, prompt: str) -> list[int]:
        """All ids of the prompt in its template, without truncation."""
        return self._backend.encode(TEMPLATE.format(prompt=prompt), add_special_tokens=False).ids
