"""A file of which Pillow can read only so much metadata, in so many pieces, before it is refused.

Pillow parses the headers of images in Python, and so takes seconds, or gigabytes, for some that have a few megabytes.
"""

from __future__ import annotations

import io
import os
import struct
from typing import cast

from PIL.Image import Image
from PIL.JpegImagePlugin import JpegImageFile

from ..errors import RequestError

MAX_METADATA = 8 * 2**20  # bytes: the time that Pillow takes to join EXIF's segments grows with their square
MAX_READS = 100_000  # of one file: Pillow takes 8 us for a chunk of PNG, and libpng writes chunks of 8 KB
MAX_VALUES = 30_000  # in one list of a TIFF: Pillow makes several objects for each strip
MAX_SCANS = 30  # of a JPEG, since 20 bytes can be a scan of all pixels; a progressive one has about 10
BLOCK = 2**16  # bytes that a decoder reads at a time
NAMES = {"MPO": "JPEG", "WEBP": "WebP", "HEIF": "HEIC"}  # of formats that Pillow calls otherwise
BYTES = (1, 2, 7)  # types of TIFF's values


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
        self.reads = self.metadata = self.scans = 0
        self._check_tiff()

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if size is None or size < 0:
            self.check(bool(self.kind) or self.size <= self.most_whole, f"has {self.size:,} bytes")
            return super().read()
        content = super().read(min(size, 2**20))  # Pillow asks again for what is missing
        if not self.kind:
            self.header = max(self.header, self.tell())
        if not self.kind or (self.kind == "PNG" and size > BLOCK):  # a chunk after its pixels
            self.metadata += len(content)
        if self.kind.endswith("JPEG"):
            start = self.tell() - len(content)
            self.scans += content.count(b"\xff\xda", max(self.header - start, 0))
        self.check(self.metadata <= MAX_METADATA, f"has more than {MAX_METADATA:,} bytes of metadata")
        self.check(self.reads <= MAX_READS, f"has more than {MAX_READS:,} parts")
        self.check(self.scans <= MAX_SCANS, f"has more than {MAX_SCANS} scans")
        return content

    def opened(self, image: Image) -> None:
        """Set the kind of an image whose header has just been read: a format, as users know it."""
        self.kind = NAMES.get(str(image.format), str(image.format))
        if image.info.get("compression") == "lzma":
            self.kind = "TIFF with LZMA"
        if self.kind == "AVIF" and image.mode != "RGB":
            self.kind = "AVIF with transparency"
        if isinstance(image, JpegImageFile):
            # All coefficients are kept, as of a progressive one, unless the first scan has all components. Its header,
            # which ends the file's, has 6 bytes and 2 for each component.
            self.seek(max(self.header - 6 - 2 * image.layers, 0))
            expected = struct.pack(">HB", 6 + 2 * image.layers, image.layers)
            if "progressive" in image.info or self.read(3) != expected:
                self.kind = "progressive JPEG"

    def check(self, fine: bool, fault: str) -> None:
        if not fine:
            raise RequestError(f"{self.label} {fault}, more than an image needs; save it again as JPEG or PNG")

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
                self.check(kind in BYTES or values <= MAX_VALUES, f"has a list of {values:,} numbers")
        self.seek(0)
