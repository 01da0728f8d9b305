import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from mlx_zimage import GenerateRequest, RequestError, ZImageError

GOOD = {"prompt": "a red fox", "width": 64, "height": 32, "seed": 0}
FAULTS = [
    ({"width": 1000}, "width must be a multiple of 16 pixels from 16 to 8192, got 1000; the nearest are 992 and 1008"),
    (
        {"height": 1025},
        "height must be a multiple of 16 pixels from 16 to 8192, got 1025; the nearest are 1024 and 1040",
    ),
    ({"width": 0}, "from 16 to 8192, got 0; the nearest is 16"),
    ({"height": -64}, "from 16 to 8192, got -64; the nearest is 16"),
    ({"width": 8208}, "from 16 to 8192, got 8208; the nearest is 8192"),
    ({"width": 64.0}, "width must be a whole number, got 64.0"),
    ({"width": True}, "width must be a whole number, got True"),
    ({"steps": 0}, "steps must be from 1 to 1000, got 0"),
    ({"steps": -1}, "steps must be from 1 to 1000, got -1"),
    ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n\t"}, "the prompt is empty"),
    ({"prompt": None}, "the prompt must be text, got NoneType"),
    ({"prompt": b"fox"}, "the prompt must be text, got bytes"),
    ({"prompt": "fox" * 20000}, "the prompt has 60000 characters; at most 32000 are allowed"),
    ({"prompt": "fox \udc80"}, "the prompt is not valid Unicode at character 4"),
    ({"negative_prompt": None}, "the negative prompt must be text, got NoneType"),
    ({"negative_prompt": "\udc80"}, "the negative prompt is not valid Unicode at character 0"),
    ({"seed": -1}, "seed must be from 0 to 2**64 - 1, got -1"),
    ({"seed": 2**64}, "seed must be from 0 to 2**64 - 1, got 18446744073709551616"),
    ({"seed": None}, "seed must be a whole number, got None"),
    ({"num_images": 0}, "num_images must be from 1 to 1000, got 0"),
    ({"guidance_scale": -1.0}, "guidance_scale must be from 0 to 1000, got -1.0"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be from 0 to 1000, got nan"),
    ({"guidance_scale": "4"}, "guidance_scale must be a number, got '4'"),
    ({"shift": 0.0}, "shift must be from 0.01 to 1000, got 0.0"),
    ({"shift": 10**400}, "shift must be from 0.01 to 1000"),
    ({"shift": float("inf")}, "shift must be from 0.01 to 1000, got inf"),
    ({"sigmas": 0.5}, "sigmas must be a list of numbers, got 0.5"),
    ({"sigmas": ["high"]}, "sigmas must be a list of numbers, got ['high']"),
    ({"sigmas": []}, "sigmas must be 1 to 1000 numbers, got 0"),
    ({"sigmas": [1.0, 0.5, 0.5]}, "sigmas must fall from at most 1 to above 0, got [1.0, 0.5, 0.5]"),
    ({"sigmas": [1.5, 0.5]}, "sigmas must fall from at most 1"),
    ({"sigmas": [1.0, 0.0]}, "the final 0 is added automatically"),
    ({"sigmas": [1.0, float("nan")]}, "sigmas must fall from at most 1"),
    ({"sigmas": [1.0, 0.5], "steps": 3}, "sigmas must have one value per step: expected 3 but got 2"),
    ({"cfg_normalization": -1.0}, "cfg_normalization must be from 0 to 1000, got -1.0"),
    ({"cfg_truncation": "0.5"}, "cfg_truncation must be a number, got '0.5'"),
    ({"max_sequence_length": 0}, "max_sequence_length must be from 1 to 1504, got 0"),
    ({"max_sequence_length": 1505}, "max_sequence_length must be from 1 to 1504, got 1505"),
    ({"prompt_embeds": "../secret"}, "prompt_embeds must be the SHA-256 of an array in hexadecimal, got '../secret'"),
    ({"rng": "cuda"}, "rng must be one of torch, mlx, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=lambda value: str(value)[:40])
def test_an_invalid_value_is_reported_with_what_was_expected(change, message):
    with pytest.raises(RequestError) as caught:
        GenerateRequest(**GOOD | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 16, "height": 8192},
        {"seed": 2**64 - 1},
        {"steps": 1000},
        {"negative_prompt": ""},
        {"guidance_scale": 4},
        {"prompt": "狐狸 🦊"},
    ],
    ids=str,
)
def test_values_at_the_limits_are_accepted(change):
    request = GenerateRequest(**GOOD | change)
    assert {name: getattr(request, name) for name in change} == change


def test_a_request_survives_a_round_trip_through_json():
    request = GenerateRequest(
        **GOOD
        | {"steps": 4, "guidance_scale": 1.5, "shift": 6.0, "prompt": "雪 🦊", "seed": 2**63}
        | {"sigmas": [1, 0.75, 0.5, 0.125], "cfg_normalization": 1.0, "cfg_truncation": 0.5}
        | {"max_sequence_length": 1024, "prompt_embeds": "ab" * 32}
    )
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_sigmas_say_how_many_steps_there_are():
    assert GenerateRequest(**GOOD, sigmas=[1.0, 0.5]).steps == 2


def test_embeddings_need_no_prompt():
    assert GenerateRequest(**GOOD | {"prompt": "", "prompt_embeds": "ab" * 32}).prompt == ""


def test_a_dictionary_with_an_unknown_field_is_refused():
    with pytest.raises(RequestError, match="no field 'strenght'"):
        GenerateRequest.from_dict(GOOD | {"strenght": 0.5})


def test_a_dictionary_without_a_prompt_is_refused():
    with pytest.raises(RequestError, match="prompt"):
        GenerateRequest.from_dict({"width": 64, "height": 64, "seed": 0})


def test_a_request_from_a_dictionary_is_validated():
    with pytest.raises(RequestError, match="the nearest are 48 and 64"):
        GenerateRequest.from_dict(GOOD | {"width": 50})


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateRequest(**GOOD).steps = 4


def test_a_request_error_is_a_zimage_error_and_a_value_error():
    with pytest.raises(ZImageError) as caught:
        GenerateRequest(**GOOD | {"steps": 0})
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


def test_requests_need_neither_mlx_nor_numpy():
    script = (
        "import sys; from mlx_zimage import GenerateRequest; GenerateRequest('fox', 64, 64, 0);"
        "print([name for name in ('mlx.core', 'numpy', 'PIL') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_numpy_numbers_become_python_numbers():
    request = GenerateRequest(**GOOD | {"seed": np.uint64(2**64 - 1), "width": np.int32(64), "shift": np.float32(2)})
    assert (
        json.loads(json.dumps(request.to_dict())) | {"seed": 2**64 - 1, "width": 64, "shift": 2.0} == request.to_dict()
    )
