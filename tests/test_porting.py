"""What scripts for diffusers use besides the results of a call, which tests/parity/test_call.py compares."""

import inspect
import io
import subprocess
import sys
import warnings

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_noise import Generator

from mlx_zimage import GenerateRequest, RequestError, ZImagePipeline
from mlx_zimage.models.text_encoder import TextEncoder
from mlx_zimage.needless import Elsewhere, Needless
from mlx_zimage.noise import torch_randn

# of diffusers' ZImagePipeline.__call__ 0.42.1, in its order
ARGUMENTS = (
    *("prompt", "height", "width", "num_inference_steps", "sigmas", "guidance_scale", "cfg_normalization"),
    *("cfg_truncation", "negative_prompt", "num_images_per_prompt", "generator", "latents", "prompt_embeds"),
    *("negative_prompt_embeds", "output_type", "return_dict", "joint_attention_kwargs", "callback_on_step_end"),
    *("callback_on_step_end_tensor_inputs", "max_sequence_length"),
)
SIZE = {"width": tiny.WIDTH, "height": tiny.HEIGHT}
SHAPE = (1, 16, tiny.HEIGHT // 8, tiny.WIDTH // 8)
RUN = {**SIZE, "num_inference_steps": 2, "output_type": "latent"}


def test_a_call_takes_diffusers_arguments_in_their_order_and_most_by_name_only():
    parameters = [p for p in inspect.signature(ZImagePipeline.__call__).parameters.values() if p.name != "self"]
    assert [p.name for p in parameters[: len(ARGUMENTS)]] == list(ARGUMENTS)
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == ["prompt", "height", "width", "num_inference_steps"]


def test_height_comes_before_width(pipe):
    assert pipe("a red fox", 48, 80, 1, seed=1).images[0].size == (80, 48)


def test_images_for_a_list_of_prompts_are_generated_from_a_single_draw_of_noise(pipe):
    prompts, noise = ["a red fox", "a hare"], torch_randn(4, (4, *SHAPE[1:]))
    together = pipe(prompts, **RUN, num_images_per_prompt=2, seed=4)
    assert together.seed == 4
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, **RUN, num_images_per_prompt=2, latents=noise[2 * i :][:2])
        assert np.array_equal(together.images[2 * i :][:2], alone.images)


def test_a_generator_starts_from_its_seed_and_advances(pipe):
    generator = Generator(6)
    out = pipe("a red fox", **RUN, generator=generator)
    assert out.seed == 6
    assert np.array_equal(out.images, pipe("a red fox", **RUN, seed=6).images)
    second = pipe("a red fox", **RUN, generator=generator).images
    assert np.array_equal(second, pipe("a red fox", **RUN, latents=torch_randn(6, (2, *SHAPE[1:]))[1:]).images)


def test_a_call_imports_no_torch_and_a_script_prints_nothing():
    script = (
        "import sys; from mlx_zimage import ZImagePipeline; pipe = ZImagePipeline.from_pretrained('pocket');"
        "pipe('a red circle', 16, 16, 1, seed=1); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("False\n", "")


def test_an_output_is_indexed_as_in_diffusers(pipe):
    out = pipe("a red fox", **RUN, seed=1)
    assert out[0] is out.images and out["images"] is out.images
    (images,) = pipe("a red fox", **RUN, seed=1, return_dict=False)
    assert np.array_equal(images, out.images)


def test_arrays_of_pixels_are_not_rounded(pipe):
    pixels = pipe("a red fox", **RUN | {"output_type": "np"}, seed=1).images * 255
    assert np.abs(pixels - pixels.round()).max() > 0.1


def test_encoded_prompts_give_the_same_images_as_prompts(pipe):
    wanted, unwanted = pipe.encode_prompt(["a red fox", "a hare"], negative_prompt="blurry")
    assert [x.shape[1] for x in wanted + unwanted] == [40] * 4
    guided = {"guidance_scale": 2.0, **RUN, "seed": 1}
    by_text = pipe(["a red fox", "a hare"], negative_prompt="blurry", **guided).images
    by_arrays = pipe(prompt_embeds=wanted, negative_prompt_embeds=unwanted, **guided).images
    assert np.array_equal(by_arrays, by_text)


def test_a_callback_sees_each_step_and_may_end_the_run(pipe):
    seen = []

    def callback(pipe, index, timestep, values):
        seen.append((index, float(timestep), values["latents"].shape, pipe.num_timesteps))
        pipe._interrupt = index == 2

    out = pipe("a red fox", **RUN | {"num_inference_steps": 8}, seed=1, callback_on_step_end=callback)
    assert [(index, shape, steps) for index, _, shape, steps in seen] == [(i, SHAPE, 8) for i in range(3)]
    assert [timestep for _, timestep, _, _ in seen] == [
        float(1000 * s) for s in pipe.sigmas(GenerateRequest("a", **SIZE, seed=1))[:3]
    ]
    assert np.isfinite(out.images).all()
    whole = pipe("a red fox", **RUN | {"num_inference_steps": 8}, seed=1).images
    assert not np.array_equal(whole, out.images), "the next call is not ended"


def guidance_off(pipe, index, timestep, values):
    pipe._guidance_scale = 0.0
    return values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": None}, "give prompt or prompt_embeds"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 7}, "prompt must be a string or a list, got int"),
        ({"prompt": {"a": 1}}, "prompt must be a string or a list, got dict"),
        ({"prompt": ["a", 7]}, "the prompt must be text, got int"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt must have one entry per prompt, 2 in all"),
        ({"prompt_embeds": np.zeros((3, 40))}, "prompt_embeds must be a list with one array per prompt"),
        ({"prompt_embeds": [np.zeros((3, 41))]}, "prompt_embeds must have shape (tokens, 40)"),
        ({"prompt_embeds": [np.full((3, 40), np.nan)]}, "prompt_embeds must be finite, got NaN"),
        ({"prompt_embeds": [np.zeros((3, 40))] * 2}, "prompt_embeds must have one entry per prompt, 1 in all, got 2"),
        ({"generator": 7}, "generator must be a torch.Generator, got int; or use seed=N"),
        ({"generator": []}, "generator is an empty list"),
        ({"generator": [Generator(1), Generator(2)]}, "one per image (1 in all), got 2"),
        ({"generator": Generator(1), "seed": 1}, "seed and generator were both given; give one"),
        ({"prompt": ["a", "b"], "latents": np.zeros(SHAPE)}, "width / 8), got (1, 16, 10, 12)"),
        ({"output_type": "pt"}, "output_type='np' and torch.from_numpy"),
        ({"joint_attention_kwargs": {"mask": 1}}, "can only contain scale, which multiplies the strengths of LoRAs"),
        ({"joint_attention_kwargs": 3}, "can only contain scale"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function, got 5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be from 1 to 1000, got 0"),
        ({"num_inference_steps": "8"}, "num_inference_steps must be a whole number, got '8'"),
        ({"joint_attention_kwargs": {"scale": "1"}}, "scale must be a number"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]}, "got 'noise'"),
        ({"callback_on_step_end": print, "prompt": ["a", "b"]}, "takes one prompt at a time"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_what_a_call_cannot_do_is_refused_before_any_work(pipe, watch, call, message):
    encoded = watch(TextEncoder, "steps")
    with pytest.raises(RequestError) as caught:
        pipe(**{"prompt": "a red fox", **RUN, **call})
    assert message in str(caught.value)
    assert not encoded


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (guidance_off, "cfg_truncation ends guidance at a given time"),
        (lambda pipe, i, t, values: {"prompt_embeds": []}, "may only change latents"),
        (lambda pipe, i, t, values: 5, "must return a dict such as {'latents': latents}, or None, got 5"),
        (lambda pipe, i, t, values: {"latents": values["latents"][:, :4]}, "width / 8), got (1, 4, 10, 12)"),
    ],
    ids=["guidance", "embeddings", "a number", "latents of another shape"],
)
def test_a_callback_that_changes_what_it_cannot_is_refused(pipe, callback, message):
    with pytest.raises(RequestError) as caught:
        pipe("a red fox", **RUN, seed=1, guidance_scale=1.0, callback_on_step_end=callback)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("used", "message"),
    [
        (lambda pipe: pipe.encode(5), "the prompt must be text, got int"),
        (lambda pipe: pipe.encode(["a"]), "the prompt must be text, got list"),
        (lambda pipe: pipe.encode_prompt(["a", 5]), "the prompt must be text, got int"),
        (lambda pipe: pipe.encode("a", 0), "max_sequence_length must be from 1 to 1504, got 0"),
        (lambda pipe: pipe.tokenize(None), "the prompt must be text, got NoneType"),
        (lambda pipe: pipe.decode(5), "latents have shape (), expected (height, width, 16)"),
        (lambda pipe: pipe.decode(np.zeros(SHAPE)), "latents have shape (1, 16, 10, 12), expected"),
        (lambda pipe: pipe.decode("x"), "latents must be an array of numbers, got 'x'"),
        (
            lambda pipe: pipe.encode_image(np.zeros((10, 16, 3))),
            "pixels have shape (10, 16, 3), expected (height, width",
        ),
        (lambda pipe: pipe.encode_image(np.zeros((16, 16, 4))), "with sides that are multiples of 8"),
    ],
)
def test_what_the_parts_of_a_pipeline_cannot_take_is_refused(pipe, used, message):
    with pytest.raises(RequestError) as caught:
        used(pipe)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 6}, "memory must be a size such as 6GB or 800MB, or a number of bytes, at least"),
        ({"keep": "yes"}, "keep must be True"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny_folder, options, message):
    with pytest.raises(RequestError, match=message):
        ZImagePipeline.from_pretrained(tiny_folder, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_is_named_by_text_or_by_mlx(tiny_folder, name, dtype):
    assert ZImagePipeline.from_pretrained(tiny_folder, **{name: dtype}).dtype == mx.bfloat16


def test_options_of_diffusers_are_explained(tiny_folder):
    with pytest.warns(UserWarning, match="low_cpu_mem_usage does nothing here: weights are only read when first used"):
        ZImagePipeline.from_pretrained(tiny_folder, low_cpu_mem_usage=False)
    with pytest.raises(RequestError, match="has no option cache_dir; set the environment variable HF_HUB_CACHE"):
        ZImagePipeline.from_pretrained(tiny_folder, cache_dir="x")
    with pytest.raises(TypeError, match="unexpected keyword argument 'memry'"):
        ZImagePipeline.from_pretrained(tiny_folder, memry="6GB")
    with pytest.raises(RequestError, match="dtype and torch_dtype were both given"):
        ZImagePipeline.from_pretrained(tiny_folder, dtype="float32", torch_dtype="float32")


def methods(kind: type, of: object) -> list[str]:
    return [name for name in dir(of) if type(getattr(type(of), name, None)) is kind]


def test_methods_of_diffusers_do_nothing_and_say_why_or_what_to_use(pipe):
    assert len(methods(Needless, pipe)) > 8 and len(methods(Elsewhere, pipe)) > 4
    for owner in (pipe, pipe.vae, pipe.transformer):
        for name in methods(Needless, owner):
            with pytest.warns(UserWarning, match=f"^{name} does nothing here: ") as caught:
                assert getattr(owner, name)("anything", at=1) is None
            assert caught[0].filename == __file__
    for name in methods(Elsewhere, pipe):
        with pytest.raises(RequestError, match=f"^there is no {name} here: "):
            getattr(pipe, name)("anything")
    with pytest.raises(RequestError, match="there is no scheduler here: pass shift= or sigmas="):
        pipe.scheduler = "Euler"
    with pytest.raises(AttributeError, match="there is no scheduler here: pass shift= or sigmas="):
        _ = pipe.scheduler.config
    with pytest.raises(AttributeError, match=r"there is no device here: .* a torch.Generator must be on the CPU"):
        _ = pipe.device
    with pytest.raises(RequestError, match="from_pretrained opens files, too"):
        ZImagePipeline.from_single_file("model.safetensors")


def test_a_pipeline_goes_to_any_device_but_to_no_other_dtype(pipe):
    with pytest.warns(UserWarning, match=r"to\('mps'\) does nothing here: MLX uses the GPU"):
        assert pipe.to("mps") is pipe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe.to(mx.float32) is pipe
    with pytest.raises(RequestError, match=r"from_pretrained\(..., dtype='float16'\)"):
        pipe.to(mx.float16)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_call_shows_a_bar_in_a_terminal_or_notebook_and_only_there(pipe, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def shown(stream) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        pipe(["a red fox", "a hare"], **RUN, seed=1)
        return stream.getvalue()

    assert "4/4" in shown(Terminal())
    assert shown(io.StringIO()) == ""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # whose stderr is not a terminal
    assert "4/4" in shown(io.StringIO())
    monkeypatch.setattr(pipe, "_bar_options", {})
    pipe.set_progress_bar_config(disable=True)
    assert shown(Terminal()) == ""
