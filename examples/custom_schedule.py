"""A custom schedule: the parts of the pipeline, put together by hand.

A schedule is a list of sigmas that falls from 1 (noise) to 0 (image); each step, from one to the next, calls the
transformer once. This example takes four steps along a cosine, and compares the result with four steps of the model's
own schedule.
"""

import numpy as np
from PIL import Image

from mlx_zimage import ZImagePipeline, scheduler
from mlx_zimage.noise import initial_noise
from mlx_zimage.sampling import denoise

STEPS, SEED, SIDE = 4, 5, 128
SCHEDULES = {
    "own": scheduler.sigmas(STEPS, shift=3.0),
    "cosine": np.cos(np.linspace(0, np.pi / 2, STEPS + 1)).astype(np.float32),
}

pipe = ZImagePipeline.from_pretrained("pocket")
features = pipe.encode("a white square on a red background")
h = w = SIDE // 8
for name, sigmas in SCHEDULES.items():
    sigmas[-1] = 0.0  # the cosine ends at 6e-17
    noise = initial_noise(SEED, (1, 16, h, w)).transpose(0, 2, 3, 1)  # channels last inside
    velocity = pipe.transformer.velocity(features, sigmas[:-1], h, w)
    *_, last = denoise(velocity, noise, sigmas)
    Image.fromarray(pipe.decode(last.latents[0])).save(f"{name}.png")
    print(f"{name}.png: sigmas {', '.join(f'{sigma:.3f}' for sigma in sigmas)}")
