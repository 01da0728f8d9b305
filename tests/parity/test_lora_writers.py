"""LoRAs written by diffusers, peft and lycoris act here as they do there, and as their differences merged by hand.

lycoris' modules are compared by their forward pass: their get_merged_weight applies alpha twice.
"""

import json
import re
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import relative_error
from mlx.utils import tree_unflatten

from mlx_zimage.errors import CheckpointError
from mlx_zimage.models.runner import PlainRunner
from mlx_zimage.models.transformer import Transformer, TransformerConfig
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.lora import read_lora
from mlx_zimage.weights.lora_writer import write_lora
from mlx_zimage.weights.overlay import Overlay

CASE = "a_pad_both"
CONFIG = TransformerConfig.from_dict(tiny.TRANSFORMER)
SEED = 3
# float32. By hand only the products of this one layer are summed in another order. The networks are compared with the
# whole of their outputs, after seven blocks of torch's and MLX's sums.
BY_HAND = 1e-5
NETWORK = 2e-5
# Refiners and modulation, too
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "adaLN_modulation.0", "linear", "mlp.0"]
TRAINED = re.compile(r"lora_[AB]|lora_(up|down)|lokr_|hada_|scalar")  # starts as a difference of 0
CHANGED = re.compile(r"dora_scale|magnitude_vector|lycoris_\w+\.(weight|bias)$")  # starts as the model's own
OTHERS = ["all_final_layer.2-1.adaLN_modulation.0"]  # not a linear layer


@pytest.fixture(scope="module")
def torch(reference):
    pytest.importorskip("peft", reason="peft is not installed; pip install 'mlx-zimage[parity]'")
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed; pip install 'mlx-zimage[parity]'")
    return reference.torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("loras") / "tiny", seed=SEED)


@pytest.fixture
def theirs(reference, folder, torch):
    """diffusers' pipeline on the tiny checkpoint."""
    torch.manual_seed(1)
    return reference.open_pipeline(folder)


def randomize(torch, module, scale: float) -> None:
    """Give the trained parameters random numbers: around 0, or around the model's own where they start as those."""
    for name, parameter in module.named_parameters():
        noise = scale * torch.randn_like(parameter)
        if CHANGED.search(name):
            parameter.data.copy_(parameter * (1 + 0.5 * noise.clamp(-1, 1)))
        elif TRAINED.search(name):
            parameter.data.copy_(noise)


def weights_by_forward(torch, model, names) -> dict[str, np.ndarray]:
    """Weights (out, in) and biases of linear layers as their forward passes have them, whatever was put around them."""
    modules, found = dict(model.named_modules()), {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        own = modules[layer]
        bias = own(torch.zeros(1, own.in_features))
        weight = (own(torch.eye(own.in_features)) - bias).T
        found[name] = (weight if kind == "weight" else bias[0]).contiguous().numpy()
    return found


def output(runner) -> np.ndarray:
    """Our transformer's output for CASE (16, h, w): data minus noise, the negative of diffusers'."""
    (latents, caption, time), *_ = tiny.case_inputs(SEED, CASE)
    x = mx.array(latents).transpose(1, 2, 0)[None]
    out = Transformer(CONFIG, runner).velocity(mx.array(caption), [1 - time], *latents.shape[1:])(x, 0)
    return np.array(out[0].transpose(2, 0, 1))


def check(torch, reference, folder, file, model, strength: float = 1.0) -> None:
    """The file laid over our weights gives what `model` computes, and what its dense weights give here."""
    component = open_checkpoint(folder).transformer
    lora = read_lora(file, {"transformer": CONFIG})
    overlay = Overlay(Blocks(component, mx.float32), CONFIG)
    overlay.attach("lora", lora.deltas["transformer"])
    plain = output(overlay)
    overlay.set({"lora": strength})
    found = output(overlay)
    changed = sorted(lora.deltas["transformer"])
    by_hand = weights_by_forward(torch, model, changed)
    dense = {name: Overlay(Blocks(component, mx.float32), CONFIG).base(name) for name in CONFIG.shapes()}
    for name, weight in by_hand.items():
        own = dense[name]
        dense[name] = CONFIG.sanitize(name, mx.array(weight))
        delta = lora.deltas["transformer"][name].reordered(partial(CONFIG.sanitize, name))
        merged = own + strength * delta.difference(own)
        assert relative_error(merged, np.array(dense[name])) < BY_HAND, name
    assert relative_error(found, output(PlainRunner(tree_unflatten(list(dense.items()))))) < BY_HAND
    assert relative_error(found, -reference.run_case(model, SEED, CASE)[0][:, 0].numpy()) < NETWORK
    assert relative_error(found, plain) > 0.01, "the LoRA changes nothing"


# ---- diffusers and peft


PEFT = {
    "LoRA": {"r": 4, "lora_alpha": 2},
    "rsLoRA": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "ranks and alphas of their own": {
        "r": 4, "lora_alpha": 2, "rank_pattern": {"to_q": 2, r"layers\.1\.feed_forward\.w1": 6},
        "alpha_pattern": {"to_q": 3, "^layers.0.attention.to_k": 7},
    },
    "DoRA": {"r": 4, "lora_alpha": 2, "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in PEFT if kind != "DoRA"])
def test_a_file_saved_by_diffusers_acts_as_in_diffusers_and_so_does_one_converted_for_it(
    torch, reference, theirs, folder, tmp_path, kind
):
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    model = theirs.transformer
    model.add_adapter(LoraConfig(target_modules=TARGETS, exclude_modules=OTHERS, **PEFT[kind]))
    randomize(torch, model, 0.3)
    theirs.save_lora_weights(
        tmp_path, get_peft_model_state_dict(model), **_collate_lora_metadata({"transformer": model})
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    loaded = reference.open_pipeline(folder)
    loaded.load_lora_weights(tmp_path)
    check(torch, reference, folder, file, loaded.transformer)
    loaded.set_adapters(loaded.get_active_adapters(), 0.6)
    check(torch, reference, folder, file, loaded.transformer, 0.6)
    write_lora(read_lora(file, {"transformer": CONFIG}), tmp_path / "converted.safetensors", "diffusers")
    again = reference.open_pipeline(folder)
    again.load_lora_weights(tmp_path, weight_name="converted.safetensors")
    check(torch, reference, folder, file, again.transformer)


@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_saved_by_peft_acts_as_in_peft(torch, reference, theirs, folder, tmp_path, kind):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(theirs.transformer, LoraConfig(target_modules=TARGETS, exclude_modules=OTHERS, **PEFT[kind]))
    randomize(torch, model, 0.3)
    model.save_pretrained(tmp_path)
    check(torch, reference, folder, tmp_path, model.base_model.model)


@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"r": 48}], ids=["factored", "both", "whole"])
@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_lokr_and_loha_saved_by_peft_act_as_in_peft_with_alpha_only_in_the_config(
    torch, reference, theirs, folder, tmp_path, kind, options
):
    import peft

    own = {"r": 2, "alpha": 3, "alpha_pattern": {"to_q": 5}, **(options if kind == "LoKr" else {})}
    config = getattr(peft, f"{kind}Config")(target_modules=TARGETS, exclude_modules=OTHERS, **own)
    model = peft.get_peft_model(theirs.transformer, config)
    randomize(torch, model, 0.2)
    model.save_pretrained(tmp_path)
    check(torch, reference, folder, tmp_path, model.base_model.model)


# ---- lycoris


LYCORIS = {
    "LoRA": {"algo": "locon"},
    "LoRA with a scalar": {"algo": "locon", "use_scalar": True},
    "rsLoRA": {"algo": "locon", "rs_lora": True},
    "DoRA by row": {"algo": "locon", "weight_decompose": True},
    "DoRA by column": {"algo": "locon", "weight_decompose": True, "wd_on_out": False},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr of both": {"algo": "lokr", "factor": 8, "decompose_both": True, "lora_dim": 1},
    "LoKr of whole factors": {"algo": "lokr", "full_matrix": True},
    "rsLoKr": {"algo": "lokr", "factor": 4, "rs_lora": True},
    "DoRA of LoKr": {"algo": "lokr", "weight_decompose": True},
    "LoHa": {"algo": "loha"},
    "rsLoHa": {"algo": "loha", "rs_lora": True},
    "DoRA of LoHa by column": {"algo": "loha", "weight_decompose": True, "wd_on_out": False},
    "whole differences": {"algo": "full"},
}


def lycoris_network(torch, model, options: dict, targets: list[str]):
    from lycoris import LycorisNetwork

    own = {"lora_dim": 4, "alpha": 2.0, "wd_on_out": True, **options}
    LycorisNetwork.apply_preset({"target_module": [], "target_name": targets, "use_fnmatch": True})
    network = LycorisNetwork(model, network_module=own.pop("algo"), **own)
    network.apply_to()
    randomize(torch, network, 0.2)
    return network


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_file_saved_by_lycoris_acts_as_its_modules_do(torch, reference, theirs, folder, tmp_path, kind):
    model = theirs.transformer
    # with whole differences a layer loses its `weight`, which diffusers reads from the time embedding's layer
    targets = [f"*.{name}" for name in TARGETS if (kind, name) != ("whole differences", "mlp.0")]
    network = lycoris_network(torch, model, LYCORIS[kind], targets)
    assert len(network.loras) > 50
    file = tmp_path / "lycoris.safetensors"
    network.save_weights(str(file), torch.float32, {"trigger_words": json.dumps(["x"])})
    check(torch, reference, folder, file, model)


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_difference_of_fused_queries_keys_and_values_is_cut_into_the_three(torch, theirs, tmp_path, kind):
    names = [f"layers.0.attention.{name}" for name in ("to_q", "to_k", "to_v")]
    modules = dict(theirs.transformer.named_modules())
    own = torch.cat([modules[name].weight for name in names])
    qkv = torch.nn.Linear(own.shape[1], len(own), bias=False)
    qkv.weight.copy_(own)
    fused = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict()])})
    fused["layers"][0]["attention"] = torch.nn.ModuleDict({"qkv": qkv})
    network = lycoris_network(torch, fused, LYCORIS[kind], ["*qkv"])
    file = tmp_path / "fused.safetensors"
    network.save_weights(str(file), torch.float32, None)
    whole = weights_by_forward(torch, fused, ["layers.0.attention.qkv.weight"]).popitem()[1]
    if "column" in kind:
        with pytest.raises(CheckpointError, match=r"has one length per column, shared by 3 layers"):
            read_lora(file, {"transformer": CONFIG})
        return
    deltas = read_lora(file, {"transformer": CONFIG}).deltas["transformer"]
    for name, part, wanted in zip(names, own.chunk(3), np.split(whole, 3), strict=True):
        base = mx.array(part.numpy())
        assert relative_error(base + deltas[f"{name}.weight"].difference(base), wanted) < BY_HAND
