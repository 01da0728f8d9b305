"""Latents in and out: images from two noise samples and from the noise halfway between them, and their clean latents.

Latents that go into or come out of the pipeline have diffusers' layout: (images, 16, height / 8, width / 8), float32.
"""

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_zimage import ZImagePipeline
from mlx_zimage.noise import torch_randn

SHAPE = (1, 16, 16, 16)


def between(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The point at t on the arc from a to b: unlike their mean, it has the norm of noise."""
    angle = np.arccos((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


first, second = torch_randn(1, SHAPE), torch_randn(2, SHAPE)
noise = np.concatenate([first, between(first, second, 0.5), second])

pipe = ZImagePipeline.from_pretrained("pocket")
prompt = "a blue circle on a yellow background"
out = pipe(prompt, latents=noise, num_images_per_prompt=len(noise), num_inference_steps=4, output_type="latent")
clean = out.images
np.save("clean.npy", clean)
print(f"clean.npy: {clean.shape}, standard deviation {clean.std():.2f}")

for i, latents in enumerate(mx.array(clean).transpose(0, 2, 3, 1)):  # channels last inside
    Image.fromarray(pipe.decode(latents)).save(f"between-{i}.png")
    print(f"between-{i}.png")
