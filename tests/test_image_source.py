"""Reading images that somebody gives; see mlx_zimage/images/source.py."""

import contextlib
import io
import itertools
import math
import os
import re
import struct
import sys
import zlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import measured
from PIL import Image, ImageCms, ImageFile, features

from mlx_zimage.errors import RequestError
from mlx_zimage.images import source
from mlx_zimage.images.source import LIMITS, Limit, cover, digest, fit_size, over_white, read_image

AVIF = ["AVIF"] if features.check("avif") else []  # Pillow 11.3 or newer
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def photo() -> Image.Image:
    """48x32, smooth, so that lossy formats keep it within a few levels."""
    y, x = np.mgrid[:32, :48]
    return Image.fromarray(np.stack([4 * x, 6 * y, 255 - 2 * x - 3 * y], -1).astype(np.uint8))


def saved(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(width: int, height: int, kind: int = 2, depth: int = 8, rows: bytes = b"", **chunks: bytes) -> bytes:
    """A PNG file of these bytes (filter bytes included), with more chunks before its pixels."""
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0), **chunks}
    parts |= {"IDAT": zlib.compress(rows), "IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in parts.items():
        named = name.encode() + body
        content += struct.pack(">I", len(body)) + named + struct.pack(">I", zlib.crc32(named))
    return content


# ---- formats


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "WEBP"])
def test_a_lossless_file_is_read_exactly(tmp_path, photo, format):
    path = tmp_path / "photo"
    path.write_bytes(saved(photo, format, **({"lossless": True} if format == "WEBP" else {})))
    assert read_image(path) == read_image(str(path)) == read_image(path.read_bytes()) == photo


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "MPO", *AVIF])
def test_lossy_formats_are_read_closely(photo, format):
    many = {"save_all": True, "append_images": [Image.new("RGB", photo.size)]} if format in ("GIF", "MPO") else {}
    # an MPO, which some phones write, is a JPEG with further images in it
    image = read_image(saved(photo, format, **many))
    off = np.abs(np.asarray(image, int) - np.asarray(photo, int))
    assert image.mode == "RGB" and off.mean() < 6, off.mean()  # GIF has 256 colours: 4.6


def test_other_formats_are_refused_whatever_their_suffix(tmp_path, photo):
    for format in ("PPM", "TGA", "ICO", "EPS", "PDF"):
        path = tmp_path / "photo.png"
        path.write_bytes(saved(photo, format))
        with pytest.raises(RequestError, match=r"photo\.png is not an image that can be read; expected PNG, JPEG"):
            read_image(path)


def test_heic_is_read_upright_with_its_library(photo):
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(photo.resize((96, 64))).save(stream, quality=95)
    image = read_image(stream.getvalue())
    assert image.size == (96, 64) and image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(photo.resize((96, 64)), int)).mean() < 6


def test_heic_without_its_library_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(RequestError, match=r"IMG_1\.HEIC is HEIC, which needs.*pip install 'mlx-zimage\[heif\]'"):
        read_image(tmp_path / "IMG_1.HEIC")


def test_avif_without_pillows_decoder_names_the_version(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    with pytest.raises(RequestError, match=r"AVIF, which needs Pillow 11\.3"):
        read_image(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100))


# ---- what a file says about its pixels


WITHOUT_LOSS = {"JPEG": {"subsampling": 0}, "AVIF": {"subsampling": "4:4:4", "quality": 100}}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", *AVIF])
def test_a_photo_is_turned_upright(format, orientation):
    corners = Image.new("RGB", (32, 16), WHITE)
    corners.paste(RED, (0, 0, 16, 8))  # top left
    corners.paste(BLUE, (16, 8, 32, 16))  # bottom right
    stored_as = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the inverse of what EXIF asks for
    stored = corners if stored_as is None else corners.transpose(Image.Transpose(stored_as))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(saved(stored, format, exif=exif, **WITHOUT_LOSS.get(format, {})))
    assert image.size == (32, 16)
    for at, colour in (((4, 4), RED), ((28, 12), BLUE), ((28, 4), WHITE), ((4, 12), WHITE)):
        assert np.abs(np.subtract(image.getpixel(at), colour)).max() < 8, at


def test_an_image_from_pillow_is_left_as_it_was(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    given = Image.open(io.BytesIO(saved(photo, "PNG", exif=exif)))
    assert read_image(given).size == (32, 48)
    assert given.size == (48, 32) and given.getexif()[0x0112] == 6


def test_a_bmp_of_runs_is_read_exactly(photo):
    grey = photo.resize((640, 480)).convert("L")  # more runs than a file may have parts
    assert read_image(run_lengths(grey)) == grey.convert("RGB")


def test_16_bit_grey_keeps_its_levels():
    levels = np.linspace(0, 65535, 32 * 16).astype(np.uint16).reshape(16, 32)
    for format in ("PNG", "TIFF"):
        image = np.asarray(read_image(saved(Image.fromarray(levels), format)))
        assert np.array_equal(image, np.repeat((levels / 257).round().astype(np.uint8)[..., None], 3, 2))


def test_16_bit_colour_keeps_its_levels():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 32768, 65535, 4660, 257, 65280) for _ in range(2))
    pixels = np.asarray(read_image(png(2, 2, depth=16, rows=rows)))
    assert np.abs(pixels[0].astype(int) - [[0, 128, 255], [18, 1, 254]]).max() <= 1


def test_16_bit_grey_may_have_a_transparent_level():
    rows = b"".join(b"\0" + struct.pack(">3H", 1000, 1001, 65535) for _ in range(2))
    image = read_image(png(3, 2, kind=0, depth=16, rows=rows, tRNS=struct.pack(">H", 1000)))
    assert image.mode == "RGBA" and np.asarray(image)[0, :, 3].tolist() == [0, 255, 255]


def test_32_bit_pixels_are_refused():
    with pytest.raises(RequestError, match="32-bit pixels"):
        read_image(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


def test_a_palette_with_transparency_keeps_colours_and_transparency():
    palette = Image.new("P", (3, 2))
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.putdata([0, 1, 2] * 2)
    image = read_image(saved(palette, "PNG", transparency=bytes([255, 0, 128])))
    assert image.mode == "RGBA"
    assert np.asarray(image)[0].tolist() == [[*RED, 255], [*GREEN, 0], [*BLUE, 128]]
    assert np.asarray(over_white(image))[0].tolist() == [[*RED], [*WHITE], [127, 127, 255]]
    assert read_image(saved(palette, "PNG", transparency=1)).getpixel((1, 0))[3] == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(photo, mode):
    if mode == "LAB":
        profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
        given = ImageCms.profileToProfile(photo, *profiles, outputMode="LAB")
        expected = photo
    else:
        given = photo.convert("P").convert("PA") if mode == "PA" else photo.convert(mode)
        expected = given.convert("RGB")
    image = read_image(given)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 2  # LAB has 8 bits: 0.9


def test_an_opaque_alpha_channel_is_dropped(photo):
    assert read_image(photo.convert("RGBA")) == photo


# ---- colour profiles


def swapped() -> bytes:
    """A profile in which red is sRGB's green, and green its red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", profile[128:132])[0]):
        at = 132 + 12 * i
        name = bytes(profile[at : at + 4])
        profile[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(profile).replace(b"s\0R\0G\0B", b"o\0t\0h\0r").replace(b"\0s\0R\0G\0B", b"\0o\0t\0h\0r")


def test_a_colour_profile_is_converted_to_srgb():
    image = read_image(saved(Image.new("RGB", (8, 8), RED), "PNG", icc_profile=swapped()))
    assert np.abs(np.subtract(image.getpixel((0, 0)), GREEN)).max() <= 2


def test_the_pixels_of_an_srgb_image_stay_exactly_as_they_are(photo):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_image(saved(photo, "PNG", icc_profile=profile)) == photo


def test_transparency_survives_a_colour_profile():
    image = Image.new("RGBA", (8, 8), (*RED, 100))
    read = read_image(saved(image, "PNG", icc_profile=swapped()))
    assert read.getpixel((0, 0))[3] == 100 and read.getpixel((0, 0))[1] > 250


@pytest.mark.parametrize("profile", [b"not a profile" * 20, swapped()[:300]])
def test_a_damaged_colour_profile_is_ignored_with_a_warning(photo, profile):
    with pytest.warns(UserWarning, match="colour profile that cannot be used"):
        assert read_image(saved(photo, "PNG", icc_profile=profile)) == photo


def test_a_profile_of_other_channels_is_ignored_with_a_warning(photo):
    with pytest.warns(UserWarning, match="colour profile that cannot be used"):
        assert read_image(saved(photo.convert("CMYK"), "TIFF", icc_profile=swapped())).mode == "RGB"


# ---- arrays


def test_arrays_are_read_as_images(photo):
    pixels = np.asarray(photo)
    unit = pixels / np.float32(255)
    torchs = unit.transpose(2, 0, 1)
    for array in (pixels, unit, unit[None], mx.array(pixels), torchs, torchs[None]):
        assert read_image(array) == photo
    assert read_image(pixels[:, :, 0]) == read_image(pixels[:, :, :1]) == photo.getchannel("R").convert("RGB")
    assert read_image(np.eye(16, dtype=bool)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 4, 2)), r"shape \(5, 4, 2\)"),
        (np.zeros((2, 4, 4, 3)), r"shape \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), int), "array of int64"),
        (np.full((4, 4, 3), 255.0), "values that are outside 0 to 1"),
        (np.full((4, 4, 3), np.nan), "not finite"),
        (np.full((4, 4, 3), -1.0), "values that are outside 0 to 1"),
        (None, "the image is NoneType"),
        (17, "the image is int"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(RequestError, match=message):
        read_image(array)


# ---- hostile files


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "none.png", "no image at"),
        (tmp_path, "could not read the image"),
        (tmp_path / "fifo", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "could not read the image"),
    ):
        with pytest.raises(RequestError, match=message):
            read_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", *AVIF])
def test_a_file_is_refused_unless_all_its_pixels_are_there(tmp_path, photo, format):
    content = saved(photo, format)
    for length in (0, 1, 12, 40, len(content) // 2, len(content) - len(content) // 8):
        path = tmp_path / "photo"
        path.write_bytes(content[:length])
        try:
            assert read_image(path) == read_image(content)  # only what follows its pixels is missing
            assert length > len(content) // 2
        except RequestError as error:
            assert (
                re.search("photo is (damaged or incomplete|a damaged, incomplete or unusual)", str(error))
                or length < 40
            )


@pytest.mark.parametrize("format", ["TIFF", *AVIF])
def test_a_file_whose_header_is_damaged_is_not_called_another_format(photo, format):
    content = saved(photo, format, **({"compression": "tiff_lzw"} if format == "TIFF" else {}))
    with pytest.raises(RequestError, match=f"the image is a damaged, incomplete or unusual {format}; copy it again"):
        read_image(content[: len(content) * 2 // 3])


def test_a_file_that_cannot_be_read_is_refused():
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("needs Linux")
    with pytest.raises(RequestError, match="/proc/self/mem is damaged or incomplete"):
        read_image("/proc/self/mem")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]), st.data())
def test_a_damaged_file_is_read_or_refused(format, data):
    y, x = np.mgrid[:16, :24]
    content = bytearray(saved(Image.fromarray(np.stack([9 * x, 9 * y, x + y], -1).astype(np.uint8)), format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RequestError):
        read_image(bytes(content))


def heic(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    pytest.importorskip("pillow_heif").from_pillow(image).save(stream, **options)
    return stream.getvalue()


# One file of each kind that has a limit.
KINDS = {
    "JPEG": lambda image: saved(image, "JPEG"),
    "progressive JPEG": lambda image: saved(image, "JPEG", progressive=True, subsampling=0),
    "PNG": lambda image: saved(image, "PNG", compress_level=1),
    "PNG with transparency": lambda image: saved(with_alpha(image), "PNG", compress_level=1),
    "PNG with transparency and 16 bits": lambda image: sixteen_bits(with_alpha(image)),
    "GIF": lambda image: saved(image.convert("P"), "GIF"),
    "TIFF": lambda image: saved(image, "TIFF", compression="tiff_lzw"),
    "TIFF with LZMA": lambda image: saved(image, "TIFF", compression="lzma"),
    "BMP": lambda image: saved(image, "BMP"),
    "BMP with RLE": lambda image: run_lengths(image.convert("L")),
    "WebP": lambda image: saved(image, "WEBP", method=0),
    "WebP with transparency": lambda image: saved(with_alpha(image), "WEBP", method=0),
    **({"AVIF": lambda image: saved(image, "AVIF", speed=10, subsampling="4:4:4")} if AVIF else {}),
    **({"AVIF with transparency": lambda image: saved(with_alpha(image), "AVIF", speed=10)} if AVIF else {}),
    "HEIC": heic,
}


def run_lengths(image: Image.Image) -> bytes:
    """A BMP in grey, compressed as runs of equal pixels."""
    runs = bytearray()
    for row in np.asarray(image)[::-1]:
        for left in range(0, len(row), 255):
            for value, pixels in itertools.groupby(row[left : left + 255].tolist()):
                runs += bytes([len([*pixels]), value])
        runs += b"\0\0"
    runs += b"\0\1"
    content = saved(image, "BMP")
    start = 54 + 1024
    header = content[2:30] + struct.pack("<II", 1, len(runs)) + content[38:start]
    return b"BM" + header + runs


def sixteen_bits(image: Image.Image) -> bytes:
    """An RGBA image as a PNG of 16 bits."""
    rows = (b"\0" + row.tobytes() for row in np.asarray(image).astype(">u2") * 257)
    return png(*image.size, kind=6, depth=16, rows=b"".join(rows))


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(128)
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_beyond_the_limits_of_its_format_is_refused_before_decoding(monkeypatch, photo, kind):
    content = KINDS[kind](photo.resize((96, 64)))
    read_image(content)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for limit, message in (
        (
            Limit(0.0015, 1),
            rf"96x64 pixels, 0\.0 megapixels; expected at most 0\.0015 as {kind}; .*to 47x31 or less$",
        ),
        (Limit(1, 0.0001), rf"is \d\.\d MB; expected at most 0\.0001 MB as {kind}; (save it (as|at|with)|resize it)"),
    ):
        monkeypatch.setitem(source.LIMITS, kind, limit)
        with pytest.raises(RequestError, match=message):
            read_image(content)


def test_a_photo_that_is_too_large_is_refused_with_advice():
    with pytest.raises(RequestError) as refused:
        read_image(png(8064, 6048))
    assert str(refused.value) == (
        "the image has 8064x6048 pixels, 48.8 megapixels; expected at most 25 as PNG; save it as JPEG, or resize it "
        "to 5773x4330 or less"
    )
    for width, height, message in (
        (10_000, 5_001, r"50\.0 megapixels; expected at most 25 as PNG; resize it to 7070x3535 or less"),
        (20_000, 20_000, "too many pixels"),
        (2**31 - 1, 2**31 - 1, "too many pixels"),
        (65_536, 16, "expected at most 65,535 on a side"),
    ):
        with pytest.raises(RequestError, match=message):
            read_image(png(width, height))


@pytest.mark.parametrize(
    ("kind", "pixels", "size"),
    [
        ("PNG with transparency", "; resize it to", "; resize it$"),
        ("PNG with transparency and 16 bits", "; save it with 8 bits, or resize it to", "; save it with 8 bits$"),
        ("WebP with transparency", "; save it as PNG, or resize it to", "; save it as PNG$"),
        *([("AVIF with transparency", "; save it as PNG, or resize it to", "; save it as PNG$")] if AVIF else []),
    ],
)
def test_advice_for_an_image_that_is_too_large_keeps_its_transparency(monkeypatch, photo, kind, pixels, size):
    content = KINDS[kind](photo)
    for limit, message in ((Limit(0.001, 1), pixels), (Limit(1, 0.0001), size)):
        monkeypatch.setitem(source.LIMITS, kind, limit)
        with pytest.raises(RequestError, match=message):
            read_image(content)


def test_a_progressive_jpeg_may_be_larger_the_fewer_coefficients_it_has(monkeypatch, photo):
    monkeypatch.setitem(source.LIMITS, "progressive JPEG", Limit(0.001, 1))  # of the photo's 1536 pixels
    for subsampling, most in ((0, "0.001"), (1, "0.0015"), (2, None)):
        content = saved(photo, "JPEG", progressive=True, subsampling=subsampling)
        if most is None:
            read_image(content)
            continue
        with pytest.raises(RequestError, match=f"expected at most {most} as progressive JPEG; save it as a JPEG that"):
            read_image(content)


def test_a_jpeg_with_a_scan_for_each_channel_has_the_limit_of_a_progressive_one(monkeypatch, photo):
    monkeypatch.setitem(source.LIMITS, "progressive JPEG", Limit(0.001, 1))
    content = saved(photo, "JPEG", subsampling=0)
    read_image(content)
    start = content.index(b"\xff\xda")
    red = b"\xff\xda\0\x08\1" + content[start + 5 : start + 7] + content[start + 11 : start + 14]
    with pytest.raises(RequestError, match="as progressive JPEG"):
        read_image(content[:start] + red + content[start + 14 :])


def test_a_photo_from_a_phone_is_a_jpeg_whatever_follows_it(monkeypatch, photo):
    monkeypatch.setitem(source.LIMITS, "progressive JPEG", Limit(0.001, 1))
    many = {"save_all": True, "append_images": [photo.rotate(90)]}
    assert read_image(saved(photo, "MPO", **many)).size == photo.size


def test_more_than_50_megapixels_are_refused_as_an_array_and_from_pillow(monkeypatch):
    monkeypatch.setattr(source, "MAX_PIXELS", 500)
    for image in (np.zeros((20, 30, 3), np.uint8), Image.new("RGB", (30, 20))):
        with pytest.raises(RequestError, match="expected at most"):
            read_image(image)


def test_a_large_image_is_halved(monkeypatch, photo):
    monkeypatch.setattr(source, "KEPT_PIXELS", photo.width * photo.height)
    large = photo.resize((96, 64))
    for format in ("JPEG", "PNG"):
        image = read_image(saved(large, format))
        assert image.size == photo.size
        assert np.abs(np.asarray(image, int) - np.asarray(photo, int)).mean() < 3
    assert read_image(photo) == photo


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_an_image_is_the_same_in_tiles_as_converted_whole(monkeypatch, photo, mode):
    odd = photo.crop((0, 0, 47, 31))  # whose last row and column are single
    odd.putalpha(odd.getchannel("R").point(lambda red: 255 if red < 128 else red))
    grey = np.asarray(odd.convert("L"), np.uint16) * 200
    image = Image.fromarray(grey) if mode == "I;16" else odd.convert("RGB" if mode != "RGBA" else mode).convert(mode)
    image.info["icc_profile"] = swapped() if mode == "RGBA" else None
    whole = read_image(image)
    monkeypatch.setattr(source, "TILE", 8)
    assert read_image(image) == whole and over_white(whole) == over_white(read_image(image))
    monkeypatch.setattr(source, "KEPT_PIXELS", 1)
    halved = read_image(image)
    assert halved.mode == whole.mode
    off = np.abs(np.asarray(halved, int) - np.asarray(whole.reduce(2), int)).max()
    assert off <= (2 if mode in ("RGBA", "CMYK") else 0)  # halved before colours are converted: 1 or 2
    image.getexif()[0x0112] = 6
    assert read_image(image) == halved.transpose(Image.Transpose.ROTATE_270)


READ = """
image = read_image(sys.argv[1])
print(image.width, image.height, *image.getpixel((10, 10)))
"""


def test_a_48_megapixel_jpeg_is_read_halved_and_upright_in_100_mb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8064, 6048), (200, 100, 50)).save(tmp_path / "photo", "JPEG", exif=exif)
    printed, grown = measured("from mlx_zimage.images.source import read_image", READ, tmp_path / "photo")
    width, height, *pixel = map(int, printed.split())
    assert (width, height) == (3024, 4032)
    assert np.abs(np.subtract(pixel, (200, 100, 50))).max() <= 3
    assert grown < 120e6  # at once, the halved image as stored and upright: 98 MB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "transparent"),
    [*((kind, False) for kind in KINDS if kind != "HEIC"), ("TIFF", True)],
)
def test_the_largest_image_of_each_format_except_heic_is_read_within_200_mb(tmp_path, kind, transparent):
    width = 4 * int(math.sqrt(LIMITS[kind].megapixels * 1e6 / 12))
    image = Image.new("RGB", (width, width * 3 // 4), (200, 100, 50))
    (tmp_path / "photo").write_bytes(KINDS[kind](with_alpha(image) if transparent else image))
    imports = "from mlx_zimage.images.source import over_white, read_image\nfrom PIL import Image\nImage.init()"
    _, grown = measured(imports, "over_white(read_image(sys.argv[1]))", tmp_path / "photo")
    assert grown < 200e6


# ---- digests and sizes


def test_a_digest_depends_on_the_pixels_alone(photo):
    pixels = np.asarray(photo).copy()
    same = [photo, saved(photo, "PNG"), saved(photo, "TIFF"), pixels, photo.convert("RGBA")]
    assert len({digest(read_image(image)) for image in same}) == 1
    pixels[3, 4, 1] ^= 1
    others = [pixels, photo.rotate(180), photo.resize((32, 48)), np.asarray(photo).reshape(16, 96, 3)]
    assert len({digest(read_image(image)) for image in [photo, *others]}) == 5


@given(st.integers(1, 9000), st.integers(1, 5000), st.sampled_from([128**2, 512**2, 1024**2]))
def test_the_size_from_an_image_is_at_most_the_models_area_and_never_larger(width, height, area):
    fitted = fit_size((width, height), area)
    assert all(side % 16 == 0 and 16 <= side <= 8192 for side in fitted)
    assert fitted[0] * fitted[1] <= max(area, 16 * 16) or 16 in fitted
    assert all(side <= max(16, given) for side, given in zip(fitted, (width, height), strict=True))
    if width * height > area and min(fitted) >= 128:
        assert fitted[0] / fitted[1] == pytest.approx(width / height, rel=0.25)


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((1024, 1024), {}, (1024, 1024)),
        ((4032, 3024), {}, (1184, 880)),
        ((1000, 700), {}, (992, 688)),
        ((1920, 1080), {}, (1360, 768)),
        ((5, 3), {}, (16, 16)),
        ((640, 480), {"width": 320}, (320, 240)),
        ((640, 480), {"height": 960}, (1280, 960)),
        ((640, 480), {"width": 256, "height": 1024}, (256, 1024)),
        ((10, 3000), {"width": 160}, (160, 8192)),
    ],
)
def test_a_size_follows_from_the_image_and_what_is_given(size, given, expected):
    assert fit_size(size, 1024**2, **given) == expected


def test_cover_crops_without_touching_pixels_if_it_can():
    pixels = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    covered = np.asarray(cover(Image.fromarray(pixels), 48, 32))
    assert np.array_equal(covered, pixels[6:38, 6:54])


def test_cover_keeps_the_proportions_and_the_centre():
    image = Image.new("RGB", (400, 100), BLUE)
    image.paste(RED, (140, 0, 260, 100))  # the central square, and what Lanczos sees of its sides
    assert cover(image, 64, 64).getextrema() == ((255, 255), (0, 0), (0, 0))
    assert cover(image, 800, 200).getpixel((10, 100)) == BLUE
