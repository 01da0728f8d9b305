"""float16's headroom: the power of two that scales down a network's products, found once per checkpoint.

float16 numbers end at 65504, and products inside trained feed-forwards exceed that. Scaling by a power of two is exact
for normal numbers, and the norm or the sum that follows undoes it (`factor` in models/). Too small a factor costs small
numbers their last bits. So the factor that a checkpoint needs is found by trial, on a short prompt and the first step
of a small image, and cached. An image that overflows in spite of it is generated again in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .models.layers import margin
from .models.text_encoder import TextEncoder
from .models.transformer import Transformer
from .request import GenerateRequest

SIDE = 64  # pixels; the pocket model's products are larger at this size than at larger ones
SAMPLE_TOKENS = 32  # the most tokens of the prompt, template included
SAMPLE = GenerateRequest("a red fox in the snow", SIDE, SIDE, seed=0, steps=1)
STEP = 2.0**-2  # from one attempt to the next
SMALLEST = 2.0**-8  # with the margin, numbers from 4 up keep all bits; with a smaller one, bfloat16 is more accurate


def fit(network: TextEncoder | Transformer, run: Callable[[], mx.array]) -> tuple[float, mx.array | None]:
    """The factor for a network's products, and the result of run, a forward pass of the network.

    The factor is the largest one tried with which run does not overflow, times the margin, since other inputs may give
    larger products. If none is small enough, returns 0 and None.
    """
    before, factor = network.factor, 1.0
    try:
        while factor >= SMALLEST:
            network.factor = factor
            found = run()
            if mx.isfinite(found).all().item():
                return factor * margin(mx.float16), found
            factor *= STEP
    finally:
        network.factor = before
    return 0.0, None
