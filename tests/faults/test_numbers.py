"""Malicious numbers in configs, names and options are refused before anything is built from them."""

import json

import pytest
import tiny
from click.testing import CliRunner
from compare import refusal

from mlx_zimage import GenerateRequest, RequestError
from mlx_zimage.cli import main
from mlx_zimage.drafts import parse_seeds, read_requests
from mlx_zimage.models import NETWORKS
from mlx_zimage.quantization import Quantization
from mlx_zimage.scheduler import SchedulerConfig
from mlx_zimage.sizes import parse_memory
from mlx_zimage.untrusted import brief
from mlx_zimage.weights import official
from mlx_zimage.weights.names import places

HUGE = (10**9, 2**63, 10**99)
COUNTS = [
    (network, key)
    for network, keys in {
        "transformer": ("dim", "n_layers", "n_refiner_layers", "n_heads", "in_channels", "cap_feat_dim"),
        "text_encoder": (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size"),
        ),
        "vae": ("layers_per_block", "latent_channels", "norm_num_groups", "sample_size"),
    }.items()
    for key in keys
]


def refused(folder, network: str, change: dict) -> str:
    file = folder / network / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    message = refusal(folder)
    assert str(file) in message and len(message) < 500
    return message


@pytest.mark.parametrize("value", HUGE, ids=["1e9", "2**63", "1e99"])
@pytest.mark.parametrize(("network", "key"), COUNTS)
def test_a_huge_count_is_refused_before_any_shape_is_computed(folder, monkeypatch, network, key, value):
    monkeypatch.setattr(NETWORKS[network], "shapes", lambda self: pytest.fail("computed"))
    assert f"{key} must be at most 100 times the published model's" in refused(folder, network, {key: value})


@pytest.mark.parametrize(
    ("network", "change"),
    [
        ("transformer", {"axes_dims": [16]}),
        ("transformer", {"axes_dims": [8, 8]}),
        ("transformer", {"axes_dims": [4, 4, 4, 4]}),
        ("transformer", {"axes_dims": [5, 5, 6]}),
        ("transformer", {"axes_dims": [2**40, 2, 2]}),
        ("transformer", {"axes_dims": [2] * 10**5}),
        ("transformer", {"norm_eps": 10**99}),
        ("transformer", {"rope_theta": 1e300}),
        ("transformer", {"t_scale": float("inf")}),
        ("text_encoder", {"head_dim": 15}),
        ("text_encoder", {"rope_parameters": {"rope_theta": 10**99}}),
        ("vae", {"block_out_channels": [8, 16, 24, 24, 24]}),
        ("vae", {"block_out_channels": [8] * 64}),
        ("vae", {"block_out_channels": [8, 16, 24, 10**9]}),
        ("vae", {"scaling_factor": 10**99}),
    ],
    ids=brief,
)
def test_widths_that_no_network_has_are_refused(folder, network, change):
    refused(folder, network, change)


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("convert", [float, str, lambda value: [value], lambda value: 10**99])
def test_a_quantization_is_in_whole_numbers(key, convert):
    block = {"bits": 4, "group_size": 64}
    with pytest.raises(RequestError):
        Quantization.from_dict(block | {key: convert(block[key])})


def scheduler(**change) -> SchedulerConfig:
    return SchedulerConfig.from_dict(official.SCHEDULER | {"use_dynamic_shifting": True} | change)


def test_a_dynamic_shift_that_would_overflow_is_refused(folder):
    assert len(scheduler().sigmas(9, 512**2)) == 10  # the published model's slope, at the largest size
    for change in ({"base_image_seq_len": 4095}, {"max_shift": 100.0}, {"max_image_seq_len": 257, "base_shift": 40.0}):
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(official.SCHEDULER | {"use_dynamic_shifting": True} | change))
        assert f"{file}: scheduler config: base_shift" in refusal(folder)


@pytest.mark.parametrize(
    "size", ["20000000000GB", f"{'9' * 400}GB", f"{'9' * 5000}MB", 10**16, 10**5000, True, None], ids=lambda size: ""
)
def test_a_memory_budget_that_no_machine_has_is_refused(size):
    with pytest.raises(
        RequestError,
        match=r"memory must be a size such as 6GB or 800MB(, or a number of bytes, at least 1,000,000)?, got",
    ):
        parse_memory(size)


@pytest.mark.parametrize("digits", ["9" * 21, "9" * 5000, "1" * 10**6])
def test_endless_digits_are_refused_in_seeds_requests_and_options(digits, monkeypatch):
    with pytest.raises(RequestError, match="seed must be one or more whole numbers from 0 to 2"):
        parse_seeds(digits)
    line = f'{{"prompt": "a", "seed": {digits}}}'
    with pytest.raises(RequestError):
        [GenerateRequest(**values) for values in read_requests([line], "x.jsonl").values()]
    if len(digits) < 10**5:  # Linux takes arguments of up to 128 KB
        for option in ("--seed", "--steps", "--width", "--memory"):
            ended = CliRunner().invoke(main, ["generate", "a", "--model", "pocket", option, digits])
            assert ended.exit_code == 2, ended.output
            assert ended.exception is None or isinstance(ended.exception, SystemExit)


@pytest.mark.parametrize("field", ["seed", "width", "steps", "guidance_scale", "num_images", "shift"])
def test_a_number_too_long_to_print_is_refused_in_python_too(field):
    with pytest.raises(RequestError, match="more than 4300 digits"):
        GenerateRequest(**{"prompt": "a", "seed": 0, field: 10**5000})
    with pytest.raises(RequestError):
        GenerateRequest("a", seed=0, sigmas=[10**400])


@pytest.mark.parametrize("digits", ["4", "9" * 5000])
def test_a_number_in_a_tensors_name_is_not_used_in_arithmetic_unless_it_is_a_level(digits):
    (place,) = places(f"first_stage_model.decoder.up.{digits}.block.0.conv1.weight")
    assert place.name == f"decoder.up.{digits}.block.0.conv1.weight"


def test_the_published_configs_are_within_the_limits():
    for name, config in (*official.CONFIGS.items(), *tiny.CONFIGS.items()):
        NETWORKS[name].from_dict(config)
