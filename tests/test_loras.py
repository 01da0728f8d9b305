"""LoRAs of a pipeline: which requests they change, and what is reported about them."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from compare import TOLERANCE, relative_error
from lanes import slow

from mlx_zimage import GenerateRequest, Inputs, ZImagePipeline
from mlx_zimage.cli import main
from mlx_zimage.convert import convert
from mlx_zimage.errors import CheckpointError, MemoryBudgetError, ModelNotFoundError, RequestError
from mlx_zimage.images.metadata import Origin
from mlx_zimage.machine import wide_dtype
from mlx_zimage.memory import Workload
from mlx_zimage.models.text_encoder import TextEncoderConfig
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.pipeline import Overflow
from mlx_zimage.request import LoraUse
from mlx_zimage.sizes import rounded_up

SHAPES = TransformerConfig.from_dict(tiny.TRANSFORMER).shapes()
ENCODER = TextEncoderConfig.from_dict(tiny.TEXT_ENCODER).shapes()
REQUEST = GenerateRequest("a red fox", 32, 32, seed=1, steps=2)
WORK = Workload(32, 32, images=1, tokens=20, steps=8)


def write(path, seed: int, encoder: bool = False):
    """A low-rank LoRA on all matrices of the transformer's layers, adaLN's too, or on the text encoder's."""
    shapes, prefix, part = (ENCODER, "text_encoder", "layers.1.") if encoder else (SHAPES, "transformer", "layers.")
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if part in name and name.endswith(".weight") and len(shape) == 2:
            layer = f"{prefix}.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = mx.array(rng.standard_normal((2, shape[1]), np.float32) * 0.3)
            tensors[f"{layer}.lora_B.weight"] = mx.array(rng.standard_normal((shape[0], 2), np.float32) * 0.3)
    mx.save_safetensors(str(path), tensors)
    return path


@pytest.fixture
def pipe(tiny_folder) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")


@pytest.fixture
def style(tmp_path):
    return write(tmp_path / "style.safetensors", 1)


@pytest.fixture
def face(tmp_path):
    return write(tmp_path / "face.safetensors", 2)


def latents(pipe: ZImagePipeline, request: GenerateRequest = REQUEST) -> np.ndarray:
    *_, last = pipe.denoise(request)
    return np.array(last.latents)


def test_what_loras_need_is_known_before_they_are_loaded(pipe, tmp_path, style, face):
    """Also in a thread other than the one that generates; and the plan made beforehand is the one made after
    loading."""
    encoder = write(tmp_path / "words.safetensors", 3, encoder=True)
    files = {style: 0.5, face: 0.0, encoder: 1.0}
    with ThreadPoolExecutor() as pool:
        extras = pool.submit(pipe.lora_extras, files).result()
    expected = pipe.plan(REQUEST, loras=extras)
    assert expected.peak > pipe.plan(REQUEST).peak
    for file, strength in files.items():
        pipe.load_lora(file, strength=strength)
    strengths = pipe.complete(REQUEST).lora_strengths
    assert extras == pipe.networks.lora_extras(strengths)
    assert pipe.plan(REQUEST) == expected


def test_plan_shows_what_loras_need_as_generate_plans_it(tiny_folder, tmp_path, style, face):
    encoder = write(tmp_path / "words.safetensors", 3, encoder=True)
    words = ["--size", "32x32", "--tokens", "20", "--memory", "1GB", "--dtype", "float32"]
    loras = ["--lora", style, "0.5", "--lora", face, "--lora", encoder]
    run = lambda *args: CliRunner().invoke(main, ["plan", *map(str, args), *words])  # noqa: E731
    with_loras, without = run(tiny_folder, *loras), run(tiny_folder)
    assert with_loras.exit_code == 0, with_loras.output
    pipe = ZImagePipeline.from_pretrained(tiny_folder, "float32", "1GB")
    for shown, expected in ((without, {}), (with_loras, {style: 0.5, face: 1.0, encoder: 1.0})):
        work = replace(WORK, loras=pipe.lora_extras(expected))
        assert f"denoise      about {rounded_up(pipe.networks.plan(work).peaks['denoise'])}, " in shown.output
    assert with_loras.output != without.output
    refused = run(tiny_folder, "--lora", tmp_path / "none.safetensors")
    assert refused.exit_code == 3 and "none.safetensors" in refused.stderr
    other = run("--lora", style)  # of the full size
    assert other.exit_code == 4 and "style.safetensors" in other.stderr, other.output


def test_a_loaded_lora_changes_the_next_image_until_it_is_unloaded(pipe, style):
    model = latents(pipe)
    assert pipe.load_lora(style) == "style"
    loaded = latents(pipe)
    assert np.abs(loaded - model).max() > 0.01
    pipe.set_loras({"style": 0.5})
    assert np.abs(latents(pipe) - loaded).max() > 0.01
    pipe.set_loras({"style": 0.0})
    np.testing.assert_array_equal(latents(pipe), model)
    pipe.set_loras({"style": 1.0})
    np.testing.assert_array_equal(latents(pipe), loaded)
    pipe.unload_lora("style")
    np.testing.assert_array_equal(latents(pipe), model)


MASKED = Inputs(image=tiny.photo(), mask_image=tiny.mask())
FROM_IMAGES = {
    "image": ({"strength": 0.5}, replace(MASKED, mask_image=None)),
    "mask": ({"mask_resample": 1}, MASKED),
    "outpaint": ({"outpaint": "left=16", "mask_resample": 1}, replace(MASKED, mask_image=None)),
    "upscale": ({"upscale": 1.5, "tile": 96}, replace(MASKED, mask_image=None)),
    "guided": ({"strength": 0.5, "guidance_scale": 2.0, "negative_prompt": "blurry"}, replace(MASKED, mask_image=None)),
}


@pytest.mark.parametrize("kind", [kind if kind == "mask" else slow(kind) for kind in FROM_IMAGES])
def test_a_lora_changes_what_is_made_of_an_image_as_if_fused(pipe, style, tmp_path, kind):
    changes, inputs = FROM_IMAGES[kind]
    request = GenerateRequest("a red fox", seed=1, steps=4, **changes)
    last = lambda pipe: [step.latents for step in pipe.denoise(request, inputs)][-1]  # noqa: E731
    model = last(pipe)
    pipe.load_lora(style, strength=0.7)
    convert(pipe.checkpoint.folder, tmp_path / "fused", dtype="float32", loras=[(style, 0.7)])
    fused = ZImagePipeline.from_pretrained(tmp_path / "fused", dtype="float32")
    # float32: only the order of the sums differs
    assert relative_error(last(pipe), last(fused)) < TOLERANCE < relative_error(last(pipe), model)


def test_a_request_may_choose_its_own_among_the_loaded_ones(pipe, style, face):
    pipe.load_lora(style)
    only_style = latents(pipe)
    pipe.load_lora(face)
    both = latents(pipe)
    chosen = replace(REQUEST, loras=[{"name": "style", "strength": 1}])
    np.testing.assert_array_equal(latents(pipe, chosen), only_style)
    np.testing.assert_array_equal(latents(pipe), both)


def test_a_lora_for_the_text_encoder_changes_embeddings_which_are_cached_separately(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_ZIMAGE_EMBEDDINGS", str(tmp_path / "cache"))
    pipe = ZImagePipeline.from_pretrained(pipe.checkpoint.folder, dtype="float32")
    model = np.array(pipe.encode("a fox"))
    pipe.load_lora(write(tmp_path / "words.safetensors", 3, encoder=True))
    changed = np.array(pipe.encode("a fox"))
    assert np.abs(changed - model).max() > 0.01
    pipe.set_loras({})
    np.testing.assert_array_equal(np.array(pipe.encode("a fox")), model)
    again = ZImagePipeline.from_pretrained(pipe.checkpoint.folder, dtype="float32")
    np.testing.assert_array_equal(np.array(again.encode("a fox")), model)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_an_images_metadata_names_its_loras_and_replays_them(pipe, style):
    pipe.load_lora(style, strength=0.75)
    completed = pipe.complete(REQUEST)
    origin = Origin(completed, "tiny", "0123456789", "float32")
    (use,) = Origin.from_json(origin.to_json()).request.loras
    assert use == LoraUse("style", 0.75, pipe._loras["style"].sha256)
    before = latents(pipe)
    pipe.set_loras({})
    np.testing.assert_array_equal(latents(pipe, Origin.from_json(origin.to_json()).request), before)
    pipe.unload_lora("style")
    with pytest.raises(RequestError, match=r"uses LoRA 'style'.*not loaded; load that file first"):
        latents(pipe, completed)


def test_diffusers_scale_multiplies_the_strengths_of_one_call(pipe, style, face):
    pipe.load_lora(style, strength=0.5)
    pipe.load_lora(face)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    scaled = pipe("a red fox", **call, joint_attention_kwargs={"scale": 0.5}).images
    assert np.abs(pipe("a red fox", **call).images - scaled).max() > 0.01
    pipe.set_loras({"style": 0.25, "face": 0.5})
    np.testing.assert_array_equal(pipe("a red fox", **call).images, scaled)


def test_diffusers_methods_do_the_same(pipe, style, face):
    pipe.load_lora_weights(style.parent, weight_name="style.safetensors", adapter_name="a")
    pipe.load_lora_weights(str(face), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    assert [(use.name, use.strength) for use in pipe.complete(REQUEST).loras] == [("a", 0.7), ("b", 0.3)]
    pipe.set_adapters("b")
    assert pipe.get_active_adapters() == ["b"] and pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    pipe.delete_adapters("b")
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}
    with pytest.raises(RequestError, match="mlx-zimage fuse"):
        pipe.fuse_lora()


@pytest.mark.parametrize("names", [3, None, [3], [["a"]], 1.5, {1: 2}])
def test_what_is_not_a_name_of_an_adapter_is_refused(pipe, names):
    for method in (pipe.set_adapters, pipe.delete_adapters):
        with pytest.raises(RequestError, match="adapter_names must be a LoRA's name or a list of names, got "):
            method(names)


@pytest.mark.parametrize("name", [3, None, ["a"], {}])
def test_what_is_not_a_name_of_a_lora_is_refused(pipe, name):
    with pytest.raises(RequestError, match="no LoRA is loaded as"):
        pipe.unload_lora(name)
    for weights in ("high", [None], [[1]], float("nan"), 10**400):
        with pytest.raises(RequestError):
            pipe.set_adapters("a", weights)


def test_the_plan_counts_loras(pipe, style):
    request = pipe.complete(REQUEST)
    without = pipe.plan(request).peaks
    pipe.load_lora(style)
    held = sum(tensor.nbytes for tensor in mx.load(str(style)).values())
    with_lora = pipe.plan(REQUEST).peaks
    assert all(with_lora[stage] >= without[stage] + held for stage in without)


def factors(kind: str, rows: int, columns: int) -> dict[str, mx.array]:
    """The parts of a layer's difference in a file."""
    low = {"lora_A.weight": mx.ones((16, columns)), "lora_B.weight": mx.ones((rows, 16))}
    return {
        "low rank": low,
        "LoKr": {"lokr_w1": mx.ones((8, 8)), "lokr_w2": mx.ones((rows // 8, columns // 8))},
        "LoHa": {f"hada_w{n}_{x}": mx.ones((rows, 4) if x == "a" else (4, columns)) for n in (1, 2) for x in "ab"},
        "DoRA": low | {"dora_scale": mx.ones((rows, 1))},
        "DoRA of LoKr by column": {
            "lokr_w1": mx.ones((8, 8)),
            "lokr_w2": mx.ones((rows // 8, columns // 8)),
            "dora_scale": mx.ones((1, columns)),
        },
        "whole": {"diff": mx.ones((rows, columns))},
    }[kind]


KINDS = ["low rank", "LoKr", "LoHa", "DoRA", "DoRA of LoKr by column", "whole"]


def write_kind(path, kind: str, config, seed: int | None = None):
    """A LoRA of one kind on all matrices of attention and feed-forward, of ones or, with a seed, of random numbers."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in config.shapes().items():
        if name.startswith("layers") and name.endswith(".weight") and len(shape) == 2 and "adaLN" not in name:
            for part, array in factors(kind, *shape).items():
                own = mx.array(rng.uniform(0, 0.1, array.shape).astype(np.float32)) if seed is not None else array
                tensors[f"diffusion_model.{name.removesuffix('.weight')}.{part}"] = own
    mx.save_safetensors(str(path), tensors)
    return path


@pytest.mark.parametrize("kind", [kind if kind == "DoRA" else slow(kind) for kind in KINDS])
@pytest.mark.parametrize(
    ("dtype", "side"), [("bfloat16", 64), slow("float32", 64), slow("bfloat16", 192), slow("float32", 192)]
)
def test_memory_under_loras_stays_within_the_plan(small_pocket, tmp_path, kind, dtype, side):
    gc.collect()
    others = mx.get_active_memory()  # models of other tests
    pipe = ZImagePipeline.from_pretrained(small_pocket, dtype=dtype, keep=False)
    request = GenerateRequest("a red circle", side, side, seed=1, steps=2, loras=[LoraUse("lora", 1e-3)])
    pipe.load_lora(write_kind(tmp_path / "lora.safetensors", kind, pipe.transformer.config))
    plan = pipe.plan(request)
    mx.clear_cache()
    mx.reset_peak_memory()
    list(pipe.stream(request))
    assert mx.get_peak_memory() - others <= plan.peak


def test_loras_over_weights_streamed_in_a_tight_budget_give_the_same_bits(small_pocket, tmp_path):
    request = GenerateRequest("a red circle", 64, 64, seed=1, steps=2)
    files = [("a", "low rank"), ("b", "DoRA")]
    found = []
    for tight in (False, True):
        pipe = None
        gc.collect()
        before = mx.get_active_memory()  # what other tests hold
        pipe = ZImagePipeline.from_pretrained(small_pocket, dtype="float32")
        for i, (name, kind) in enumerate(files):
            pipe.load_lora(write_kind(tmp_path / f"{name}.safetensors", kind, pipe.transformer.config, i), strength=0.5)
        if tight:
            pipe.budget = smallest(pipe, request)
            plan = pipe.plan(request)
            assert plan.streamed
            mx.clear_cache()
            mx.reset_peak_memory()
        *_, image = pipe.stream(request)
        found.append(image.pixels)
    assert mx.get_peak_memory() - before <= plan.peak
    np.testing.assert_array_equal(*found)


def smallest(pipe: ZImagePipeline, request: GenerateRequest) -> int:
    """The smallest budget in which the request can be planned, to 1 MB."""
    budget = 1 << 20
    while True:
        pipe.budget = budget
        try:
            pipe.plan(request)
            return budget
        except MemoryBudgetError:
            budget += 1 << 20


def test_an_image_that_only_a_lora_takes_beyond_float16_is_redone_in_bfloat16_with_it(tiny_folder, tmp_path):
    path, tensors = tmp_path / "loud.safetensors", {}
    for layer, (rows, columns) in {"w3": (128, 48), "to_v": (48, 48)}.items():
        part = "feed_forward" if layer == "w3" else "attention"
        tensors[f"transformer.layers.0.{part}.{layer}.lora_A.weight"] = mx.full((2, columns), 300.0)
        tensors[f"transformer.layers.0.{part}.{layer}.lora_B.weight"] = mx.full((rows, 2), 300.0)
    mx.save_safetensors(str(path), tensors)
    pipe, wide = (ZImagePipeline.from_pretrained(tiny_folder, dtype=dtype) for dtype in ("float16", wide_dtype()))
    plain = latents(pipe)
    pipe.load_lora(path)
    wide.load_lora(path)
    with pytest.warns(Overflow):
        found = latents(pipe)
    np.testing.assert_array_equal(found, latents(wide))
    pipe.set_loras({})
    assert np.isfinite(plain).all() and np.abs(found - latents(pipe)).max() > 0.01


@pytest.mark.slow
def test_200_images_cycling_through_three_loras_and_none_have_the_same_hashes_each_time_in_constant_memory(tmp_path):
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32")
    names = ["low rank", "LoKr", "DoRA"]
    for i, kind in enumerate(names):
        pipe.load_lora(write_kind(tmp_path / f"{i}.safetensors", kind, pipe.transformer.config, i), kind)
    seen: dict[str, set[str]] = {}
    memory = []
    for i in range(200):
        kind = [*names, "none"][i % 4]
        uses = [LoraUse(kind, 0.5)] if kind in names else []
        *_, image = pipe.stream(GenerateRequest("a red circle", 48, 48, seed=1, steps=2, loras=uses))
        seen.setdefault(kind, set()).add(sha256(image.pixels.tobytes()).hexdigest())
        del image
        memory.append(mx.get_active_memory())
    assert all(len(hashes) == 1 for hashes in seen.values()) and len(set.union(*seen.values())) == 4
    assert max(memory[100:]) <= max(memory[:100])


def test_wrong_loras_are_refused_before_anything_is_computed(pipe, style, face, tmp_path):
    pipe.load_lora(style, name="a")
    refused = {
        lambda: pipe.load_lora(tmp_path / "none"): (ModelNotFoundError, "no LoRA at"),
        lambda: pipe.load_lora(style, name="b"): (RequestError, "already loaded as 'a'"),
        lambda: pipe.load_lora(face, name="a"): (RequestError, "another LoRA is loaded as 'a'"),
        lambda: pipe.load_lora(face, strength=float("nan")): (RequestError, "strength of LoRA face"),
        lambda: pipe.load_lora(face, name=""): (RequestError, "a LoRA's name must be"),
        lambda: pipe.set_loras({"c": 1}): (RequestError, r"no LoRA is loaded as 'c' \(loaded: 'a'\)"),
        lambda: pipe.load_lora({"x": style}): (RequestError, "must be a file or a Hugging Face id, got dict"),
        lambda: pipe.load_lora_weights({}, weight_name="x"): (RequestError, "a file or a Hugging Face id, got dict"),
        lambda: pipe.set_loras(["a"]): (RequestError, r"takes strengths by name, such as .*, got \['a'\]"),
        lambda: pipe.set_loras({"a": "strong"}): (RequestError, "strength of LoRA a must be a number"),
        lambda: latents(pipe, replace(REQUEST, loras=[LoraUse("a"), LoraUse("a", 2)])): (
            RequestError,
            "uses LoRA 'a' twice",
        ),
        lambda: replace(REQUEST, loras=[{"path": "x"}]): (RequestError, "must be an object with name"),
        lambda: replace(REQUEST, loras="a"): (RequestError, "loras must be a list"),
        lambda: pipe.load_lora(next(pipe.checkpoint.folder.glob("vae/*.safetensors"))): (
            CheckpointError,
            "a full checkpoint",
        ),
    }
    for call, (error, message) in refused.items():
        with pytest.raises(error, match=message):
            call()
    assert pipe.get_active_adapters() == ["a"]


def test_a_partially_matching_lora_warns_about_the_rest(pipe, style):
    tensors = dict(mx.load(str(style))) | {"transformer.layers.77.attention.to_q.lora_A.weight": mx.zeros((2, 48))}
    mx.save_safetensors(str(style), tensors)
    with pytest.raises(CheckpointError, match="1 of"):
        pipe.load_lora(style)
    with pytest.warns(UserWarning, match=r"ignoring keys that match no layer \(1 in all\)"):
        pipe.load_lora(style, partial=True)
