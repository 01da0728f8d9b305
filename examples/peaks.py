"""Predicted and measured peaks of memory, of the same picture under one budget after another.

    python examples/peaks.py MODEL REQUEST ...

A request is a side in pixels, with a budget and a number of pictures if wished: 1024, 1024:2GB, 512:2GB:4. Pictures of
one size have the same latents, whatever was in memory when: the last column is their checksum.
"""

import hashlib
import sys
import time

import mlx.core as mx
import numpy as np

from mlx_zimage import GenerateRequest, Step, ZImagePipeline

PROMPT = "a lighthouse on a cliff at dusk, oil painting, " * 6
STEPS = 8


def draw(model: str, side: int, budget: str | None, count: int) -> str:
    """One row of the table."""
    pipe = ZImagePipeline.from_pretrained(model, memory=budget)
    request = GenerateRequest(PROMPT, side, side, seed=3, steps=STEPS, num_images=count)
    transformer, steps = pipe.checkpoint.transformer, []
    mx.clear_cache()
    mx.reset_peak_memory()
    for event in pipe.stream(request):
        if isinstance(event, Step):
            steps.append((time.perf_counter(), transformer.bytes_read))
            latents = event.latents
        else:
            plan = event.plan
    measured = mx.get_peak_memory()
    (first, read), (last, read_last) = steps[0], steps[-1]
    stays = "kept" if plan.keep else f"{len(plan.streamed)} streamed" if plan.streamed else "staged"
    digest = hashlib.sha256(np.array(latents)).hexdigest()[:12]
    each_s, each_gb = (last - first) / (STEPS - 1), (read_last - read) / (STEPS - 1) / 1e9
    return (
        f"{side:5} {count:4}  {budget or '-':8} {stays:12} {plan.peak / 1e9:9.3f} {measured / 1e9:9.3f} "
        f"{plan.peak / measured:6.2f} {each_s:8.3f} {each_gb:8.3f}  {digest}"
    )


def main(model: str, requests: list[str]) -> None:
    print(" side  pictures budget networks     predicted  measured  ratio   s/step  GB/step  latents")
    for text in requests:
        side, budget, count = [*text.split(":"), "", ""][:3]
        print(draw(model, int(side), budget or None, int(count or 1)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
