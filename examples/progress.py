"""Progress without callbacks: whoever holds the loop sees each step, and may leave."""

import time

from mlx_zimage import GenerateRequest, Step, ZImagePipeline

PATIENCE_S = 60

pipe = ZImagePipeline.from_pretrained("pocket")
request = GenerateRequest("a green triangle on a white background", width=128, height=128, seed=4)
begin = time.perf_counter()
for event in pipe.stream(request):
    elapsed = time.perf_counter() - begin
    if isinstance(event, Step):
        # latents are (pictures, height / 8, width / 8, 16) float32; at sigma 1 they are noise, at 0 the picture
        print(f"step {event.index + 1} of {event.steps}: sigma {event.sigma:.3f} after {elapsed:.1f} s")
    else:
        print(f"picture {event.pixels.shape} after {elapsed:.1f} s")
    if elapsed > PATIENCE_S:
        print("too slow; leaving")
        break
