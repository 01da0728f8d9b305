"""How an image was generated, stored in and read from PNG, JPEG and WebP files.

Every image contains XMP with IPTC's digital source type (made by a trained model) and our own JSON, from which it can
be generated again; and, for other programs, A1111's `parameters` text: a text chunk in PNG, else EXIF's user comment.
None of this varies between runs: the same request gives the same bytes.
"""

from __future__ import annotations

import html
import json
import math
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..errors import RequestError, warn
from ..request import GenerateRequest
from ..untrusted import open_regular, parse_json, read_bytes
from ..version import __version__
from . import mflux
from .stream import ImageStream, read_exif

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of our images, by file suffix
AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "urn:mlx-zimage:1.0/"
MAX_READ = 8 * 2**20  # bytes of a PNG or JPEG, from its start, where its metadata is
MAX_WEBP = 48 * 2**20  # whose metadata is at its end
MAX_JSON = 1_000_000  # characters; the longest prompt takes a third of this
MAX_JPEG = 64_000  # bytes; a JPEG segment holds 65,535
EXIF_DIRECTORY, USER_COMMENT = 0x8769, 0x9286  # EXIF's tags, and its types
LONG, UNDEFINED = 4, 7
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:zimage="{namespace}"
 xmp:CreatorTool="{software}" Iptc4xmpExt:DigitalSourceType="{source}"{origin}/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


@dataclass(frozen=True)
class Origin:
    """How an image was generated. Contains no paths, since images are shared.

    model is a human-readable name; the fingerprint identifies its weights. index is the position of the image within
    its request, from 0. speeds are those by which unequal machines of a group shared it, which affects rounding.
    """

    request: GenerateRequest
    model: str
    fingerprint: str
    dtype: str
    index: int = 0
    software: str = f"mlx-zimage {__version__}"
    speeds: tuple[float, ...] | None = None

    @property
    def latents(self) -> str | None:
        """The SHA-256 of the initial noise if it was given, or None if it came from the seed."""
        return self.request.latents

    def to_json(self) -> str:
        fields = asdict(self)
        fields["latents"] = fields["request"].pop("latents")  # where older versions expect it
        if self.speeds is None:
            del fields["speeds"]
        return json.dumps(fields, sort_keys=True)  # ASCII, so valid in XML whatever is in the prompt

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """Parse untrusted JSON: RequestError unless every value is valid for generating an image."""
        try:
            fields = parse_json(text)
            request = GenerateRequest.from_dict({"latents": fields.pop("latents", None), **fields.pop("request")})
            speeds = fields.pop("speeds", None)
            origin = cls(request, **fields, speeds=None if speeds is None else tuple(speeds))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"its metadata was not written by mlx-zimage ({error})") from error
        texts = (origin.model, origin.fingerprint, origin.dtype, origin.software)
        if not all(isinstance(value, str) and value.isprintable() and len(value) < 300 for value in texts):
            raise RequestError("its metadata was not written by mlx-zimage (a name is not plain text)")
        if isinstance(origin.index, bool) or not isinstance(origin.index, int):
            raise RequestError("its metadata was not written by mlx-zimage (index is not an integer)")
        if not all(type(speed) in (int, float) and 0 < speed < math.inf for speed in origin.speeds or ()):
            raise RequestError("its metadata was not written by mlx-zimage (speeds are not positive numbers)")
        return origin


def parameters(origin: Origin) -> str:
    """The text that A1111 writes: the prompt, the negative prompt, and a line of settings."""
    request = origin.request
    largest = request.refinement or request
    settings = {
        "Steps": request.steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": f"{(request.guidance_scale or 0) + 1:g}",  # where 1 is off
        "Shift": None if request.shift is None else f"{request.shift:g}",
        "Denoising strength": None if request.strength is None else f"{request.strength:g}",
        "Seed": request.seed,
        "Size": f"{largest.width}x{largest.height}",
        "Model hash": origin.fingerprint or None,
        "Model": origin.model,
        "Lora hashes": ", ".join(f"{use.name}: {str(use.sha256)[:12]}" for use in request.loras or () if use.sha256)
        or None,
        "Lora weights": ", ".join(f"{use.name}: {use.strength:g}" for use in request.loras or ()) or None,
        "RNG": "CPU" if request.rng == "torch" else None,
        "Version": origin.software,
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items() if value is not None))
    return "\n".join(lines).replace("\0", "")


def _quoted(value) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def save_options(origin: Origin, format: str) -> dict:
    """Arguments for Image.save to store the origin in a file of the given format: "PNG", "JPEG" or "WEBP"."""
    xmp = _xmp(origin, f'\n zimage:origin="{html.escape(origin.to_json())}"')
    text = parameters(origin)
    if format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("parameters", text) if not text.isascii() else chunks.add_text("parameters", text)
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return {"pnginfo": chunks}
    exif = _exif(text)
    if format == "JPEG" and max(len(xmp), len(exif)) > MAX_JPEG:
        warn("the request is too long to store in a JPEG; use .png or .webp to keep it")
        return {"xmp": _xmp(origin, "")}
    return {"xmp": xmp, "exif": exif}


def _exif(text: str) -> bytes:
    """EXIF with the text as its user comment, UTF-16 in the byte order of the rest.

    EXIF 2.3 gives the comment type UNDEFINED. Pillow would write BYTE, on which piexif, and so A1111, fails.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be")

    def directory(tag: int, kind: int, count: int, value: int) -> bytes:
        return struct.pack(">HHHIII", 1, tag, kind, count, value, 0)

    # Offsets count from "MM": the header has 8 bytes, each directory 18.
    pointer = directory(EXIF_DIRECTORY, LONG, 1, 8 + 18)
    return b"Exif\0\0MM\0*\0\0\0\x08" + pointer + directory(USER_COMMENT, UNDEFINED, len(comment), 8 + 36) + comment


def _xmp(origin: Origin, attribute: str) -> bytes:
    software = html.escape(origin.software)
    return XMP.format(namespace=NAMESPACE, software=software, source=AI_MADE, origin=attribute).encode()


def read_origin(path: Path) -> Origin:
    """The origin stored in an image, by this program or mflux, or in a JSON file (see read_sidecar).

    The file is not trusted: it is not decoded, and every value is checked.
    """
    if path.suffix.lower() == ".json":
        return read_sidecar(path)
    try:
        with open_regular(path) as file:
            start = file.read(12)
            content = start + file.read(MAX_WEBP if start.endswith(b"WEBP") else MAX_READ)
    except FileNotFoundError:
        raise RequestError(f"no image at {path}") from None
    except OSError as error:
        raise RequestError(f"{path} is not a PNG, JPEG or WebP image ({error})") from error
    return origin_in(content, path)


def origin_in(content: bytes, label: object) -> Origin:
    """The origin stored in the content of an image file; errors refer to the file by its label."""
    try:
        formats = [*dict.fromkeys(FORMATS.values())]
        with Image.open(ImageStream(content, str(label), MAX_WEBP), formats=formats) as image:
            xmp = image.info.get("xmp") or b""
            # where there is no EXIF, Pillow would decode the whole image to look for it
            exif = read_exif(image, str(label)).get_ifd(EXIF_DIRECTORY) if "exif" in image.info else {}
            comment = exif.get(USER_COMMENT)
    except UnidentifiedImageError:
        raise RequestError(f"{label} is not a PNG, JPEG or WebP image") from None
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{label} is not a PNG, JPEG or WebP image ({error})") from error
    found = re.search(rb'\szimage:origin="([^"<]*)"', xmp)
    if not found or NAMESPACE.encode() not in xmp:
        values = mflux.stored(comment) if isinstance(comment, bytes) else None
        if values:
            return _from_mflux(label, values)
        raise RequestError(
            f"{label} contains no mlx-zimage or mflux metadata: another program wrote it, or the metadata was removed"
        )
    if len(found[1]) > MAX_JSON:
        raise RequestError(f"{label}: its metadata was not written by mlx-zimage (longer than {MAX_JSON:,} characters)")
    try:
        return Origin.from_json(html.unescape(found[1].decode("ascii", "replace")))
    except RequestError as error:
        raise RequestError(f"{label}: {error}") from error


def read_sidecar(path: Path) -> Origin:
    """The origin in a JSON file: as `info --json` prints it, or as mflux writes it next to an image."""
    try:
        text = read_bytes(path, MAX_JSON).decode()
        values = parse_json(text)
    except FileNotFoundError:
        raise RequestError(f"no file at {path}") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is not a JSON file ({error})") from error
    try:
        if isinstance(values, dict) and "request" in values:
            return Origin.from_json(text)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    if not isinstance(values, dict) or "mflux_version" not in values:
        raise RequestError(
            f"{path} is not a request; expected what `mlx-zimage info IMAGE --json` prints, or a file that mflux wrote "
            f"next to an image"
        )
    return _from_mflux(path, values)


def _from_mflux(label: object, values: dict) -> Origin:
    """An origin whose model is known by name only: fingerprint and dtype are empty."""
    try:
        request, model = mflux.to_request(values)
    except RequestError as error:
        raise RequestError(f"{label}: {error}") from error
    return Origin(request, model, "", "", software=f"mflux {values['mflux_version']}")
