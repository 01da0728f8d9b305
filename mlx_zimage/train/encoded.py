"""The latents of images and the embeddings of captions, computed once and cached on disk.

Their cache keys are what they were computed from: pixels or token ids, and the network's checksum. After `encode`,
neither the text encoder nor the VAE is needed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import NumericsError, OutputError, RequestError
from ..images.codec import to_signed
from ..images.source import cover, digest, over_white, read_image
from ..memory import Workload
from ..models.layers import result, sum_dtype
from ..models.vae import VAEConfig
from ..networks import Networks, Phase
from ..weights.store import Store
from .dataset import Example


class Encoded:
    """The encoded examples of a run, in a folder of their own; encoding needs at most budget bytes."""

    def __init__(self, networks: Networks, folder: Path, budget: int):
        self.networks = networks
        self.budget = budget
        self.store = Store(networks.dtype, folder)
        self.store.limit = 2**63  # what is needed again in every pass must not be forgotten

    def encode(self, examples: Sequence[Example]) -> Generator[Phase, None, None]:
        """Compute what is not cached yet, caption by caption and image by image; yields progress."""
        networks = self.networks
        captions = list(dict.fromkeys(["", *(example.caption for example in examples)]))
        missing = [caption for caption in captions if self._caption(caption) is None]
        images = [example for example in examples if self._latents(example) is None]
        if not missing and not images:
            return
        work = Workload(
            max((example.width for example in images), default=16),
            max((example.height for example in images), default=16),
            images=1,
            tokens=max(len(networks.tokenize(caption)) for caption in captions),
            steps=1,
            from_image=True,
        )
        plan = networks.planner.plan(work, self.budget, keep=False)
        with networks.guarded(), networks.with_loras({}), networks.running(plan):
            for i, caption in enumerate(missing):
                yield Phase("captions", i, len(missing))
                ids = networks.tokenize(caption)
                embeddings = networks.text_encoder(ids)
                self._put(networks.checkpoint.text_encoder, ("caption", *ids), embeddings, f"caption {caption!r}")
            networks.release("text_encoder")
            for i, example in enumerate(images):
                yield Phase("images", i, len(images))
                image = over_white(read_image(example.file))
                if digest(image) != example.digest:
                    raise RequestError(f"{example.file} was changed after it was read; run the same command again")
                pixels = cover(image, example.width, example.height)
                latents = result(networks.encode_image(to_signed(np.asarray(pixels))[None]))
                self._put(networks.checkpoint.vae, _key(example), latents.astype(mx.float32), f"image {example.file}")
            networks.release()

    def caption(self, text: str) -> mx.array:
        """The embeddings (L, cap_feat_dim) of an encoded caption."""
        return self._found(self._caption(text))

    def latents(self, example: Example) -> mx.array:
        """The latents (1, h, w, C) float32 of an encoded image."""
        return self._found(self._latents(example))

    def _caption(self, text: str) -> mx.array | None:
        networks = self.networks
        ids, encoder = networks.tokenize(text), networks.checkpoint.text_encoder
        shape = len(ids), encoder.config.hidden_size
        return self.store.get([encoder], ("caption", *ids), shape, sum_dtype(networks.dtype))

    def _latents(self, example: Example) -> mx.array | None:
        vae = self.networks.checkpoint.vae
        return self.store.get([vae], _key(example), latent_shape(vae.config, example), mx.float32)

    def _put(self, network, key: tuple, array: mx.array, label: str) -> None:
        if not mx.isfinite(array).all().item():
            raise NumericsError(f"the {network.name}'s output for the {label} is not finite; try dtype float32")
        self.store.put([network], key, array)
        self._found(self.store.get([network], key, array.shape, array.dtype))

    def _found(self, array: mx.array | None) -> mx.array:
        if array is None:
            raise OutputError(
                f"an encoded image or caption could not be stored in {self.store.folder}, or was removed from it; free "
                f"some space and run the same command again"
            )
        return array


def latent_shape(config: VAEConfig, example: Example) -> tuple[int, int, int, int]:
    return 1, example.height // config.scale, example.width // config.scale, config.latent_channels


def _key(example: Example) -> tuple:
    return "image", example.digest, example.width, example.height
