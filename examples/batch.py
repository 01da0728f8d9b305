"""A contact sheet: a row per prompt, a column per seed. The pipeline is opened once for all images."""

from pathlib import Path

import numpy as np

from mlx_zimage import Generated, GenerateRequest, ZImagePipeline
from mlx_zimage.images.files import save

PROMPTS = ["a red circle on a blue background", "a yellow star on a black background"]
SEEDS = [1, 2]

pipe = ZImagePipeline.from_pretrained("pocket")
side = pipe.sample_size
sheet = np.zeros((len(PROMPTS) * side, len(SEEDS) * side, 3), np.uint8)
for row, prompt in enumerate(PROMPTS):
    for column, seed in enumerate(SEEDS):
        request = GenerateRequest(prompt, width=side, height=side, seed=seed, steps=4)
        (image,) = (event for event in pipe.stream(request) if isinstance(event, Generated))
        sheet[row * side :, column * side :][:side, :side] = image.pixels
print(save(sheet, Path("sheet.png")))
