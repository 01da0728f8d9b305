"""Records layers as comfy-kitchen 0.2.40 stores them, with what it dequantizes them to.

Run with comfy-kitchen and torch installed: python tests/golden/comfyui_layers.py [FILE]. Its eager backend runs on a
CPU and gives the same bytes everywhere.
"""

import json
import sys
from pathlib import Path

FILE = Path(__file__).with_name("comfyui.safetensors")
# By name: the layout of comfy-kitchen, what a file declares, and arguments of the layout's quantize.
FORMATS = {
    "fp8": ("TensorCoreFP8Layout", {"format": "float8_e4m3fn"}, {"scale": 2**-6}),
    "int8": ("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, {}),
    "int8-rows": ("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, {"per_channel": True}),
    "int8-convrot": (
        "TensorWiseINT8Layout",
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
    ),
    "w4a4": ("TensorCoreConvRotW4A4Layout", {"format": "convrot_w4a4"}, {"convrot_groupsize": 256}),
    "w4a8": ("AsymW4A8Int8Layout", {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256}, {}),
    "w4a8-plain": (
        "AsymW4A8Int8Layout",
        {"format": "asym_w4a8_int8", "params": {"group_size": 32, "convrot_groupsize": 16}},
        {"group_size": 32, "convrot_groupsize": 16, "codebook": False, "symmetric": False},
    ),
    "w6a8": ("AsymW4A8Int8Layout", {"format": "asym_w4a8_int8", "group_size": 16}, {"bits": 6}),
    "nvfp4": ("TensorCoreNVFP4Layout", {"format": "nvfp4"}, {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {"format": "mxfp8"}, {}),
}
SHAPES = ((3, 512), (130, 256))


def layer(name, weight):
    """The tensors that comfy-kitchen stores for a weight, by name, and its own dequantization."""
    import comfy_kitchen.tensor
    import torch

    layout, settings, options = FORMATS[name]
    cls = getattr(comfy_kitchen.tensor, layout)
    quantized, params = cls.quantize(weight, **options)
    stored = cls.state_dict_tensors(quantized, params)
    tensors = {f"weight{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
    mark = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return tensors | {"comfy_quant": mark}, cls.dequantize(quantized, params).to(torch.float32)


def main(file):
    import numpy as np
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name in FORMATS:
        for rows, columns in SHAPES:
            weight = np.random.default_rng(rows).standard_normal((rows, columns), np.float32) / 50
            parts, expected = layer(name, torch.from_numpy(weight))
            tensors |= {f"{name}.{rows}.{part}": tensor for part, tensor in parts.items()}
            tensors[f"{name}.{rows}.dequantized"] = expected[:rows, :columns].contiguous()
    save_file(tensors, file)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else FILE)
