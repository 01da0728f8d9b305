"""Progress without callbacks: the loop sees each step, and may leave."""

import time

from mlx_zimage import GenerateRequest, Step, ZImagePipeline

PATIENCE_S = 60

pipe = ZImagePipeline.from_pretrained("pocket")
request = GenerateRequest("a green triangle on a white background", width=128, height=128, seed=4)
begin = time.perf_counter()
for event in pipe.stream(request):
    elapsed = time.perf_counter() - begin
    if isinstance(event, Step):
        # event.latents: (images, height / 8, width / 8, 16) float32; noise at sigma 1, the image at 0
        print(f"step {event.index + 1} of {event.steps}: sigma {event.sigma:.3f} after {elapsed:.1f} s")
    else:
        print(f"image {event.pixels.shape} after {elapsed:.1f} s")
    if elapsed > PATIENCE_S:
        print("too slow; leaving")
        break
