"""The LoRAs in the server's folder, by name: the only files that a client can choose, and only by the names that
listing the folder finds."""

from __future__ import annotations

from pathlib import Path

from ..weights.listing import visible


def lora_files(folder: Path | None) -> dict[str, Path]:
    """The safetensors files in a folder, by their names without the suffix."""
    found = visible(folder, "*.safetensors") if folder else []
    return {file.stem: file for file in found if file.is_file() and file.stem.isprintable() and len(file.stem) <= 200}
