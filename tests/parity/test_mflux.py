"""mflux's own loader applies a LoRA that was trained here to every layer it was trained for."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from compare import relative_error
from mlx.utils import tree_unflatten

from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.train.factors import deltas, new_factors
from mlx_zimage.train.output import write_factors
from mlx_zimage.train.settings import EXTRAS, Settings

RUN = {"base_sha256": "0" * 64, "dtype": "mlx.core.float32", "adapter": None}
CONFIG = TransformerConfig.from_dict(tiny.TRANSFORMER)


class Part(nn.Module):
    """A module of mflux's transformer: its names are those of diffusers."""


def linears(names: list[str]) -> Part:
    """The layers of these weights, as mflux finds them: attributes, and lists where a name has a number."""
    tree = tree_unflatten([(name.removesuffix(".weight"), name) for name in names])
    return _part(tree)


def _part(tree):
    if isinstance(tree, list):
        return [_part(one) for one in tree]
    if isinstance(tree, dict):
        part = Part()
        for name, one in tree.items():
            part[name] = _part(one)
        return part
    weight = mx.array(tiny.randn(0, tree, *CONFIG.shapes()[tree]))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    return linear


def at(root, layer: str):
    for name in layer.split("."):
        root = root[int(name)] if name.isdigit() else root[name]
    return root


def test_mflux_applies_every_layer_of_a_trained_lora(tmp_path):
    loader = pytest.importorskip("mflux.models.common.lora.mapping.lora_loader").LoRALoader
    mapping = pytest.importorskip("mflux.models.z_image.weights.z_image_lora_mapping").ZImageLoRAMapping
    factors = new_factors(CONFIG, 4, EXTRAS, seed=0)
    for block, layers in factors.items():
        for layer, own in layers.items():
            own["up"] = mx.array(tiny.randn(0, f"{block}.{layer}", *own["up"].shape))
    settings = Settings(rank=4, alpha=2.0)
    file = tmp_path / "lora.safetensors"
    write_factors(file, factors, settings, CONFIG, "tiny", RUN)
    found = deltas(factors, settings.scale, CONFIG)
    model = linears(list(found))
    loader.load_and_apply_lora(mapping.get_mapping(), model, [str(file)], [1.0], bake_lora=False)
    for name, delta in found.items():
        weight = mx.array(tiny.randn(0, name, *CONFIG.shapes()[name]))
        x = mx.array(tiny.randn(0, f"{name}.x", 3, weight.shape[1]))
        down, up = (part.astype(mx.bfloat16).astype(mx.float32) for part in (delta.down, delta.up))
        expected = x @ weight.T + (x @ down.T) @ up.T
        layer = at(model, name.removesuffix(".weight"))
        # float32, sums in another order
        assert relative_error(layer(x), np.array(expected)) < 1e-5, name
