"""Z-Image-Turbo on Apple silicon: text to image with MLX.

A first image
-------------
Open a pipeline once, then call it as often as you like:

>>> from mlx_zimage import ZImagePipeline
>>> pipe = ZImagePipeline.from_pretrained("pocket")
>>> out = pipe("a red circle on a blue background", num_inference_steps=4, seed=1)
>>> out.images[0].size
(128, 128)
>>> out.images[0].save("circle.png")

"pocket" is the tiny model inside this package: it generates coloured shapes in seconds, without downloading anything.
For the real model, pass the folder that `mlx-zimage convert` or the first `mlx-zimage generate` created, or a Hugging
Face id such as "Tongyi-MAI/Z-Image-Turbo", which is downloaded (33 GB). The arguments are those of diffusers'
ZImagePipeline, in the same order, plus `seed`, which gives the noise of a torch.Generator with that seed. Without a
seed or generator, a random seed is used; out.seed has it. help(ZImagePipeline) explains all arguments. In a terminal or
notebook a call shows a progress bar; pipe.set_progress_bar_config(disable=True) turns it off.

A pipeline runs one request at a time: requests from other threads are refused meanwhile, and so are those from a
process forked after MLX was used (multiprocessing's "spawn" works).

Progress and stopping
---------------------
`stream` runs a GenerateRequest and yields each step once it is done, then the images. Show progress in the loop; leave
the loop to stop:

>>> from mlx_zimage import GenerateRequest, Step
>>> request = GenerateRequest("a yellow star on a black background", width=64, height=64, seed=3, steps=2)
>>> for event in pipe.stream(request):
...     if isinstance(event, Step):
...         print(f"step {event.index + 1} of {event.steps}, now at sigma {event.sigma:.2f}")
...     else:
...         print("an image", event.pixels.shape, event.pixels.dtype)
step 1 of 2, now at sigma 0.75
step 2 of 2, now at sigma 0.00
an image (64, 64, 3) uint8

A request contains everything that an image depends on, except the model. It is validated when created, immutable, and
converts to JSON and back:

>>> GenerateRequest.from_dict(request.to_dict()) == request
True

Latents in and out
------------------
You can pass the initial noise, and get the final latents instead of an image:

>>> import numpy as np
>>> noise = np.random.default_rng(0).standard_normal((1, 16, 8, 8))
>>> out = pipe("a blue square", width=64, height=64, num_inference_steps=1, latents=noise, output_type="latent")
>>> out.images.shape
(1, 16, 8, 8)

Shapes and units
----------------
width, height           pixels, multiples of 16
steps                   number of denoising steps; Turbo is made for 8
sigma                   from 1 (noise) to 0 (image)
seed                    0 to 2**64 - 1; same noise as torch.Generator().manual_seed(seed) on a CPU, unless rng="mlx"
guidance_scale          0 is off; g here is "cfg g + 1" in other programs
latents, in and out     (images, 16, height / 8, width / 8), float32, as in diffusers
Step.latents, .clean    (images, height / 8, width / 8, 16), float32, channels last
Generated.pixels        (height, width, 3), uint8; .unit is float32 in [0, 1], as with output_type="np"
prompt_embeds           a list of (tokens, cap_feat_dim), one per prompt, as from encode_prompt
memory                  a string such as "6GB" (6 * 10**9 bytes) or "6GiB" (6 * 2**30 bytes), or a number of bytes

Memory
------
A pipeline stays within a memory budget, by default the one the machine recommends. Weights that do not fit are streamed
from disk: slower, but the same image. A request that cannot fit is refused before any weights are read:

>>> ZImagePipeline.from_pretrained("pocket", memory="1MB")("a red circle")
Traceback (most recent call last):
mlx_zimage.errors.MemoryBudgetError: 1 image of 128x128 cannot be generated within 1 MB: it needs at least ...

Errors
------
Invalid arguments are reported before any work starts, with what was expected:

>>> pipe("a red circle", width=100)
Traceback (most recent call last):
mlx_zimage.errors.RequestError: width must be a multiple of 16 pixels from 16 to 8192, got 100; the nearest are ...

All errors that this package raises on purpose are ZImageErrors, and also built-in exceptions where one fits
(RequestError is a ValueError); exit_code is the command line's exit code. help(mlx_zimage.errors) shows the hierarchy.

Converting
----------
>>> from mlx_zimage.convert import convert
>>> convert("pocket", "pocket-8bit", bits=8).name
'pocket-8bit'

More
----
The repository has five short programs in examples/, and README.md describes the command line. Modules worth reading are
pipeline (how an image is made), generate (from a request to finished files), sampling (the denoising loop), scheduler
(the sigmas) and images.metadata (how an image records the way it was made).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

_HOME = {
    "ZImagePipeline": "pipeline",
    "Generated": "pipeline",
    "GenerateRequest": "request",
    "Inputs": "inputs",
    "Step": "sampling",
    "PromptTruncated": "tokenizer",
    "ZImageError": "errors",
    "RequestError": "errors",
    "LockedError": "errors",
    "MemoryBudgetError": "errors",
    "ModelNotFoundError": "errors",
    "CheckpointError": "errors",
    "DeviceError": "errors",
    "GroupError": "errors",
    "NumericsError": "errors",
    "OutputError": "errors",
}
__all__ = [
    "CheckpointError",
    "DeviceError",
    "GenerateRequest",
    "Generated",
    "GroupError",
    "Inputs",
    "LockedError",
    "MemoryBudgetError",
    "ModelNotFoundError",
    "NumericsError",
    "OutputError",
    "PromptTruncated",
    "RequestError",
    "Step",
    "ZImageError",
    "ZImagePipeline",
    "__version__",
]

if TYPE_CHECKING:
    from .errors import (
        CheckpointError,
        DeviceError,
        GroupError,
        LockedError,
        MemoryBudgetError,
        ModelNotFoundError,
        NumericsError,
        OutputError,
        RequestError,
        ZImageError,
    )
    from .inputs import Inputs
    from .pipeline import Generated, ZImagePipeline
    from .request import GenerateRequest
    from .sampling import Step
    from .tokenizer import PromptTruncated


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
