"""What a picture tells of its making: into and out of PNG, JPEG and WebP.

Every picture carries XMP with IPTC's digital source type (made by a trained model) and our own JSON, from which it can
be drawn again; and, for other programs, A1111's `parameters` text: in PNG a text chunk, else EXIF's user comment.
Nothing in it changes from run to run: the same request gives the same bytes.
"""

from __future__ import annotations

import html
import json
import re
import struct
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..errors import RequestError
from ..request import GenerateRequest
from ..version import __version__

READABLE = ("PNG", "JPEG", "WEBP")
AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "urn:mlx-zimage:1.0/"
MAX_JSON = 1_000_000  # characters; a longest prompt takes a third of it
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
    """How a picture came to be. Holds no path: pictures are passed on.

    model is a name for people; fingerprint tells whether another model is the same. index counts a request's pictures
    from 0.
    """

    request: GenerateRequest
    model: str
    fingerprint: str
    dtype: str
    index: int = 0
    software: str = f"mlx-zimage {__version__}"

    @property
    def latents(self) -> str | None:
        """The SHA-256 of the initial noise where it was not the seed's."""
        return self.request.latents

    def to_json(self) -> str:
        fields = asdict(self)
        fields["latents"] = fields["request"].pop("latents")  # where older versions have them
        return json.dumps(fields, sort_keys=True)  # ASCII, so valid in XML whatever the prompt holds

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """Read what anyone may have written: RequestError unless every value is one that could be drawn."""
        try:
            fields = json.loads(text)
            request = GenerateRequest.from_dict({"latents": fields.pop("latents", None), **fields.pop("request")})
            origin = cls(request, **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RequestError(f"its description is not one of this program's ({error})") from error
        texts = (origin.model, origin.fingerprint, origin.dtype, origin.software)
        if not all(isinstance(value, str) and value.isprintable() and len(value) < 300 for value in texts):
            raise RequestError("its description is not one of this program's (a name is no plain text)")
        if isinstance(origin.index, bool) or not isinstance(origin.index, int):
            raise RequestError("its description is not one of this program's (the index is no number)")
        return origin


def parameters(origin: Origin) -> str:
    """A1111's text: the prompt, the negative prompt, and a line of settings."""
    request = origin.request
    settings = {
        "Steps": request.steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": f"{request.guidance_scale + 1:g}",  # 1 is off there
        "Shift": None if request.shift is None else f"{request.shift:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": origin.fingerprint,
        "Model": origin.model,
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
    """What Image.save takes to write the origin into a picture of format "PNG", "JPEG" or "WEBP"."""
    xmp = _xmp(origin, f'\n zimage:origin="{html.escape(origin.to_json())}"')
    text = parameters(origin)
    if format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("parameters", text) if not text.isascii() else chunks.add_text("parameters", text)
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return {"pnginfo": chunks}
    exif = _exif(text)
    if format == "JPEG" and max(len(xmp), len(exif)) > MAX_JPEG:
        warnings.warn("the prompt is too long for what a JPEG can carry; choose .png to keep it", stacklevel=2)
        return {"xmp": _xmp(origin, "")}
    return {"xmp": xmp, "exif": exif}


def _exif(text: str) -> bytes:
    """EXIF with the text as its user comment, UTF-16 in the byte order of the whole.

    EXIF 2.3 gives the comment type UNDEFINED. Pillow would write BYTE, at which piexif, and with it A1111, fails.
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
    """The origin that a picture carries. The file is not trusted: it is not decoded, and every value is checked."""
    try:
        with Image.open(path, formats=READABLE) as picture:
            xmp = picture.info.get("xmp") or b""
    except FileNotFoundError:
        raise RequestError(f"there is no picture {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} is no PNG, JPEG or WebP picture ({error})") from error
    found = re.search(rb'\szimage:origin="([^"<]*)"', xmp)
    if not found or NAMESPACE.encode() not in xmp:
        raise RequestError(f"{path} does not tell how it was made: mlx-zimage did not write it, or it was stripped")
    if len(found[1]) > MAX_JSON:
        raise RequestError(f"{path}: its description is longer than any of this program's")
    try:
        return Origin.from_json(html.unescape(found[1].decode("ascii", "replace")))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
