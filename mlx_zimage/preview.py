"""Pictures inside the terminal, where it can show them: iTerm2's protocol (WezTerm too), or kitty's (Ghostty too)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

CHUNK = 4096  # characters of base64 that kitty takes at a time


def protocol(environment: Mapping[str, str]) -> str | None:
    """What the terminal of these environment variables understands: "iterm", "kitty" or None."""
    if "TMUX" in environment or environment.get("TERM", "").startswith(("screen", "tmux")):
        return None  # a multiplexer swallows both
    program = environment.get("TERM_PROGRAM", "").lower()
    if "KITTY_WINDOW_ID" in environment or "GHOSTTY_RESOURCES_DIR" in environment or program == "ghostty":
        return "kitty"
    if "WEZTERM_PANE" in environment or program in ("iterm.app", "wezterm"):
        return "iterm"
    return None


def inline(path: Path, protocol: str) -> bytes:
    """The bytes that show a picture file in a terminal. kitty is sent a PNG whatever the file is."""
    content = path.read_bytes()
    if protocol == "iterm":
        options = f"inline=1;size={len(content)}"
        return b"\033]1337;File=" + options.encode() + b":" + base64.b64encode(content) + b"\a\n"
    text = base64.b64encode(content if path.suffix.lower() == ".png" else _as_png(path))
    chunks = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    pieces = []
    for i, chunk in enumerate(chunks):
        keys = b"a=T,f=100,q=2," if i == 0 else b""  # transmit and show, PNG, without an answer
        pieces.append(b"\033_G" + keys + (b"m=1;" if i < len(chunks) - 1 else b"m=0;") + chunk + b"\033\\")
    return b"".join(pieces) + b"\n"


def _as_png(path: Path) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(stream, format="PNG")
    return stream.getvalue()
