import json
import shutil
from dataclasses import replace
from pathlib import Path

import comfyui_files
import controls
import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from compare import TOLERANCE, relative_error
from lanes import slow
from safetensors.numpy import save_file

from mlx_zimage.cli import main
from mlx_zimage.convert import convert
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import CheckpointError, RequestError
from mlx_zimage.models import transformer
from mlx_zimage.models.controlnet import ControlNetConfig, config_of, control_latents
from mlx_zimage.models.layers import linear
from mlx_zimage.models.transformer import Chain, TransformerConfig, in_order
from mlx_zimage.quantization import Quantization
from mlx_zimage.weights.controlnets import ControlNetFile, Kind, open_controlnet
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.library import planned_network
from mlx_zimage.weights.random import RandomWeights

TAGS = list(controls.CONFIGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("controlnets")


@pytest.mark.parametrize("tag", TAGS)
def test_outputs_in_diffusers_order_equal_the_reference(golden, folder, tag):
    opened = controls.opened(folder, golden.seed, tag)
    network = controls.network(golden.pipe, opened, kind=controls.AsDiffusers)
    case = controls.inputs(golden.seed, tag)
    found = controls.run(network, case, controls.controlled(opened, case["control"]))
    assert relative_error(found, golden[f"{tag}/out"]) < TOLERANCE


@pytest.mark.parametrize("tag", TAGS)
def test_outputs_in_the_trained_order_equal_the_reference(golden, folder, tag):
    opened = controls.opened(folder, golden.seed, tag)
    case = controls.inputs(golden.seed, tag)
    found = controls.run(controls.network(golden.pipe, opened), case, controls.controlled(opened, case["control"]))
    assert relative_error(found, golden[f"{tag}/trained"]) < TOLERANCE
    # the two orders are the same only for version 1, which adds nothing in the noise refiner
    assert (relative_error(golden[f"{tag}/out"], golden[f"{tag}/trained"]) < TOLERANCE) == (tag == "control_v1")


@pytest.mark.parametrize("tag", TAGS)
def test_scale_0_equals_no_controlnet_bit_for_bit(pipe, folder, tag):
    opened, case = controls.opened(folder, 0, tag), controls.inputs(0, tag)
    plain = controls.run(controls.network(pipe), case)
    found = controls.run(controls.network(pipe, opened), case, controls.controlled(opened, case["control"], 0.0))
    assert np.array_equal(found, plain)
    assert not np.array_equal(
        controls.run(controls.network(pipe, opened), case, controls.controlled(opened, case["control"], 0.01)), plain
    )


@pytest.mark.parametrize("tag", [tag if tag in ("control_v21", "control_lite") else slow(tag) for tag in TAGS])
def test_streamed_blocks_give_the_bits_of_resident_ones(pipe, folder, tag):
    opened, case = controls.opened(folder, 0, tag), controls.inputs(0, tag)
    own = [f"controlnet0.{name}" for name in opened.component.config.blocks]
    resident, *others = (
        controls.run(
            controls.network(pipe, opened, streamed=streamed), case, controls.controlled(opened, case["control"])
        )
        for streamed in ((), own, [*own[::2], "layers.1"], [*own, *pipe.transformer.config.blocks])
    )
    for streamed in others:
        assert np.array_equal(resident, streamed)


def test_several_controls_are_added(pipe, folder):
    first, second = (controls.opened(folder, 0, tag) for tag in ("control_v1", "control_v21"))
    case, other = controls.inputs(0, "control_v1"), controls.inputs(0, "control_v21")
    network = controls.network(pipe, first, second)
    one, two = controls.controlled(first, case["control"]), controls.controlled(second, other["control"], number=1)
    both = controls.run(network, case, one, two)
    # float32: only the order of the sums differs
    assert relative_error(controls.run(network, case, two, one), both) < TOLERANCE
    for alone in (one, two):
        assert relative_error(controls.run(network, case, alone), both) > 0.01
    halves = replace(one, scales=[controls.SCALE / 2])
    assert relative_error(controls.run(network, case, halves, halves), controls.run(network, case, one)) < TOLERANCE


def test_a_batch_whose_images_take_turns_equals_each_image_alone(pipe, folder, monkeypatch):
    opened, case = controls.opened(folder, 0, "control_v21"), controls.inputs(0, "control_v21")
    network, control = controls.network(pipe, opened), controls.controlled(opened, case["control"])
    latents = mx.array(tiny.randn(0, "batch", 3, controls.H, controls.W, 16))
    velocities = network.velocities([mx.array(case["cap"])], [1 - controls.TIME], controls.H, controls.W, [control])
    monkeypatch.setattr(transformer, "TOKENS_AT_ONCE", 1)
    (turns,) = velocities(latents, 0)
    for i in range(3):
        # float32: a batch may be summed in another order
        assert relative_error(turns[i : i + 1], velocities(latents[i : i + 1], 0)[0]) < TOLERANCE


def test_blocks_run_just_before_those_that_they_add_to():
    chain = Chain(("a", "b", "c"), (0, 2), mx.zeros(1), 1.0)
    other = Chain(("z",), (), mx.zeros(1), 1.0)
    names = [name for name, *_ in in_order(["0", "1", "2", "3"], [chain, other])]
    assert names == ["a", "0", "1", "b", "2", "3", "c", "z"]


@pytest.mark.parametrize("tag", ["control_v1", "control_v21"])
def test_a_file_without_a_config_is_recognized_by_its_weights(folder, tag, tmp_path):
    config = controls.CONFIGS[tag]
    file = tmp_path / "control.safetensors"
    mx.save_safetensors(str(file), {name: mx.array(x) for name, x in controls.weights(0, tag).items()})
    found = open_controlnet(file, transformer=replace(tiny_config(), n_layers=4)).component.config
    assert found == ControlNetConfig.from_dict(config)


def test_the_published_layouts_are_recognized():
    for blocks, places in ((6, [*range(0, 30, 5)]), (15, [*range(0, 30, 2)]), (3, [0, 10, 20])):
        config = ControlNetConfig.from_dict(
            {"control_layers_places": places, "add_control_noise_refiner": None, "control_in_dim": 16}
        )
        found = ControlNetConfig.from_dict(config_of(config.shapes()))
        assert found == config and len(found.layers) == blocks


@pytest.mark.parametrize(
    ("version", "places", "mode", "channels", "parameters", "gigabytes"),
    [
        ("1", [*range(0, 30, 5)], None, 16, 1_550_778_368, ("3.1", "0.9")),
        ("2.0", [*range(0, 30, 2)], "control_layers", 33, 2_950_156_800, ("5.9", "1.7")),
        ("2.1", [*range(0, 30, 2)], "control_noise_refiner", 33, 3_356_225_792, ("6.7", "2.0")),
        ("2.1 lite", [0, 10, 20], "control_noise_refiner", 33, 1_008_308_480, ("2.0", "0.6")),
    ],
)
def test_the_published_sizes_are_those_of_the_page(version, places, mode, channels, parameters, gigabytes):
    refined = {"control_refiner_layers_places": [0, 1], "add_control_noise_refiner": mode}
    config = {"control_layers_places": places, "control_in_dim": channels, **refined}
    planned = [planned_network("controlnet", config, q) for q in (None, Quantization(4))]
    assert sum(int(np.prod(shape)) for shape in planned[0].shapes.values()) == parameters
    assert tuple(f"{network.nbytes / 1e9:.1f}" for network in planned) == gigabytes
    assert ControlNetFile(planned[0], Kind(None), "x").version == version
    page = (Path(__file__).parents[1] / "examples/controlnet.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {version} |"))
    assert all(f" {size} GB " in row for size in gigabytes)


@pytest.mark.parametrize("part", ["before_proj", "after_proj"])
def test_the_first_file_of_version_2_runs_its_layers_in_the_noise_refiner(pipe, folder, tmp_path, part):
    weights = controls.weights(0, "control_v21")
    weights[f"control_noise_refiner.0.{part}.weight"][:] = 0
    file = tmp_path / "control.safetensors"
    mx.save_safetensors(str(file), {name: mx.array(x) for name, x in weights.items()})
    found = open_controlnet(file, transformer=replace(tiny_config(), n_layers=4)).component
    assert found.config.add_control_noise_refiner == "control_layers"
    assert not any(name.startswith("control_noise_refiner") for name in found.entries)


def test_what_diffusers_saves_with_the_transformers_own_weights_is_read(pipe, folder, tmp_path):
    own = controls.weights(0, "control_v21")
    extra = {"t_embedder.mlp.0.weight": np.zeros((4, 4), np.float32)}
    (tmp_path / "config.json").write_text(json.dumps(controls.CONFIGS["control_v21"]))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {k: mx.array(x) for k, x in (own | extra).items()})
    assert open_controlnet(tmp_path).component.entries.keys() == own.keys()


@pytest.mark.parametrize(
    ("name", "kind", "version_scale_steps"),
    [
        ("Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps", "8-steps", (0.75, None)),
        ("Z-Image-Turbo-Fun-Controlnet-Union-2.1", "plain", (0.75, 20)),
        ("Z-Image-Turbo-Fun-Controlnet-Tile-2.1-2601-8steps", "8-steps, tile", (0.85, None)),
        ("Z-Image-Fun-Controlnet-Union-2.1", "base", (0.75, None)),
        ("my-own", "unknown kind", (0.75, None)),
    ],
)
def test_a_name_says_what_it_was_trained_for(folder, name, kind, version_scale_steps):
    assert str(Kind.of(name)) == kind
    opened = controls.opened(folder, 0, "control_v21")
    many = replace(opened.component.config, control_layers_places=tuple(range(15)))
    opened.component.config = many
    named = replace(opened, kind=Kind.of(name))
    assert (named.scale, named.steps) == version_scale_steps


def test_the_folders_that_a_file_is_in_do_not_say_what_it_was_trained_for(tmp_path):
    (tmp_path / "tile" / "8steps").mkdir(parents=True)
    file = tmp_path / "tile" / "8steps" / "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors"
    save_file(controls.weights(0, "control_lite"), file)
    assert str(open_controlnet(file).kind) == "plain"


def test_a_pipelines_own_controlnet_has_the_pipelines_name(folder):
    path = controls.write(folder / "mine", 0, "control_v1")
    path.rename(folder / "mine" / "controlnet")
    for source in (folder / "mine", folder / "mine" / "controlnet"):
        assert open_controlnet(source).name == "mine"
    assert open_controlnet("pocket").name == "pocket"


def test_a_controlnet_for_another_model_is_refused_before_any_weight_is_read(folder, bytes_read):
    path = controls.write(folder, 0, "control_v21")
    for change, said in (({"dim": 96}, "48 dimensions"), ({"n_heads": 6}, "3 heads"), ({"n_layers": 2}, "layer 2")):
        with pytest.raises(CheckpointError, match=f"for another model: .*{said}"):
            open_controlnet(path, transformer=replace(tiny_config(), **change))
    assert not bytes_read


def test_a_lora_or_a_model_in_its_place_is_refused(tiny_folder, tmp_path):
    lora = tmp_path / "lora.safetensors"
    mx.save_safetensors(str(lora), {"diffusion_model.layers.0.attention.to_q.lora_A.weight": mx.zeros((4, 48))})
    with pytest.raises(CheckpointError, match=r"is a LoRA; expected a ControlNet"):
        open_controlnet(lora)
    with pytest.raises(CheckpointError, match=r"is not a ControlNet; expected a ControlNet for Z-Image"):
        open_controlnet(tiny_folder / "transformer")
    flux = tmp_path / "flux.safetensors"
    mx.save_safetensors(str(flux), {"controlnet_x_embedder.weight": mx.zeros((4, 4))})
    with pytest.raises(CheckpointError, match=r"is a ControlNet for another model; expected a ControlNet for Z-Image"):
        open_controlnet(flux)


def test_a_controlnet_in_float8_is_refused_with_what_to_do_instead(tmp_path):
    weights = controls.weights(0, "control_lite")
    name = "control_layers.0.after_proj.weight"
    weights[name] = ("F8_E4M3", np.zeros(weights[name].shape, np.uint8))
    file = comfyui_files.save(tmp_path / "control.safetensors", weights)
    with pytest.raises(CheckpointError, match=f"{name} is F8_E4M3; download it as published, in bfloat16"):
        open_controlnet(file)


def test_control_latents_have_the_mask_between_the_two_images():
    image, masked = mx.ones((1, 2, 2, 16)), mx.full((1, 2, 2, 16), 3.0)
    mask = mx.full((1, 2, 2, 1), 2.0)
    found = np.array(control_latents(33, image, mask, masked))[0, 0, 0]
    assert found.tolist() == [1] * 16 + [2] + [3] * 16
    assert np.array(control_latents(33, image))[0, 0, 0].tolist() == [1] * 16 + [0] * 17
    assert control_latents(16, image).shape == (1, 2, 2, 16)


def tiny_config():
    return TransformerConfig.from_dict(tiny.TRANSFORMER)


def test_random_weights_have_its_shapes():
    network = planned_network("controlnet", controls.CONFIGS["control_v21"], None, RandomWeights)
    tree = network.read("control_layers.0", mx.float32)()
    assert tree["before_proj"]["weight"].shape == (48, 48)


# ---- converted, and described


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_converted_controlnet_gives_nearly_the_same_outputs(pipe, tmp_path, bits):
    config = controls.CONFIGS["control_v21"] | {"dim": 192, "n_heads": 6}
    shapes = ControlNetConfig.from_dict(config).shapes()
    weights = {name: mx.array(tiny.weight(0, "wide", name, shape)) for name, shape in shapes.items()}
    source = tmp_path / "Z-Image-Turbo-Fun-Controlnet-Tile-2.1-8steps.safetensors"
    mx.save_safetensors(str(source), weights)
    folder = convert(source, tmp_path / "converted", bits=bits, dtype="float32")
    opened, original = open_controlnet(folder), open_controlnet(source)
    assert opened.component.config == original.component.config
    assert str(opened.kind) == str(original.kind) == "8-steps, tile"
    layers = {layer.rpartition(".")[2] for layer in opened.component.quantizations}
    assert layers == ({"to_q", "to_k", "to_v", "0", "w1", "w2", "w3", "before_proj", "after_proj"} if bits else set())
    x = mx.array(tiny.randn(0, "x", 4, 192))
    for name in ("control_layers.0.after_proj", "control_noise_refiner.1.attention.to_out.0"):
        ours, wanted = (linear(x, one.component.read(name, mx.float32)()) for one in (opened, original))
        # rounding to so many bits, with one scale for every 64 weights
        assert relative_error(ours, wanted) < {None: 1e-9, 8: 0.02, 4: 0.25}[bits]


def test_info_tells_controlnets_apart(folder, tmp_path):
    path = controls.write(folder, 0, "control_v21")
    shown = CliRunner().invoke(main, ["info", str(path)])
    assert "ControlNet Union 2.1 lite (unknown kind), 2 + 2 blocks, 33 channels" in shown.output
    known = json.loads(CliRunner().invoke(main, ["info", str(path), "--json"]).output)
    assert (known["version"], known["trained_for"], known["scale"]) == ("2.1 lite", None, 0.9)
    for tag, version in (("control_v1", "1"), ("control_v20", "2.0 lite")):
        assert json.loads(CliRunner().invoke(main, ["info", str(controls.write(folder, 0, tag)), "--json"]).output)[
            "version"
        ] == version  # fmt: skip


def test_info_shows_the_steps_of_a_controlnet_that_needs_more_than_turbo(tmp_path):
    for name, shows in (("Union-2.1", True), ("Union-2.1-8steps", False)):
        file = tmp_path / f"Z-Image-Turbo-Fun-Controlnet-{name}.safetensors"
        save_file(controls.weights(0, "control_lite"), file)
        shown = CliRunner().invoke(main, ["info", str(file)]).output
        assert "default scale: 0.9" in shown and ("default steps on Turbo: 20" in shown) == shows


def test_options_for_whole_models_are_refused_for_a_controlnet(folder, tmp_path):
    path = controls.write(folder, 0, "control_v21")
    with pytest.raises(RequestError, match="is a ControlNet, which can only be converted on its own"):
        convert(path, tmp_path / "converted", vae="pocket")


def test_verify_checks_the_values_of_a_published_file(tmp_path):
    file = tmp_path / "Z-Image-Fun-lite.safetensors"
    arrays = controls.weights(0, "control_lite")
    save_file(arrays, file)
    assert verify(file) == []
    arrays["control_layers.0.after_proj.bias"][3] = np.nan
    save_file(arrays, file)
    (fault,) = verify(file)
    assert fault.startswith("controlnet control_layers.0.after_proj.bias: ")


def test_verify_finds_a_changed_byte_of_a_converted_controlnet(folder, tmp_path):
    source = controls.write(folder, 0, "control_v21")
    assert verify(source) == []
    convert(source, tmp_path / "converted")
    assert verify(tmp_path / "converted") == []
    (file,) = tmp_path.glob("converted/controlnet/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    (fault,) = verify(tmp_path / "converted")
    assert fault.startswith(f"controlnet/{file.name}: has sha256")
    result = CliRunner().invoke(main, ["verify", "-q", str(tmp_path / "converted")])
    assert result.exit_code == 4 and "is damaged: 1 fault found" in result.output


def test_verify_checks_a_models_own_controlnet(tmp_path):
    model = shutil.copytree(POCKET, tmp_path / "model")
    assert verify(model) == []
    file = model / "controlnet" / "diffusion_pytorch_model.safetensors"
    tensors = dict(mx.load(str(file)))
    tensors["control_layers.1.attention.to_v.weight"][5, 7] = float("inf")
    mx.save_safetensors(str(file), tensors)
    (fault,) = verify(model)
    assert fault.startswith("controlnet control_layers.1.attention.to_v.weight: ")
    (model / "controlnet" / "config.json").unlink()
    file.write_bytes(file.read_bytes()[:-1])
    (fault,) = verify(model)
    assert "diffusion_pytorch_model.safetensors" in fault
