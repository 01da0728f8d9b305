"""Z-Image-Turbo on Apple Silicon: text to pictures through MLX.

A first picture
---------------
A pipeline is opened once and draws as often as it is called:

>>> from mlx_zimage import ZImagePipeline
>>> pipe = ZImagePipeline.from_pretrained("pocket")
>>> out = pipe("a red circle on a blue background", num_inference_steps=4, seed=1)
>>> out.images[0].size
(128, 128)
>>> out.images[0].save("circle.png")

"pocket" is the tiny model inside this package: it draws coloured shapes in seconds, without a network. The real one is
the folder that `mlx-zimage convert` or the first `mlx-zimage generate` made, or a Hugging Face id, such as
"Tongyi-MAI/Z-Image-Turbo", which is fetched (33 GB). The arguments are those of diffusers' ZImagePipeline, and
help(ZImagePipeline) explains them; `seed` stands for its generator, and the same seed gives the same noise. Left out, a
seed is chosen, and is out.seed.

Watching, and stopping
----------------------
`stream` draws a GenerateRequest and hands out each step as it is done, then the pictures. Progress is what you do in
the loop; leaving it stops the work:

>>> from mlx_zimage import GenerateRequest, Step
>>> request = GenerateRequest("a yellow star on a black background", width=64, height=64, seed=3, steps=2)
>>> for event in pipe.stream(request):
...     if isinstance(event, Step):
...         print(f"step {event.index + 1} of {event.steps}, now at sigma {event.sigma:.2f}")
...     else:
...         print("a picture", event.pixels.shape, event.pixels.dtype)
step 1 of 2, now at sigma 0.75
step 2 of 2, now at sigma 0.00
a picture (64, 64, 3) uint8

A request holds all that a picture depends on, but for the model. It is checked when it is made, never changes, and goes
to JSON and back:

>>> GenerateRequest.from_dict(request.to_dict()) == request
True

Latents in and out
------------------
The noise that a picture begins with may be given, and the latents that it ends with be had:

>>> import numpy as np
>>> noise = np.random.default_rng(0).standard_normal((1, 16, 8, 8))
>>> drawn = pipe("a blue square", width=64, height=64, num_inference_steps=1, latents=noise, output_type="latent")
>>> drawn.images.shape
(1, 16, 8, 8)

Shapes and units
----------------
width, height           pixels, multiples of 16
steps                   calls of the transformer; 8 are what Turbo was made for
sigma                   from 1, noise, to 0, the picture
seed                    0 to 2**64 - 1; as torch.Generator().manual_seed(seed) on the CPU, unless rng="mlx"
guidance_scale          0 is off; g here is "cfg g + 1" elsewhere
latents, in and out     (pictures, 16, height / 8, width / 8), float32, as in diffusers
Step.latents, .clean    (pictures, height / 8, width / 8, 16), float32, channels last
Generated.pixels        (height, width, 3), uint8; output_type="np": (pictures, height, width, 3), in [0, 1]
memory                  a text such as "6GB" (10**9 bytes) or "6GiB", or a number of bytes

Memory
------
A pipeline keeps to a budget, by default what the machine recommends. What does not fit is read from the disk whenever
it is needed: slower, but the same picture. What cannot work is refused before a weight is read:

>>> ZImagePipeline.from_pretrained("pocket", memory="1MB")("a red circle")
Traceback (most recent call last):
mlx_zimage.errors.MemoryBudgetError: 1 picture of 128x128 cannot be drawn in 1 MB: the least that works is ...

Errors
------
Faults of what you gave are told before any work, with what was wanted:

>>> pipe("a red circle", width=100)
Traceback (most recent call last):
mlx_zimage.errors.RequestError: width must be a multiple of 16 pixels from 16 to 8192, got 100; the nearest are ...

All errors made on purpose are ZImageErrors, and built-in ones too where one fits (RequestError is a ValueError); their
exit_code is that of the command line. help(mlx_zimage.errors) draws their tree.

Converting
----------
>>> from mlx_zimage.convert import convert
>>> convert("pocket", "pocket-8bit", bits=8).name
'pocket-8bit'

More
----
The folder examples/ of the source has five short programs, README.md the command line. Modules worth reading are
pipeline (the story), generate (a request to finished files), sampling (the loop), scheduler (the sigmas) and
images.metadata (pictures that remember how they were drawn).
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
    "NumericsError": "errors",
    "OutputError": "errors",
}
__all__ = [
    "CheckpointError",
    "DeviceError",
    "GenerateRequest",
    "Generated",
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
