"""float16's headroom: the power of two that a network's products are made smaller by, found once per checkpoint.

float16 ends at 65504, and products inside real feed-forwards pass it. A power of two changes no bit of a normal number,
and the norm or the sum that follows takes it back (`factor` in models/). Too small a one costs small numbers their last
bits. So it is tried which one a checkpoint needs, on a short prompt and the first step of a small picture; the pipeline
remembers it. What overflows in spite of it is drawn again in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .models.layers import margin
from .models.text_encoder import TextEncoder
from .models.transformer import Transformer
from .request import GenerateRequest

SIDE = 64  # pixels; the pocket model's products are larger there than in larger pictures
TOKENS = 32  # of the prompt, template included, at most
SAMPLE = GenerateRequest("a red fox in the snow", SIDE, SIDE, seed=0, steps=1)
SMALLER = 2.0**-2  # from one try to the next
LEAST = 2.0**-8  # with the margin, numbers of 4 keep all of float16's bits; with less, bfloat16 is nearer the truth


def fit(network: TextEncoder | Transformer, run: Callable[[], mx.array]) -> tuple[float, mx.array | None]:
    """The factor for a network's products, and what run, a forward of the network, gave.

    It is the largest tried with which nothing overflows in run, times the margin for whatever else will be run. If none
    will do, it is 0, with None.
    """
    before, factor = network.factor, 1.0
    try:
        while factor >= LEAST:
            network.factor = factor
            found = run()
            if mx.isfinite(found).all().item():
                return factor * margin(mx.float16), found
            factor *= SMALLER
    finally:
        network.factor = before
    return 0.0, None
