"""diffusers' ZImagePipeline.__call__, argument by argument: the same result here, or an error that says what to do."""

import inspect

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import TOLERANCE, relative_error

from mlx_zimage import RequestError, ZImagePipeline

SIZE = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
SHAPE = (1, 16, tiny.HEIGHT // 8, tiny.WIDTH // 8)
BASE = {"prompt": "a red fox", **SIZE, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent"}
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry"}
FOUR = {**GUIDED, "num_inference_steps": 4}
TWO = ["a red fox", "two hares in a field"]


def embeddings(pipe, prompt: str) -> list:
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0]


def halving(pipe, index: int, timestep, values: dict) -> dict:
    assert list(values) == ["latents"]
    assert index in (0, 1) and 0 < float(timestep) <= 1000
    return {"latents": 0.5 * values["latents"]}


def stopping(pipe, index: int, timestep, values: dict) -> dict:
    pipe._interrupt = index == 1
    return values


class Torch:
    """Values of each row, made anew for each of the two pipelines."""

    def __init__(self, torch):
        self.torch = torch

    def generator(self, seed: int):
        return self.torch.Generator().manual_seed(seed)

    def moved(self, seed: int):
        generator = self.generator(seed)
        self.torch.randn(100, generator=generator)
        return generator

    def randn(self, *shape: int):
        return self.torch.randn(shape, generator=self.generator(9))


# What runs with the same result: the arguments of a call, made for a pipeline. Several rows show one argument's uses.
SAME = {
    "prompt": lambda t, pipe: {"prompt": list(TWO)},  # which diffusers changes
    "height": lambda t, pipe: {"height": 48},
    "width": lambda t, pipe: {"width": 48},
    "num_inference_steps": lambda t, pipe: {"num_inference_steps": 5},
    "sigmas": lambda t, pipe: {"sigmas": [1.0, 0.7, 0.3], "num_inference_steps": 50},
    "guidance_scale": lambda t, pipe: {"guidance_scale": 2.5},
    "cfg_normalization": lambda t, pipe: {**GUIDED, "cfg_normalization": True},
    "cfg_normalization: a factor": lambda t, pipe: {**GUIDED, "cfg_normalization": 1.1},
    "cfg_truncation": lambda t, pipe: {**FOUR, "cfg_truncation": 0.2},
    "cfg_truncation: from the start": lambda t, pipe: {**FOUR, "cfg_truncation": 0},
    "cfg_truncation: none": lambda t, pipe: {**FOUR, "cfg_truncation": None},
    "negative_prompt": lambda t, pipe: {"prompt": list(TWO), **GUIDED, "negative_prompt": ["blurry", "low quality"]},
    "num_images_per_prompt": lambda t, pipe: {"prompt": list(TWO), "num_images_per_prompt": 2},
    "generator": lambda t, pipe: {"generator": t.generator(2**40 + 17)},
    "generator: moved on": lambda t, pipe: {"generator": t.moved(3)},
    "generator: a list": lambda t, pipe: {"prompt": list(TWO), "generator": [t.generator(3), t.moved(4)]},
    "generator: a list of one": lambda t, pipe: {"prompt": list(TWO), "generator": [t.generator(3)]},
    "latents": lambda t, pipe: {"prompt": list(TWO), "latents": t.randn(2, *SHAPE[1:])},
    "prompt_embeds": lambda t, pipe: {"prompt": None, "prompt_embeds": embeddings(pipe, "a hare")},
    "prompt_embeds: beside a prompt": lambda t, pipe: {"prompt_embeds": embeddings(pipe, "a hare")},
    "negative_prompt_embeds": lambda t, pipe: {
        "prompt": None, "prompt_embeds": embeddings(pipe, "a hare"),
        "guidance_scale": 3.0, "negative_prompt_embeds": embeddings(pipe, "blurry"),
    },
    "output_type": lambda t, pipe: {"output_type": "np"},
    "return_dict": lambda t, pipe: {"return_dict": False},
    "joint_attention_kwargs": lambda t, pipe: {"joint_attention_kwargs": {}},
    "joint_attention_kwargs: a scale": lambda t, pipe: {"joint_attention_kwargs": {"scale": 0.5}},
    "callback_on_step_end": lambda t, pipe: {"callback_on_step_end": halving},
    "callback_on_step_end: an end": lambda t, pipe: {"callback_on_step_end": stopping, "num_inference_steps": 4},
    "callback_on_step_end_tensor_inputs": lambda t, pipe: {
        "prompt": None, "prompt_embeds": embeddings(pipe, "a hare"),
        "callback_on_step_end": lambda pipe, i, t, values: values,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
    "max_sequence_length": lambda t, pipe: {"prompt": tiny.PROMPTS["medium"], "max_sequence_length": 24},
    "max_sequence_length: more than 512": lambda t, pipe: {"prompt": tiny.PROMPTS["long"], "max_sequence_length": 1024},
}  # fmt: skip

# What cannot: the error says what to do instead.
REFUSED = {
    "output_type": ({"output_type": "pt"}, r"output_type='np' and torch.from_numpy\(images\)"),
    "joint_attention_kwargs": ({"joint_attention_kwargs": {"mask": 1}}, "can only contain scale"),
    "callback_on_step_end": (
        {"prompt": TWO, "callback_on_step_end": halving}, "takes one prompt at a time, got 2; loop over them"
    ),
    "callback_on_step_end_tensor_inputs": (
        {"callback_on_step_end": halving, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        "pipe.encode_prompt makes embeddings",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def values(reference) -> Torch:
    return Torch(reference.torch)


@pytest.fixture(scope="module")
def theirs(golden, reference):
    return reference.open_pipeline(golden.folder)


def images(pipe, values: Torch, row: str) -> np.ndarray:
    call = {**BASE, "generator": values.generator(5), **SAME[row](values, pipe)}
    out = pipe(**call)
    return np.asarray(out[0])


def test_every_argument_of_diffusers_has_a_row():
    pipeline = pytest.importorskip("diffusers").ZImagePipeline
    arguments = [name for name in inspect.signature(pipeline.__call__).parameters if name != "self"]
    assert arguments == list(dict.fromkeys(row.split(":")[0] for row in SAME))
    ours = [name for name in inspect.signature(ZImagePipeline.__call__).parameters if name != "self"]
    assert ours[: len(arguments)] == arguments, "in the same order"


@pytest.mark.parametrize("row", SAME)
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_an_argument_gives_the_result_of_diffusers(golden_pipe, theirs, values, row):
    wanted, ours = (images(pipe, values, row) for pipe in (theirs, golden_pipe))
    assert ours.shape == wanted.shape
    assert relative_error(ours, wanted) < TOLERANCE


@pytest.mark.parametrize("row", REFUSED)
def test_an_argument_that_cannot_work_raises_an_error_with_advice(golden_pipe, row):
    call, message = REFUSED[row]
    with pytest.raises(RequestError, match=message):
        golden_pipe(**BASE | call)


def test_height_comes_before_width(golden_pipe, theirs, values):
    calls = ("a red fox", 48, 80, 1)
    wanted, ours = (
        pipe(*calls, guidance_scale=0.0, generator=values.generator(5), output_type="latent").images
        for pipe in (theirs, golden_pipe)
    )
    assert ours.shape == tuple(wanted.shape) == (1, 16, 6, 10)
    assert relative_error(ours, wanted) < TOLERANCE


def test_a_generator_that_is_used_again_gives_the_next_images_of_diffusers(golden_pipe, theirs, values):
    theirs_moves, ours_moves = values.generator(7), values.generator(7)
    for _ in range(3):
        wanted = theirs(**BASE, generator=theirs_moves).images
        assert relative_error(golden_pipe(**BASE, generator=ours_moves).images, wanted) < TOLERANCE
        assert values.torch.equal(theirs_moves.get_state(), ours_moves.get_state())


@pytest.mark.filterwarnings("ignore:to.*does nothing here")
def test_a_dtype_of_torch_is_taken_by_its_name(golden, values):
    pipe = ZImagePipeline.from_pretrained(golden.folder, torch_dtype=values.torch.bfloat16)
    assert pipe.dtype == mx.bfloat16
    assert pipe.to(values.torch.bfloat16) is pipe
    with pytest.raises(RequestError, match="dtype='float16'"):
        pipe.to("mps", values.torch.float16)


def test_arrays_of_torch_may_be_of_any_precision(golden_pipe, values):
    latents = values.randn(*SHAPE).bfloat16()
    same = golden_pipe(**BASE, latents=latents.float().numpy()).images
    assert np.array_equal(golden_pipe(**BASE, latents=latents.requires_grad_()).images, same)
