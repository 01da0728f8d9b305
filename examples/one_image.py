"""One image from a prompt: python one_image.py ["a prompt" [model]]"""

import sys

from mlx_zimage import ZImagePipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle on a blue background"
model = sys.argv[2] if len(sys.argv) > 2 else "pocket"

pipe = ZImagePipeline.from_pretrained(model)
out = pipe(prompt, seed=1)
out.images[0].save("image.png")
print(f"image.png, generated from seed {out.seed}")
