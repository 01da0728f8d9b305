"""Find a model: "pocket", a folder on this disk, or a Hugging Face repository, which is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelNotFoundError
from ..models import NETWORKS

POCKET = Path(__file__).parents[1] / "pocket"
REPOSITORY_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The files from_pretrained and convert need from a repository: no images, no copies in other formats.
NEEDED_FILES = [
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    *(f"{network}/*.{ending}" for network in NETWORKS for ending in ("json", "safetensors")),
]


def resolve(source: str | Path, needed: Sequence[str] = NEEDED_FILES) -> Path:
    """The local folder of a model: "pocket", a folder, or a Hugging Face id (downloaded into the hub's cache).

    needed are the patterns of files to download.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise ModelNotFoundError(f"expected a model's folder, a Hugging Face id or 'pocket', but got {source!r}")
    if str(source) == "pocket":
        return POCKET
    folder = Path(os.path.expanduser(source))  # unlike Path.expanduser, leaves ~ alone if there is no home folder
    try:
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, ValueError) as error:  # too long for the system, or with a NUL
        raise ModelNotFoundError(f"{str(source)[:80]!r} is not a valid folder name ({error.args[-1]})") from None
    if is_folder:
        return folder
    if is_file:
        raise ModelNotFoundError(f"{source} is a file; expected a folder with model_index.json")
    if not REPOSITORY_ID.fullmatch(str(source)):
        raise ModelNotFoundError(
            f"no model folder at {source}; give a folder, a Hugging Face id such as "
            f"Tongyi-MAI/Z-Image-Turbo, or 'pocket'"
        )
    return _fetch(str(source), needed)


def _fetch(repository: str, needed: Sequence[str]) -> Path:
    # Imported here because the hub client reads HF_HOME, HF_HUB_OFFLINE and HF_TOKEN when it is imported. HTTPError
    # comes from the HTTP library that the installed release of the client uses: httpx or httpx2.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{"disable": None, **options})  # None: no bar if stderr is not a terminal

    try:
        return Path(snapshot_download(repository, allow_patterns=list(needed), tqdm_class=Bar))
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repository} is not a local folder and is not in the Hugging Face cache, and the hub cannot be reached; "
            f"check the network and HF_HUB_OFFLINE, or give a folder"
        ) from error
    except (HFValidationError, HTTPError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"{repository} is not a local folder, and downloading it from the Hugging Face hub failed: {first_line}"
        ) from error
