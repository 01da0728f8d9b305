"""A file of which Pillow can read only so much metadata, and in only so many pieces, before it is refused.

Pillow parses the headers of images in Python, and so takes seconds, or gigabytes of memory, for some of only a few
megabytes.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from typing import cast

from PIL import TiffImagePlugin as tiff
from PIL.Image import Exif, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from ..errors import RequestError

MAX_METADATA = 8 * 2**20  # bytes: the time that Pillow takes to join EXIF's segments grows with their square
MAX_READS = 100_000  # of one file: Pillow takes 8 us for a chunk of PNG, and libpng writes chunks of 8 KB
MAX_VALUES = 30_000  # in one list of a TIFF: Pillow makes several objects for each strip
MAX_EXIF = 2**20  # bytes: each can become an object of 36 bytes, and 8 can take 2 us; our longest is 260 KB
MAX_COMPRESSED = 16  # chunks of PNG: Pillow unpacks each to as much as 1 MB, which can become 4 MB of text
MAX_SCANS = 30  # of a JPEG, since 20 bytes can be a scan of all pixels; a progressive one has about 10
MAX_PIECE = 80_000_000  # bytes, unpacked, of a strip or tile of a TIFF, which libtiff unpacks whole
MAX_PADDED = 25_000_000  # pixels of a TIFF's tiles, some of which are outside of the image
MAX_ACROSS = 2**16  # pixels of a tile: Pillow joins what it reads of a row, in time that grows with its square
MAX_PASSES = 4  # scans of each JPEG in a TIFF, which has one for all channels, or one each
BLOCK = 2**16  # bytes that a decoder reads at a time
NAMES = {"MPO": "JPEG", "WEBP": "WebP", "HEIF": "HEIC"}  # of formats that have another name in Pillow
RUN_LENGTHS = (1, 2)  # of BMP's compressions
BYTES = (1, 2, 7)  # types of TIFF's values
EXIF_OF_HEIF = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)  # an entry of the index of a HEIC or AVIF


class ImageStream(io.BufferedReader):
    """The content of an image file, for Image.open; then `opened` says what it is, before its pixels are read.

    most_whole is the size of files, in bytes, that may be read whole: WebP, AVIF and HEIC.
    """

    def __init__(self, source: io.RawIOBase | bytes, label: str, most_whole: int):
        super().__init__(cast(io.RawIOBase, io.BytesIO(source)) if isinstance(source, bytes) else source)
        self.label, self.most_whole = label, most_whole
        self.size = self.seek(0, os.SEEK_END)
        self.kind = ""  # until the header has been read
        self.header = 0  # where it ends
        self.reads = self.metadata = self.exif = self.compressed = self.scans = 0
        self.in_text = False  # whether the header of an iTXt was the last that was read
        self._check_tiff()

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if size is None or size < 0:
            self.check(bool(self.kind) or self.size <= self.most_whole, f"has {self.size:,} bytes")
            # An AVIF is turned as its other properties say, but Pillow would unpack its EXIF when it opens the file.
            return EXIF_OF_HEIF.sub(rb"\1skip", super().read())
        content = super().read(min(size, 2**20))  # Pillow asks again for what is missing
        if not self.kind:
            self.header = max(self.header, self.tell())
        if not self.kind or (self.kind.startswith("PNG") and size > BLOCK):  # a chunk after its pixels
            self.metadata += len(content)
            if content.startswith(b"Exif\0\0"):  # a segment of JPEG, which Pillow unpacks when it opens the file
                self.exif += len(content)
        if self.in_text:
            self.compressed += content.partition(b"\0")[2][:1] != b"\0"  # its flag, after its name
        self.in_text = size == 8 and content[4:] == b"iTXt"
        if size == 8 and content[4:] in (b"zTXt", b"iCCP"):
            self.compressed += 1
        if self.kind.endswith("JPEG"):
            start = self.tell() - len(content)
            self.scans += content.count(b"\xff\xda", max(self.header - start, 0))
        self.check(self.metadata <= MAX_METADATA, f"has more than {MAX_METADATA:,} bytes of metadata")
        self.check(self.exif <= MAX_EXIF, f"has more than {MAX_EXIF:,} bytes of EXIF")
        self.check(self.compressed <= MAX_COMPRESSED, f"has more than {MAX_COMPRESSED} compressed text chunks")
        self.check(self.reads <= MAX_READS, f"has more than {MAX_READS:,} parts")
        self.check(self.scans <= MAX_SCANS, f"has more than {MAX_SCANS} scans")
        return content

    def whole(self) -> bytes:
        """All of the content."""
        self.seek(0)
        return super().read()

    def opened(self, image: Image) -> None:
        """Set the kind of an image whose header has just been read: a format, as users know it."""
        self.kind = NAMES.get(str(image.format), str(image.format))
        if isinstance(image, tiff.TiffImageFile):
            self._check_pieces(image)
            if image.info.get("compression") == "lzma":
                self.kind = "TIFF with LZMA"
        if self.kind == "BMP" and image.info.get("compression") in RUN_LENGTHS:
            self.kind = "BMP with RLE"
        if self.kind == "AVIF":
            image.info.pop("xmp", None)  # it may contain an orientation, too, which must be ignored
        if self.kind in ("PNG", "WebP", "AVIF") and image.mode in ("LA", "RGBA"):
            self.kind += " with transparency"
            if isinstance(image, PngImageFile) and str(image.tile[0].args).endswith("16B"):
                self.kind += " and 16 bits"
        if isinstance(image, JpegImageFile):
            # All coefficients are kept, as for a progressive JPEG, unless the first scan has all components. That
            # scan's header is the last part of the file's, and takes 6 bytes and 2 for each component.
            self.seek(max(self.header - 6 - 2 * image.layers, 0))
            expected = struct.pack(">HB", 6 + 2 * image.layers, image.layers)
            if "progressive" in image.info or self.read(3) != expected:
                self.kind = "progressive JPEG"

    def check(self, fine: bool, fault: str) -> None:
        _check(fine, self.label, fault)

    def _check_tiff(self) -> None:
        """Refuse a TIFF with a list, such as that of its strips, for which Pillow would need gigabytes."""
        self.seek(0)
        start = self.peek(16)[:16].ljust(16)
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        if order:
            is_big = 43 in start[2:4]  # BigTIFF
            place, count, entry = ("8xQ", "Q", "HHQ8x") if is_big else ("4xI8x", "H", "HHI4x")
            self.seek(min(*struct.unpack(order + place, start), self.size))
            number = super().read(struct.calcsize(count)).ljust(8, b"\0")
            size = struct.calcsize(order + entry)
            entries = super().read(size * min(*struct.unpack_from(order + count, number), MAX_READS))
            for _, kind, values in struct.iter_unpack(order + entry, entries[: len(entries) // size * size]):
                self.check(kind in BYTES or values <= MAX_VALUES, f"has a metadata tag with {values:,} values")
        self.seek(0)

    def _check_pieces(self, image: tiff.TiffImageFile) -> None:
        """Refuse a TIFF whose strips or tiles are large, or too many, or whose JPEGs have many scans.

        Pillow reads those that are raw, each as often as it is listed. libtiff reads all others by itself.
        """
        tags = image.tag_v2
        is_tiled = tiff.TILEWIDTH in tags
        self.check(not (is_tiled and tiff.STRIPOFFSETS in tags), "has both strips and tiles")
        width, height = tags[tiff.IMAGEWIDTH], tags[tiff.IMAGELENGTH]
        across, down = width, min(tags.get(tiff.ROWSPERSTRIP, height), height)
        if is_tiled:
            across, down = tags[tiff.TILEWIDTH], tags[tiff.TILELENGTH]
            self.check(across <= MAX_ACROSS, f"has tiles {across:,} pixels across")
            padded = math.ceil(width / across) * across * math.ceil(height / down) * down
            self.check(padded <= MAX_PADDED, f"has tiles for {padded / 1e6:,.0f} megapixels")
        if image.info["compression"] == "raw":
            number = len(tags[tiff.TILEOFFSETS if is_tiled else tiff.STRIPOFFSETS])
            planes = tags.get(tiff.SAMPLESPERPIXEL, 1) if tags.get(tiff.PLANAR_CONFIGURATION) == 2 else 1
            needed = math.ceil(width / across) * math.ceil(height / down) * planes
            self.check(number <= needed, f"has {number:,} strips or tiles instead of {needed:,}")
            return
        bits = tags.get(tiff.BITSPERSAMPLE, (1,))
        bits_per_pixel = max(32, sum(bits), bits[0] * tags.get(tiff.SAMPLESPERPIXEL, 1))
        piece = across * down * bits_per_pixel // 8
        self.check(piece <= MAX_PIECE, f"has strips or tiles of {piece / 1e6:,.0f} MB")
        if image.info["compression"] == "jpeg":
            starts, sizes = tiff.STRIPOFFSETS, tiff.STRIPBYTECOUNTS
            if tiff.TILEOFFSETS in tags:
                starts, sizes = tiff.TILEOFFSETS, tiff.TILEBYTECOUNTS
            places = [*zip(tags[starts], tags[sizes], strict=True)]
            self.check(sum(size for _, size in places) <= self.size, "has JPEGs that overlap")
            for place, size in places:
                self.seek(place)
                scans = super().read(size).count(b"\xff\xda")
                self.check(scans <= MAX_PASSES, f"has a JPEG of more than {MAX_PASSES} scans")


def read_exif(image: Image, label: str) -> Exif:
    """The EXIF of an image, unless it is so large that Pillow would need gigabytes."""
    size = len(image.info.get("exif") or b"") + len(image.info.get("Raw profile type exif", "")) // 2  # in hex
    _check(size <= MAX_EXIF, label, f"has {size:,} bytes of EXIF")
    return image.getexif()


def _check(fine: bool, label: str, fault: str) -> None:
    if not fine:
        raise RequestError(f"{label} {fault}, so it is refused; save it again as JPEG or PNG")
