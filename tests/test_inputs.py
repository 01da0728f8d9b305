"""The arrays passed alongside a request: read, checked, and identified by digest."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest

from mlx_zimage import GenerateRequest, RequestError, ZImagePipeline
from mlx_zimage.inputs import NONE, Inputs, read_latents

REQUEST = GenerateRequest("a red circle", width=32, height=48, seed=1, steps=1)
LATENTS = np.random.default_rng(0).standard_normal((1, 16, 6, 4))


def test_latents_are_read_exactly_as_saved(tmp_path):
    for dtype in ("float16", "float32", "float64"):
        latents = np.random.default_rng(0).standard_normal((2, 16, 4, 6)).astype(dtype)
        np.save(tmp_path / "a.npy", latents)
        assert np.array_equal(read_latents(tmp_path / "a.npy"), latents)


def test_a_pickle_in_a_latents_file_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "a.npy", np.array([Trap()]), allow_pickle=True)
    with pytest.raises(RequestError, match="npy file of numbers"):
        read_latents(tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()


def test_truncated_or_foreign_latents_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 16, 4, 4)))
    whole = (tmp_path / "a.npy").read_bytes()
    for content in (whole[:100], whole[:-1], b"", b"PK\x03\x04" + whole):
        (tmp_path / "b.npy").write_bytes(content)
        with pytest.raises(RequestError, match="npy file of numbers"):
            read_latents(tmp_path / "b.npy")
    for latents in (np.zeros((16, 4, 4)), np.zeros((1, 16, 4, 4), dtype=complex), np.array(["a"])):
        np.save(tmp_path / "b.npy", latents)
        with pytest.raises(RequestError, match="expected numbers of shape"):
            read_latents(tmp_path / "b.npy")


def test_a_digest_depends_only_on_the_numbers():
    wanted = hashlib.sha256(LATENTS.astype("<f4").tobytes()).hexdigest()
    for same in (LATENTS, LATENTS.astype(">f4"), mx.array(LATENTS.astype(np.float32)), LATENTS.tolist()):
        assert Inputs(same).digests == {"latents": wanted}
    assert Inputs(LATENTS + 1).digests != {"latents": wanted}
    assert NONE.digests == {}


def test_a_request_for_other_latents_is_refused():
    inputs = Inputs(LATENTS)
    digest = inputs.digests["latents"]
    for inputs_of, named in ((inputs, None), (inputs, digest), (NONE, None)):
        inputs_of.check_named({"latents": named})
    with pytest.raises(RequestError, match=f"expects latents with SHA-256 {digest}, but got none"):
        NONE.check_named(inputs.digests)
    with pytest.raises(RequestError, match=f"SHA-256 {digest}, but got [0-9a-f]{{64}}$"):
        Inputs(LATENTS + 1).check_named(inputs.digests)
    with pytest.raises(RequestError, match=f"expects prompt_embeds with SHA-256 {digest}, but got none"):
        inputs.check_named({"latents": digest, "prompt_embeds": digest})
    with pytest.raises(RequestError, match="latents must be the SHA-256 of an array"):
        GenerateRequest("a", seed=1, latents="../secret")


def test_a_request_records_its_latents_and_requires_them_again(pipe):
    *_, image = pipe.stream(REQUEST, LATENTS)
    assert image.request.latents == Inputs(LATENTS).digests["latents"]
    *_, again = pipe.stream(image.request, Inputs(LATENTS))
    assert np.array_equal(again.pixels, image.pixels)
    with pytest.raises(RequestError, match="got none"):
        next(pipe.stream(image.request))


def test_size_and_steps_may_be_missing_until_a_model_fills_them_in():
    pocket = ZImagePipeline.from_pretrained("pocket")
    open_ended = GenerateRequest("a red circle", seed=1)
    assert (open_ended.width, open_ended.height, open_ended.steps, open_ended.guidance_scale) == (None,) * 4
    with pytest.raises(RequestError, match="no size or steps yet"):
        _ = open_ended.extent
    assert pocket.complete(open_ended).extent == (128, 128, 8)
    assert pocket.complete(open_ended).guidance_scale == 0
    own = GenerateRequest("a red circle", 64, seed=1, steps=3)
    assert pocket.complete(own).extent == (64, 128, 3)
    assert pocket.plan(open_ended) == pocket.plan(pocket.complete(open_ended))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'seed'"):
        GenerateRequest("a red circle")
    with pytest.raises(RequestError, match=r"incomplete request: .* 'seed'"):
        GenerateRequest.from_dict({"prompt": "a red circle"})


def test_the_deprecated_name_of_inputs_works_with_a_warning(pipe):
    *_, image = pipe.stream(REQUEST, LATENTS)
    for take in (pipe.stream, pipe.events):
        with pytest.warns(DeprecationWarning, match="latents= is now inputs="):
            *_, same = take(REQUEST, latents=LATENTS)
        assert np.array_equal(same.pixels, image.pixels)
    with pytest.warns(DeprecationWarning, match="latents= is now inputs="):
        *_, last = pipe.denoise(REQUEST, latents=LATENTS)
    assert last.index == 0
