"""Find a model: "pocket", a folder on this disk, or a Hugging Face repository, which is downloaded file by file."""

from __future__ import annotations

import glob
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError, ModelNotFoundError
from ..models import NETWORKS
from ..untrusted import read_bytes
from ..variants import TURBO, repository_of
from . import headers
from .listing import is_hidden
from .manifest import CONVERSION, MANIFEST

POCKET = Path(__file__).parents[1] / "pocket"
REPOSITORY_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
IN_REPOSITORY = re.compile(rf"({REPOSITORY_ID.pattern})(?:@(\w[\w.-]*))?(?::(\w[^:]*))?")
# The files that are enough to refuse a repository that is not a model of this family, including the shards' indexes.
SMALL_FILES = [
    *("model_index.json", "config.json", "*.safetensors.index.json", CONVERSION, MANIFEST),
    *(f"{name}/*.json" for name in (*NETWORKS, "scheduler")),
]
FIRST = 100_001  # bytes of a safetensors file to ask for first: more than the headers of most take
TOKENIZER_FILES = ["tokenizer/*.json", "tokenizer/*.txt", "tokenizer/*.jinja"]


class Repository:
    """A Hugging Face repository at its latest commit or, without a network, at the commit in the local cache.

    folder is its snapshot in the cache. Creating a Repository downloads the configs, including those of a model in the
    folder `within`; other files follow when they are fetched. All paths are paths in the snapshot, whether the files
    are there yet or not.
    """

    def __init__(self, id: str, revision: str | None = None, within: str = ""):
        self.id = id
        nested = [f"{glob.escape(within)}/{pattern}" for pattern in SMALL_FILES] if within else []
        here_only = revision is not None and not _answers(id, revision)
        self.folder = _download(id, SMALL_FILES + nested, revision, shown=False, here_only=here_only)

    @cached_property
    def _listing(self) -> dict[Path, tuple[int, str | None]]:
        """The size of each file in bytes, and the SHA-256 of large ones, as the hub lists them."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        try:
            # list_repo_tree would try five times, for half a minute, before it reports that there is no network
            files = HfApi().model_info(self.id, revision=self.folder.name, files_metadata=True).siblings or []
            return {
                self.folder / file.rfilename: (file.size or 0, file.lfs.sha256 if file.lfs else None) for file in files
            }
        except (HTTPError, OfflineModeIsEnabled):
            return {path: (path.stat().st_size, None) for path in self.folder.rglob("*") if path.is_file()}

    @cached_property
    def sizes(self) -> dict[Path, int]:
        """The size of each file in bytes; if the hub cannot be reached, only of files that are downloaded."""
        return {path: size for path, (size, _) in self._listing.items()}

    def sha256(self, file: Path) -> str | None:
        """A large file's SHA-256, as the hub lists it."""
        return self._listing[file][1]

    def names(self, folder: Path) -> list[str]:
        """The names of the files in one of its folders, downloaded or not."""
        return sorted(path.name for path in self.sizes if path.parent == folder)

    def matching(self, patterns: Iterable[str], folder: Path | None = None) -> list[Path]:
        """The files that match any of the patterns, in a folder of the repository or anywhere."""
        own = [path for path in self.sizes if path.is_relative_to(folder or self.folder)]
        names = {path: PurePosixPath(self._name(path)) for path in own}
        return [path for path, name in names.items() if not is_hidden(name) and any(map(name.match, patterns))]

    def header(self, file: Path) -> dict[str, dict[str, Any]]:
        """A safetensors file's header, downloaded without the data: dtype, shape and data_offsets by tensor name."""
        from huggingface_hub.errors import HTTPError

        try:
            start = self._start(file, FIRST)
            length = headers.length_of(start[:8])
            if 8 + length > len(start):
                start = self._start(file, 8 + length)
            return headers.parse(start[8 : 8 + length])
        except HTTPError as error:
            raise _failed(self.id, error) from error
        except ValueError as error:
            raise CheckpointError(f"{self.id}: {self._name(file)} is not a safetensors file ({error})") from error

    def _start(self, file: Path, count: int) -> bytes:
        """At most the first `count` bytes of a file at the hub, even if a server sends more than it is asked for."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.id, self._name(file), revision=self.folder.name, endpoint=constants.ENDPOINT)
        wanted = {**build_hf_headers(), "range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=wanted, timeout=timeout) as response:
            if response.is_error:
                response.read()  # which hf_raise_for_status quotes
            hf_raise_for_status(response)
            content = b""
            for piece in response.iter_raw():
                content += piece
                if len(content) >= count:
                    break
        return content[:count]

    def own(self, files: Iterable[Path]) -> list[Path]:
        """Those of the files that are in this repository."""
        return [file for file in files if file.is_relative_to(self.folder)]

    def to_fetch(self, files: Iterable[Path]) -> int:
        """The bytes that `fetch` would download."""
        return sum(self.sizes.get(file, 0) for file in {*files} if not file.exists())

    def fetch(self, files: Iterable[Path]) -> None:
        """Download the files that are not in the folder yet."""
        missing = sorted({self._name(file) for file in files if not file.exists()})
        if missing:
            _download(self.id, [glob.escape(name) for name in missing], self.folder.name, shown=True)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def locate(source: str | Path) -> tuple[Path, Repository | None]:
    """The path of a model or a part of one, and the repository it is in, if any.

    source is "pocket", a folder, a file, a Hugging Face id, ID:PATH for a file or folder in its repository, ID@REVISION
    or both; an alias may stand for an id. Only the configs of a repository are downloaded.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise ModelNotFoundError(f"expected a model's folder, a Hugging Face id or 'pocket', but got {source!r}")
    if str(source) == "pocket":
        return POCKET, None
    if str(source).lower() == "pocket" and not os.path.exists(source):
        raise ModelNotFoundError(f"no model {str(source)!r}; did you mean 'pocket'?")
    folder = Path(os.path.expanduser(source))  # unlike Path.expanduser, leaves ~ alone if there is no home folder
    try:
        is_here = folder.is_dir() or folder.is_file()
    except (OSError, ValueError) as error:  # too long for the system, or with a NUL
        raise ModelNotFoundError(f"{str(source)[:80]!r} is not a valid folder name ({error.args[-1]})") from None
    if is_here:
        return check_name(folder), None
    name = re.split("[@:]", str(source))[0]
    if named := IN_REPOSITORY.fullmatch(repository_of(name) + str(source)[len(name) :]):
        within = (named[3] or "").rstrip("/")
        repository = Repository(named[1], named[2], within)
        path = repository.folder / within
        if within and not any(path in (file, *file.parents) for file in repository.sizes):
            raise ModelNotFoundError(f"{named[1]} has no file or folder {named[3]!r}; check the name at huggingface.co")
        return path, repository
    raise ModelNotFoundError(
        f"no model at {source}; give a folder, a file, a Hugging Face id such as {TURBO.repository}, or 'pocket'"
    )


def is_folder(path: Path, repository: Repository | None) -> bool:
    """Whether a path is a folder: one on this disk, or in the repository."""
    return path.is_dir() or bool(repository and any(path in file.parents for file in repository.sizes))


def pinned(id: str, revision: str, name: str) -> Path | None:
    """A file of a repository at a commit, in the hub's cache; None if it is not there."""
    folder = cached().get(id)
    path = folder / "snapshots" / revision / name if folder else None
    return path if path and path.is_file() else None


def fetch_pinned(id: str, revision: str, name: str) -> Path:
    """The same, downloaded if it is not there yet."""
    if found := pinned(id, revision, name):
        return found
    if not _answers(id, revision):
        raise ModelNotFoundError(
            f"{id}:{name} is not in the Hugging Face cache, and the hub cannot be reached; check the network and "
            f"HF_HUB_OFFLINE"
        )
    path = _download(id, [glob.escape(name)], revision, shown=True) / name
    if not path.is_file():
        raise ModelNotFoundError(f"{id} has no file {name} at {revision}")
    return path


def check_name(path: Path) -> Path:
    """The path; ModelNotFoundError if it is not valid text, since neither MLX nor tokenizers could open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelNotFoundError(f"{path} is not valid UTF-8; rename it") from None
    return path


def cached() -> dict[str, Path]:
    """The model repositories in the hub's cache, damaged ones too: id -> folder."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = sorted(path for path in Path(HF_HUB_CACHE).glob("models--*--*") if path.is_dir())
    return {folder.name.removeprefix("models--").replace("--", "/"): folder for folder in folders}


def snapshot(folder: Path) -> Path | None:
    """The snapshot that the id of a cached repository stands for offline: the one of main, else the only one."""
    snapshots = {path.name: path for path in folder.glob("snapshots/*") if path.is_dir()}
    try:
        main = read_bytes(folder / "refs" / "main", 1000).decode().strip()
    except (OSError, ValueError):
        main = ""
    if main not in snapshots and len(snapshots) == 1:
        (main,) = snapshots
    return snapshots.get(main)


def name_of(path: Path) -> str:
    """What to call a model without saying where it is: its name or, in a hub cache, its id or ID:PATH."""
    return _in_cache(path) or (path.resolve() if path.is_dir() else path).name


def argument(path: Path) -> str:
    """A model as a shell takes it: in a hub cache, its id or ID:PATH; otherwise its path."""
    return shlex.quote(_in_cache(path) or str(path))


def _in_cache(path: Path) -> str | None:
    """The id or ID:PATH of a model in a hub cache."""
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name  # the cache's files are links
    for folder in (path, *path.parents):
        if is_snapshot(folder):
            id = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            return id if path == folder else f"{id}:{path.relative_to(folder).as_posix()}"
    return None


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a repository's in a hub cache, which has only the files that were needed."""
    folder = folder.resolve()
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")


def check_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links out of the folder, except those from a snapshot in the hub's cache to its own blobs."""
    home = folder.resolve()
    inside = [home]
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            inside.append(snapshots.parent / "blobs")
    for path in paths:
        there = path.resolve()
        if not any(there.is_relative_to(place) for place in inside):
            raise CheckpointError(
                f"{path} is a link to {there}, outside {folder}; if that file belongs to the model, replace the "
                f"link with a copy of it"
            )


def _answers(repository: str, revision: str) -> bool:
    """Whether the hub can be reached.

    Without this, the client tries five times to list a commit's files, for half a minute, before it reports that there
    is no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(repository, revision=revision)
    except (HfHubHTTPError, HFValidationError):
        return True  # _download reports it
    except (HTTPError, OfflineModeIsEnabled):
        return False
    return True


def _download(repository: str, patterns: list[str], revision: str | None, shown: bool, here_only: bool = False) -> Path:
    """Download files of a revision, by default the latest, into the hub's cache, and return the snapshot's folder.

    shown says whether a terminal shows bars; here_only, whether to look only in the cache, without asking the hub.
    """
    # Imported here because the hub client reads HF_HOME, HF_HUB_OFFLINE and HF_TOKEN when it is imported. HTTPError
    # comes from the HTTP library that the installed release of the client uses: httpx or httpx2.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **options):
            # None: no bar if stderr is not a terminal.
            super().__init__(*args, **{"disable": None if shown else True, **options})

    try:
        with _none_may_match():
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=[".*", "*/.*"],  # hidden files, see is_hidden, that the patterns would include
                    tqdm_class=Bar,
                    local_files_only=here_only,
                )
            )
    except LocalEntryNotFoundError as error:
        folder = cached().get(repository)
        if revision is None and folder and (only := snapshot(folder)):
            return only
        raise ModelNotFoundError(
            f"{repository} is not a local folder and is not in the Hugging Face cache, and the hub cannot be reached; "
            f"check the network and HF_HUB_OFFLINE, or give a folder"
        ) from error
    except (HFValidationError, HTTPError) as error:
        raise _failed(repository, error) from error


@contextmanager
def _none_may_match() -> Iterator[None]:
    """Within the block, the hub's client does not warn that no file matches: a repository of LoRAs has no configs."""
    logger = logging.getLogger("huggingface_hub._snapshot_download")

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _failed(repository: str, error: Exception) -> ModelNotFoundError:
    first_line = str(error).strip().splitlines()[0]
    return ModelNotFoundError(
        f"{repository} is not a local folder, and downloading it from the Hugging Face hub failed: {first_line}"
    )
