import json
import re
from dataclasses import asdict, replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mlx_zimage.errors import RequestError
from mlx_zimage.images.files import save
from mlx_zimage.images.metadata import AI_MADE, Origin, parameters, read_origin
from mlx_zimage.request import GenerateRequest
from mlx_zimage.weights.checkpoint import fingerprint, open_checkpoint

ENDINGS = ["png", "jpg", "webp"]
PIXELS = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture
def origin():
    request = GenerateRequest(
        "一只猫, 'a \"cat\" <&>'\n--zimage:", 640, 480, seed=2**64 - 1, shift=2.5, latents="ab" * 32
    )
    return Origin(request, "my model", "0123456789", "bfloat16", index=2)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_origin_of_an_image_is_read_back(tmp_path, origin, ending):
    assert read_origin(save(PIXELS, tmp_path / f"a.{ending}", origin=origin)) == origin


def test_the_speeds_of_machines_are_stored_if_they_differ(origin):
    assert "speeds" not in json.loads(origin.to_json())
    shared = replace(origin, speeds=(2.4, 1.0))
    assert Origin.from_json(shared.to_json()) == shared
    for wrong in ([1, 0], [1, "2"], "12", [True], 3):
        with pytest.raises(RequestError, match="not written by mlx-zimage"):
            Origin.from_json(json.dumps(json.loads(origin.to_json()) | {"speeds": wrong}))


def test_latents_are_stored_where_older_versions_expect_them(origin):
    fields = json.loads(origin.to_json())
    assert fields["latents"] == "ab" * 32 and "latents" not in fields["request"]
    assert Origin.from_json(json.dumps(fields)) == origin


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_origin_gives_the_same_bytes(tmp_path, origin, ending):
    files = [save(PIXELS, tmp_path / f"a.{ending}", origin=origin) for _ in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("ending", ENDINGS)
def test_xmp_is_well_formed_and_declares_that_a_model_made_the_image(tmp_path, origin, ending):
    with Image.open(save(PIXELS, tmp_path / f"a.{ending}", origin=origin)) as image:
        xmp = image.info["xmp"].rstrip(b"\0")
    (description,) = ElementTree.fromstring(xmp).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == AI_MADE


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_image_without_an_origin_contains_only_pixels(tmp_path, ending):
    with Image.open(save(PIXELS, tmp_path / f"a.{ending}")) as image:
        image.load()
        assert not {"xmp", "exif", "parameters", "comment", "XML:com.adobe.xmp"} & image.info.keys()
    with pytest.raises(RequestError, match="contains no mlx-zimage or mflux metadata"):
        read_origin(tmp_path / f"a.{ending}")


def test_parameters_are_in_the_format_of_a1111(tmp_path):
    request = GenerateRequest("a cat", 640, 480, seed=7, steps=8, guidance_scale=1.5, negative_prompt="dog")
    origin = Origin(request, "z, image", "0123456789", "bfloat16", software="mlx-zimage 9")
    text = (
        "a cat\nNegative prompt: dog\nSteps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 2.5, Seed: 7, "
        'Size: 640x480, Model hash: 0123456789, Model: "z, image", RNG: CPU, Version: mlx-zimage 9'
    )
    assert parameters(origin) == text
    # A1111's own pattern for the last line, modules/infotext_utils.py
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.splitlines()[-1])
    assert dict(pairs)["Seed"] == "7"
    with Image.open(save(PIXELS, tmp_path / "a.png", origin=origin)) as image:
        assert image.text["parameters"] == text
    for ending in ("jpg", "webp"):
        with Image.open(save(PIXELS, tmp_path / f"a.{ending}", origin=origin)) as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + text.encode("utf-16-be")


@pytest.mark.parametrize("prompt", ["a cat", "一只猫\nin two lines, \U0001f431"])
@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_piexif_and_therefore_a1111_can_read_the_user_comment(tmp_path, origin, ending, prompt):
    piexif, helper = pytest.importorskip("piexif"), pytest.importorskip("piexif.helper")
    origin = replace(origin, request=replace(origin.request, prompt=prompt))
    file = save(PIXELS, tmp_path / f"a.{ending}", origin=origin)
    with Image.open(file) as image:
        exif = piexif.load(image.info["exif"])
    # as modules/images.py of A1111 does
    assert helper.UserComment.load(exif["Exif"][piexif.ExifIFD.UserComment]) == parameters(origin)
    assert piexif.load(str(file)) == exif
    assert {tag: len(values or {}) for tag, values in exif.items() if values} == {"0th": 1, "Exif": 1}


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_images_of_older_versions_with_a_user_comment_of_type_byte_are_read(tmp_path, origin, ending):
    file, old = save(PIXELS, tmp_path / f"a.{ending}", origin=origin), Image.Exif()
    old.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + parameters(origin).encode("utf-16-be")
    with Image.open(file) as image:
        image.save(tmp_path / f"old.{ending}", xmp=image.info["xmp"], exif=old.tobytes())
    assert read_origin(tmp_path / f"old.{ending}") == origin


def test_the_longest_prompt_fits_in_png_and_webp_and_a_jpeg_warns(tmp_path, origin):
    origin = replace(origin, request=replace(origin.request, prompt="猫" * 32_000))
    for ending in ("png", "webp"):
        assert read_origin(save(PIXELS, tmp_path / f"a.{ending}", origin=origin)) == origin
    with pytest.warns(UserWarning, match="the request is too long to store in a JPEG"):
        save(PIXELS, tmp_path / "a.jpg", origin=origin)
    assert AI_MADE.encode() in (tmp_path / "a.jpg").read_bytes()


@pytest.mark.parametrize(
    "text", ["a\0b", "\x1b[2J", "￾", "]]>", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]
)
def test_unusual_characters_are_read_back(tmp_path, origin, text):
    origin = replace(origin, request=replace(origin.request, prompt=text))
    for ending in ENDINGS:
        assert read_origin(save(PIXELS, tmp_path / f"a.{ending}", origin=origin)) == origin


def forged(origin, **changes) -> str:
    return json.dumps({**asdict(origin), **changes})


def test_foreign_or_forged_metadata_is_refused(origin):
    bad_request = {**asdict(origin.request), "width": 17}
    for text in (
        "", "[]", "{}", "null", "[" * 100_000, '{"request": 1}',
        forged(origin, request=bad_request),
        forged(origin, request={**asdict(origin.request), "command": "rm"}),
        forged(origin, model="\x1b[2Jpocket"),
        forged(origin, model=["pocket"]),
        forged(origin, model="x" * 1000),
        forged(origin, index="0"),
        forged(origin, path="/etc/passwd"),
    ):  # fmt: skip
        with pytest.raises(RequestError):
            Origin.from_json(text)


def test_a_file_that_is_not_an_image_is_refused(tmp_path, origin):
    whole = save(PIXELS, tmp_path / "a.png", origin=origin).read_bytes()
    Image.fromarray(PIXELS).save(tmp_path / "a.bmp")
    for content in (b"", b"text", whole[:20], (tmp_path / "a.bmp").read_bytes()):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(RequestError, match=r"b\.png"):
            read_origin(tmp_path / "b.png")
    with pytest.raises(RequestError, match="no image at"):
        read_origin(tmp_path / "none.png")


def test_a_fingerprint_depends_on_the_weights_but_not_on_their_location(tmp_path):
    import shutil

    from mlx_zimage.weights.hub import POCKET

    pocket = fingerprint(open_checkpoint("pocket"))
    assert re.fullmatch(r"[0-9a-f]{10}", pocket)
    shutil.copytree(POCKET, tmp_path / "copy")
    assert fingerprint(open_checkpoint(tmp_path / "copy")) == pocket
    file = tmp_path / "copy/vae/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    assert fingerprint(open_checkpoint(tmp_path / "copy")) != pocket
