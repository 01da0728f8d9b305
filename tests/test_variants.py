"""Which model of the family a folder contains, and the defaults that follow."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from lanes import slow
from PIL import Image

from mlx_zimage import GenerateRequest, Inputs, RequestError, ZImagePipeline, cli
from mlx_zimage.variants import BASE, DE_TURBO, TURBO, VARIANTS, recognize
from mlx_zimage.weights import official
from mlx_zimage.weights.checkpoint import open_checkpoint


def shift(folder, value: float) -> None:
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(official.SCHEDULER | {"shift": value}))


def test_a_variant_is_recognized_by_its_shift(folder):
    assert open_checkpoint(folder).variant == TURBO
    shift(folder, 6.0)
    assert open_checkpoint(folder).variant == BASE
    shift(folder, 4.5)
    assert open_checkpoint(folder).variant == TURBO, "of a model trained further"


def test_the_converters_record_overrides_the_shift(folder):
    record = {"source": "my-folder", "before": {"source": BASE.repository}}
    (folder / "conversion.json").write_text(json.dumps(record))
    assert open_checkpoint(folder).variant == BASE
    assert recognize(6.0, ["elsewhere", TURBO.repository, BASE.repository]) == TURBO, "the newest that is known"


@pytest.mark.parametrize(
    "name",
    ["z_image_de_turbo_v1_bf16.safetensors", "ostris/Z-Image-De-Turbo", "ostris/Z-Image-De-Turbo:x.safetensors"],
)
def test_de_turbo_is_recognized_by_the_name_of_its_file_or_repository(folder, name):
    assert recognize(3.0, [name]) == DE_TURBO
    assert (DE_TURBO.steps, DE_TURBO.guidance_scale, DE_TURBO.takes_guidance) == (25, 2.0, True), "cfg 3"
    record = {"source": TURBO.repository, "parts": {"transformer": name}}
    (folder / "conversion.json").write_text(json.dumps(record))
    assert open_checkpoint(folder).variant == DE_TURBO


def test_a_de_turbo_file_has_the_defaults_of_de_turbo(folder, tmp_path):
    file = tmp_path / "z_image_de_turbo_v1_bf16.safetensors"
    tensors = {
        name: a for shard in (folder / "transformer").glob("*.safetensors") for name, a in mx.load(str(shard)).items()
    }
    mx.save_safetensors(str(file), tensors)
    pipe = ZImagePipeline.from_pretrained(folder, transformer=file, dtype="float32")
    request = pipe.complete(GenerateRequest("a red fox", seed=1))
    assert (request.steps, request.guidance_scale) == (25, 2.0)


def test_a_de_turbo_file_of_another_name_works_with_flags(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "renamed")
    Image.fromarray(tiny.photo()).save("a.png")
    common = ["generate", "a red fox", "-m", "renamed", "--seed", "1", "-q", "--json", "--image", "a.png"]
    for options, strength in (["--variant", "de-turbo"], 0.2), (["--steps", "25", "--guidance", "2"], 0.2):
        named = options[0] == "--variant"
        result = CliRunner().invoke(cli.main, [*common, *options, "--strength", str(strength), "-o", f"{named}.png"])
        assert result.exit_code == 0, result.stderr
        assert ("guidance" in result.stderr) is not named, "Turbo does not know it"
        request = json.loads(result.stdout)["request"]
        assert (request["steps"], request["guidance_scale"], request["strength"]) == (25, 2.0, strength)
    assert np.array_equal(*(np.asarray(Image.open(f"{named}.png")) for named in (True, False)))


def test_a_damaged_record_is_ignored(folder):
    (folder / "conversion.json").write_text("{broken")
    assert open_checkpoint(folder).variant == TURBO


def test_a_named_variant_overrides_both(folder):
    shift(folder, 6.0)
    turbo = ZImagePipeline.from_pretrained(folder, variant="turbo")
    assert (turbo.variant, turbo.checkpoint.scheduler.shift) == (TURBO, TURBO.shift), "as is its schedule"
    shift(folder, 4.5)
    assert open_checkpoint(folder, "base").scheduler.shift == BASE.shift
    shift(folder, 6.0)
    assert open_checkpoint(folder, "base").scheduler.shift == 6.0
    with pytest.raises(
        RequestError, match=r"must be turbo, base or de-turbo, since .* has no file variants; got 'omni'"
    ):
        open_checkpoint(folder, "omni")


@pytest.mark.parametrize(
    "variant",
    [slow(one) if one == DE_TURBO else one for one in VARIANTS.values()],
    ids=lambda variant: variant.name,
)
def test_a_pipeline_has_the_defaults_of_its_variant(folder, watch, variant):
    from mlx_zimage.models.transformer import Transformer

    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32", variant=variant.name)
    calls = watch(Transformer, "finish")
    out = pipe("a red fox", width=16, height=16, seed=1, output_type="latent")
    assert out.images.shape == (1, 16, 2, 2)
    assert len(calls) == variant.steps * (2 if variant.guidance_scale else 1)
    assert bool(variant.guidance_scale) == variant.takes_guidance


def test_base_starts_from_images_with_its_own_steps_and_guidance(folder, watch):
    from mlx_zimage.models.transformer import Transformer

    inputs = Inputs(image=tiny.photo(), mask_image=tiny.mask())
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32", variant="base")
    request = pipe.complete(GenerateRequest("a red fox", seed=1, strength=0.1, mask_resample=0), inputs)
    assert (request.steps, request.guidance_scale, len(pipe.sigmas(request))) == (50, 4.0, 6)
    calls = watch(Transformer, "finish")
    *steps, image = pipe.stream(request, inputs)
    assert (len(steps), len(calls)) == (5, 10)
    changed = (image.pixels != tiny.photo()).any(axis=2)
    assert changed.any() and not changed[tiny.mask() == 0].any()
