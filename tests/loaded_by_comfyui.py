"""Load into ComfyUI what `convert --format comfyui` writes: python tests/loaded_by_comfyui.py COMFYUI FOLDER

COMFYUI is a clone of it, whose requirements are installed next to this package. Prints, for each format, how far the
output of its transformer is from ours in float32, relative to the norm; fails if that is more than the format's
rounding. The model has random weights, and two layers of the full width. Takes 8 GB of disk, freed at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny
from test_transformer import run

from mlx_zimage import ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.weights import official
from mlx_zimage.weights.hub import POCKET

# By format: the largest distance. Dense weights are multiplied in float32; the others in bfloat16.
FORMATS = {"comfyui": 1e-5, "comfyui-fp8": 0.06, "comfyui-int8": 0.03}
LAYERS = {"transformer": {"n_layers": 2}, "text_encoder": {"num_hidden_layers": 2}, "vae": {}}
LOAD = """
import logging
import sys

import numpy as np

file, arrays, sys.argv = sys.argv[1], np.load(sys.argv[2]), ["comfyui", "--cpu", *sys.argv[3:]]
import comfy.options

comfy.options.enable_args_parsing()
logging.disable(logging.WARNING)  # the text encoder's other layers are missing
import comfy.sd
import torch

model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(file)
assert clip is not None and vae is not None
dtype = model.model.manual_cast_dtype or model.model.get_dtype()
latents, caption, time = (torch.from_numpy(arrays[name]) for name in ("latents", "caption", "time"))
with torch.no_grad():
    out = model.model.diffusion_model(latents.to(dtype), 1 - time, caption.to(dtype), num_tokens=caption.shape[1])
np.save(sys.stdout.buffer, -out.float().numpy())
"""  # ComfyUI's time is sigma, 1 - time here, and its output has the opposite sign


def write_model(folder: Path) -> Path:
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.safetensors", "controlnet", "SHA256SUMS"))
    for name, layers in LAYERS.items():
        config = official.CONFIGS[name] | layers
        tiny.save_component(folder / name, name, tiny.weights(0, name, config), config, mx.bfloat16)
    return folder


def main(comfyui: Path, folder: Path) -> None:
    model = write_model(folder / "model")
    ((latents, caption, time), *_) = tiny.case_inputs(0, "a_pad_both", 2560)
    arrays = folder / "arrays.npz"
    np.savez(arrays, latents=latents[None], caption=caption[None], time=np.float32([time]))
    transformer = ZImagePipeline.from_pretrained(model, dtype="float32").transformer
    expected = np.array(run(transformer, latents, caption, time))[None]
    del transformer
    for form, most in FORMATS.items():
        file = convert(model, folder / f"{form}.safetensors", format=form)
        options = ["--force-fp32"] if form == "comfyui" else []
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, file, arrays, *options],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(comfyui), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            check=True,
        )
        (folder / "out.npy").write_bytes(loaded.stdout[loaded.stdout.index(b"\x93NUMPY") :])
        distance = np.linalg.norm(np.load(folder / "out.npy") - expected) / np.linalg.norm(expected)
        print(f"{form}: {file.stat().st_size / 1e9:.1f} GB, {distance:.2g} from our output in float32", flush=True)
        assert distance < most
        file.unlink()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
