"""Malicious images: when their metadata is read, nothing is decoded, and little is read."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from measure import measured
from PIL import Image, ImageFile, PngImagePlugin, features

from mlx_zimage import GenerateRequest, RequestError
from mlx_zimage.images import metadata
from mlx_zimage.images.codec import encode
from mlx_zimage.images.metadata import Origin, read_origin
from mlx_zimage.images.source import read_image

ORIGIN = Origin(GenerateRequest("a cat", 16, 16, seed=1, steps=8), "pocket", "0" * 10, "float32")
PIXELS = np.zeros((16, 16, 3), np.uint8)
IMPORTS = """
from pathlib import Path
from mlx_zimage import RequestError
from mlx_zimage.images.metadata import read_origin
"""
READ = """
try:
    read_origin(Path(sys.argv[1]))
except RequestError:
    print("refused")
"""


READ_IMAGE = """
    try:
        read_image(sys.argv[1])
    except RequestError:
        print("refused")
"""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes) -> bytes:
    """A PNG file with chunks before its pixels."""
    content = encode(PIXELS, ".png")
    at = content.index(b"IDAT") - 4
    return content[:at] + b"".join(chunks) + content[at:]


def in_exif(comment: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + comment
    return png(chunk(b"eXIf", exif.tobytes()[6:]))


def in_xmp(origin: str) -> bytes:
    start = f'<rdf xmlns:zimage="{metadata.NAMESPACE}" zimage:origin="{origin}"/>'.encode()
    return png(chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + start))


def endless_exif(file) -> None:
    """A PNG whose EXIF claims, and has, a gigabyte; the file is sparse."""
    content, size = encode(PIXELS, ".png"), 2**30
    at = content.index(b"IDAT") - 4
    with file.open("wb") as stream:
        stream.write(content[:at] + struct.pack(">I", size) + b"eXIf")
        stream.seek(size + 4, os.SEEK_CUR)
        stream.write(content[at:])


def endless_webp(file) -> None:
    file.write_bytes(encode(PIXELS, ".webp"))
    os.truncate(file, 2**33)


def endless_jpeg(file) -> None:
    """300 MB of segments that are all EXIF."""
    content = encode(PIXELS, ".jpg")
    segment = b"\xff\xe1" + struct.pack(">H", 65_535) + b"Exif\0\0MM\0*" + bytes(65_523)
    with file.open("wb") as stream:
        stream.write(content[:2])
        for _ in range(300 * 10**6 // len(segment)):
            stream.write(segment)
        stream.write(content[2:])


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.png", endless_exif), ("a.webp", endless_webp), pytest.param("a.jpg", endless_jpeg, marks=pytest.mark.slow)],
)
def test_an_image_of_gigabytes_takes_little_memory(tmp_path, name, write):
    # and little time, which is not asserted: Pillow joins EXIF's segments one by one, 15 s for 48 MB of them
    write(tmp_path / name)
    printed, grown = measured(IMPORTS, READ, tmp_path / name)
    assert printed == "refused" and grown < 200e6


@pytest.mark.parametrize(
    ("write", "message"),
    [(endless_exif, "more than 8,388,608 bytes of metadata"), (endless_webp, "has 8,589,934,592 bytes")],
)
def test_a_photo_of_gigabytes_takes_little_memory(tmp_path, write, message):
    write(tmp_path / "photo")
    imports = "from mlx_zimage.images.source import read_image"
    work = "try:\n    read_image(sys.argv[1])\nexcept ValueError as error:\n    print(error)"
    printed, grown = measured(imports, work, tmp_path / "photo")
    assert message in printed and grown < 50e6


DEEP = [(256, 4000), (257, 4000), (258, 16), (259, 8), (262, 2), (277, 4), (278, 4000), (338, 2)]  # deflated RGBA
GREY = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1), (279, 16)]


def jpeg(*segments: bytes) -> bytes:
    content = encode(PIXELS, ".jpg")
    return content[:2] + b"".join(segments) + content[2:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def tiff(values: int, is_big: bool, more: list[tuple[int, int]] = GREY, pixels: bytes = b"\1\0") -> bytes:
    """A TIFF whose list of strips has `values` entries. `more` has its other tags: 16x16 pixels in grey unless they say
    otherwise."""
    one = dict(GREY) | dict(more)
    entries = sorted([*((tag, 4, 1, value) for tag, value in one.items()), (273, 3, values, 400)])
    start, entry = ("<2sHHHQQ", "<HHQQ") if is_big else ("<2sHIH", "<HHII")
    head = (b"II", 43, 8, 0, 16, len(entries)) if is_big else (b"II", 42, 8, len(entries))
    content = struct.pack(start, *head) + b"".join(struct.pack(entry, *values) for values in entries)
    return content.ljust(400, b"\0") + pixels * values


def tiled(width: int, height: int, across: int, down: int, compression: int = 8) -> bytes:
    tags = [(256, width), (257, height), (322, across), (323, down), (324, 400), (325, 2), (259, compression)]
    content = tiff(1, False, tags)
    return content.replace(struct.pack("<HH", 273, 3), struct.pack("<HH", 65_000, 3))  # no strips


def jpeg_in_tiff(number: int) -> bytes:
    """A TIFF in grey with a JPEG whose only scan is repeated."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert("L").save(stream, "JPEG")
    content = stream.getvalue()
    scan = content[content.index(b"\xff\xda") : -2]
    content = content[:-2] + scan * (number - 1) + content[-2:]
    return tiff(1, False, [(259, 7), (278, 16), (279, len(content))], content)


def orientations(number: int) -> bytes:
    """EXIF with an orientation that has `number` values."""
    return struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x112, 3, number, 26, 0) + b"\x39\x30" * number


def webp(exif: bytes) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "WEBP", exif=exif)
    return stream.getvalue()


def scans(number: int) -> bytes:
    """A progressive JPEG whose last scan, 53 bytes for all pixels, is repeated."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    last = content[content.rindex(b"\xff\xc4") : -2]
    return content[:-2] + last * number + content[-2:]


def gif_comments(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert("L").save(stream, "GIF")
    content = stream.getvalue()
    at = content.index(b",\0\0\0\0\x10\0\x10\0")
    return content[:at] + b"\x21\xfe\1a\0" * number + content[at:]


EMPTY = chunk(b"zzZz", b"")
ZIPPED = zlib.compress(("\U0001f600" + "a" * 1_000_000).encode())  # 4 MB in Python, as one character needs 4 bytes
COMPRESSED = chunk(b"iTXt", b"a\0\1\0\0\0" + ZIPPED)
FULL = segment(0xE1, b"Exif\0\0MM\0*" + bytes(65_000))
FLOODS = {
    "chunks before a PNG's pixels": (lambda: png(EMPTY * 60_000), "100,000 parts"),
    "chunks after a PNG's pixels": (lambda: png()[:-12] + EMPTY * 60_000 + png()[-12:], "100,000 parts"),
    "a chunk of 9 MB after a PNG's pixels": (
        lambda: png()[:-12] + chunk(b"zzZz", bytes(9_000_000)),
        "bytes of metadata",
    ),
    "EXIF of 2 MB in a JPEG": (lambda: jpeg(FULL * 30), "bytes of EXIF"),
    "EXIF of 2 MB in a PNG": (lambda: png(chunk(b"eXIf", orientations(10**6))), "2,000,032 bytes of EXIF"),
    "EXIF of 2 MB after a PNG's pixels": (
        lambda: png()[:-12] + chunk(b"eXIf", orientations(10**6)) + png()[-12:],
        "2,000,032 bytes of EXIF",
    ),
    "EXIF of 2 MB in a WebP": (lambda: webp(orientations(10**6)), "bytes of EXIF"),
    "EXIF of 2 MB in a PNG's text": (
        lambda: png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n2000032\n" + orientations(10**6).hex().encode())),
        "2,000,033 bytes of EXIF",
    ),
    "compressed texts in a PNG": (lambda: png(COMPRESSED * 17), "more than 16 compressed text chunks"),
    "compressed texts after a PNG's pixels": (
        lambda: png()[:-12] + COMPRESSED * 17 + png()[-12:],
        "more than 16 compressed text chunks",
    ),
    "profiles in a PNG": (lambda: png(chunk(b"iCCP", b"a\0\0" + ZIPPED) * 17), "more than 16 compressed text chunks"),
    "tiles in a TIFF": (lambda: tiled(16, 16, 5000, 5000), "tiles of 100 MB"),
    "narrow tiles in a TIFF": (lambda: tiled(16 * 1000, 16, 16, 10**6), "tiles for 16,000 megapixels"),
    "a strip of 16-bit colours": (
        lambda: tiff(1, False, DEEP),
        "128 MB",
    ),
    "raw tiles across in a TIFF": (lambda: tiled(16, 1, 20 * 10**6, 1, 1), "tiles 20,000,000 pixels across"),
    "raw tiles in a TIFF": (lambda: tiled(16, 2000, 40_000, 1, 1), "tiles for 80 megapixels"),
    "raw strips that repeat in a TIFF": (
        lambda: tiff(30_000, False, [(278, 8), (323, 1)]),
        "30,000 strips or tiles instead of 2,",
    ),
    "strips and tiles in a TIFF": (lambda: tiff(16, False, [(322, 1), (323, 1)]), "strips and tiles"),
    "scans in a TIFF": (lambda: jpeg_in_tiff(5), "JPEG of more than 4 scans"),
    "comments in a JPEG": (lambda: jpeg(segment(0xFE, b"") * 40_000), "100,000 parts"),
    "comments in a GIF": (lambda: gif_comments(60_000), "100,000 parts"),
    "scans in a JPEG": (lambda: scans(40), "more than 30 scans"),
    "strips in a TIFF": (lambda: tiff(40_000, is_big=False), "tag with 40,000 values"),
    "strips in a BigTIFF": (lambda: tiff(40_000, is_big=True), "tag with 40,000 values"),
}


@pytest.mark.parametrize(("content", "message"), FLOODS.values(), ids=list(FLOODS))
def test_a_photo_in_endless_parts_is_refused(content, message):
    with pytest.raises(RequestError, match=rf"the image has .*{message}.*; save it again as JPEG or PNG"):
        read_image(content())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: png(EMPTY * 60_000), "more than 100,000 parts"),
        (lambda: png(COMPRESSED * 17), "more than 16 compressed text chunks"),
        (lambda: png(chunk(b"eXIf", orientations(10**6))), "2,000,032 bytes of EXIF"),
        (lambda: webp(orientations(10**6)), "bytes of EXIF"),
    ],
)
def test_metadata_in_endless_parts_is_refused(tmp_path, content, message):
    (tmp_path / "image.png").write_bytes(content())
    with pytest.raises(RequestError, match=message):
        read_origin(tmp_path / "image.png")


@pytest.mark.skipif(not features.check("avif"), reason="needs Pillow 11.3")
def test_exif_in_an_avif_is_not_unpacked(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "AVIF", exif=orientations(4_000_000).replace(b"\x12\x01", b"\x13\x01", 1))
    content = stream.getvalue().replace(b"\x13\x01\3\0", b"\x12\x01\3\0", 1)  # Pillow does not write its orientation
    (tmp_path / "photo").write_bytes(content)
    imports = "from mlx_zimage.images.source import read_image"
    printed, grown = measured(imports, "print(read_image(sys.argv[1]).size)", tmp_path / "photo")
    assert len(content) > 8e6 and printed == "(16, 16)" and grown < 60e6  # the file and a copy of it, not a tuple


def test_damaged_images_leave_no_memory_behind(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (125, 125, 3), dtype=np.uint8))
    stream = io.BytesIO()
    noise.resize((2000, 2000)).save(stream, "WEBP", method=0)
    content = bytearray(stream.getvalue()[: stream.tell() // 4 * 2])  # half of its pixels
    content[4:8], content[16:20] = struct.pack("<I", len(content) - 8), struct.pack("<I", len(content) - 20)
    (tmp_path / "photo").write_bytes(content)
    imports = "from mlx_zimage.images.source import read_image\nfrom mlx_zimage import RequestError"
    work = f"for _ in range(6):\n    {READ_IMAGE}"
    printed, grown = measured(imports, work, tmp_path / "photo")
    assert printed.split() == ["refused"] * 6
    assert grown < 80e6  # libwebp takes 32 MB for one of 4 megapixels


def test_valid_input_has_few_parts():
    plain = chunk(b"iTXt", b"a\0\0\0\0\0" + b"a" * 100)
    more = jpeg_in_tiff(1), png(COMPRESSED * 16 + plain * 17), tiled(16, 16, 64, 16, 1) + bytes(64 * 16)
    scanned = jpeg(segment(0xE5, b"\xff\xda" * 100))  # bytes that would begin a scan elsewhere
    for content in (
        tiff(16, is_big=False),
        tiff(16, is_big=True),
        scans(15),
        gif_comments(10),
        jpeg(FULL),
        scanned,
        *more,
    ):
        assert read_image(content).size == (16, 16)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_metadata_is_read_without_decoding(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    (tmp_path / f"a.{ending}").write_bytes(encode(PIXELS, f".{ending}", ORIGIN))
    assert read_origin(tmp_path / f"a.{ending}") == ORIGIN
    (tmp_path / f"a.{ending}").write_bytes(encode(PIXELS, f".{ending}"))
    with pytest.raises(RequestError, match="metadata was removed"):
        read_origin(tmp_path / f"a.{ending}")


def test_only_the_start_of_a_large_png_is_read(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    content = encode(noise, ".png", ORIGIN)
    monkeypatch.setattr(metadata, "MAX_READ", len(content) // 2)
    (tmp_path / "a.png").write_bytes(content)
    assert read_origin(tmp_path / "a.png") == ORIGIN


LONG = PngImagePlugin.PngInfo()
LONG.add_text("parameters", "a" * 2_000_000, zip=True)  # Pillow refuses more than 1 MB when it is unpacked
MFLUX = {"mflux_version": "0.9", "prompt": "a cat", "seed": 1}
HOSTILE = {
    "a text that unpacks to 2 MB": png(*(chunk(kind, content) for kind, content, *_ in LONG.chunks)),
    "lists in EXIF": in_exif(b"[" * 60_000),
    "objects in EXIF": in_exif(b'{"mflux_version":' * 100 + b"1" + b"}" * 100),
    "digits in EXIF": in_exif(json.dumps(MFLUX).replace("1}", f"{'9' * 4000}}}").encode()),
    "a key twice in EXIF": in_exif(b'{"mflux_version": "0.9", "seed": 1, "seed": 2, "prompt": "a"}'),
    "lists in XMP": in_xmp("[" * 60_000),
    "digits in XMP": in_xmp(f"{{&quot;request&quot;: {'9' * 5000}}}"),
    "2 MB in XMP": in_xmp(" " * 2_000_000),
    "a path as the model": in_xmp('{"request": {"prompt": "a", "seed": 1}, "model": "\n"}'.replace('"', "&quot;")),
    "another format": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    "a TIFF": b"II*\0\x08\0\0\0\0\0",
    "no image": b"\x89PNG\r\n\x1a\n",
    "a PNG of 2**31 columns": png().replace(struct.pack(">II", 16, 16), struct.pack(">II", 2**31 - 1, 2**31 - 1), 1),
    "nothing": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_metadata_is_refused(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(RequestError, match=r"^\S*image\.png.{,400}$"):
        read_origin(tmp_path / "image.png")
