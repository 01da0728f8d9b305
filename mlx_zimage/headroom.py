"""float16's headroom: the power of two that a network's products are made smaller by, found once per checkpoint.

float16 ends at 65504, and products inside real feed-forwards pass it. A power of two changes no bit of a normal number,
and the norm or the sum that follows takes it back (`factor` in models/). Too small a one costs small numbers their last
bits. So it is tried which one a checkpoint needs, on a short prompt and the first step of a small picture; the pipeline
remembers it. What overflows in spite of it is drawn again in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .errors import NumericsError
from .models.text_encoder import TextEncoder
from .models.transformer import Transformer

PROMPT = "a red fox in the snow, next to a sign that says «Z-Image»"
SIDE = 256  # pixels, at most: the numbers are those of a large picture, in a hundredth of its time
TRY = 2.0**-2
MARGIN = 2.0**-4  # for other prompts, steps and sizes: their products may be 16 times those seen
LEAST = 2.0**-12  # with the margin, numbers of 4 still keep all of float16's bits; beyond, bfloat16 is more exact


def fit(network: TextEncoder | Transformer, run: Callable[[], mx.array]) -> mx.array:
    """Set network.factor to the largest with which nothing overflows in run, a forward of it, and the margin.

    Returns what the last run did. Raises NumericsError if no factor will do.
    """
    network.factor = 1.0
    while network.factor >= LEAST:
        found = run()
        if mx.isfinite(found).all().item():
            network.factor *= MARGIN
            return found
        network.factor *= TRY
    raise NumericsError(
        f"float16 cannot hold the numbers of the {network.source.component.name}, even {1 / LEAST:.0f} times smaller; "
        f"choose dtype bfloat16"
    )
