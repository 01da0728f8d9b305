"""From a name to checked weights: find the folder, read the headers, hand out lazy arrays.

A model is a diffusers folder, as published or as our converter writes it. Opening it reads configs and headers
only, and compares every name and shape with the architecture; tensor data is read when a network asks for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, ModelNotFoundError, RequestError
from .models.layers import backend, result, settle
from .models.text_encoder import TextEncoderConfig
from .models.transformer import TransformerConfig
from .models.vae import VAEConfig
from .quantize import Quantization
from .scheduler import SchedulerConfig

POCKET = Path(__file__).parent / "pocket"
MANIFEST = "SHA256SUMS"  # of a folder that the converter wrote; as `sha256sum -c` reads it
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SHARD = re.compile(r"[^/\\\0]+\.safetensors")
COMPONENTS = {"transformer": TransformerConfig, "text_encoder": TextEncoderConfig, "vae": VAEConfig}
# What from_pretrained and convert need of a repository: no pictures, no second copies in other formats.
NEEDED_FILES = [
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    *(f"{component}/*.{ending}" for component in COMPONENTS for ending in ("json", "safetensors")),
]
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
FLOATS = ("F32", "F16", "BF16")
PIPELINE_CLASS = "ZImagePipeline"
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
SHOWN = 5  # names listed in an error


def resolve(source: str | Path, needed: Sequence[str] = NEEDED_FILES) -> Path:
    """The local folder of a model: "pocket", a folder, or a Hugging Face id (fetched into the hub's cache).

    needed are patterns of the files to fetch.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise ModelNotFoundError(f"a model is a folder, a Hugging Face id or 'pocket', got {source!r}")
    if str(source) == "pocket":
        return POCKET
    folder = Path(os.path.expanduser(source))  # unlike Path's own, leaves the home of nobody as it is
    try:
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, ValueError) as error:  # too long for the system, or with a NUL
        raise ModelNotFoundError(f"{str(source)[:80]!r} is no name of a folder ({error.args[-1]})") from None
    if is_folder:
        return folder
    if is_file:
        raise ModelNotFoundError(f"{source} is a file; a model is a folder with model_index.json")
    if not REPOSITORY.fullmatch(str(source)):
        raise ModelNotFoundError(
            f"no model folder at {source}; give a folder, a Hugging Face id such as "
            f"Tongyi-MAI/Z-Image-Turbo, or 'pocket'"
        )
    return _fetch(str(source), needed)


def _fetch(repository: str, needed: Sequence[str]) -> Path:
    # Imported here because the hub client reads HF_HOME, HF_HUB_OFFLINE and HF_TOKEN when it is imported. HTTPError is
    # that of the library the client uses, which its releases change: httpx, httpx2.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{"disable": None, **options})  # None: no bar where stderr is no terminal

    try:
        return Path(snapshot_download(repository, allow_patterns=list(needed), tqdm_class=Bar))
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repository} is no local folder and is not in the Hugging Face cache, and the hub cannot be reached; "
            f"check the network and HF_HUB_OFFLINE, or give a folder"
        ) from error
    except (HFValidationError, HTTPError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"{repository} is no local folder, and the Hugging Face hub did not give it: {first_line}"
        ) from error


def sha256(file: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} part of a diffusers folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, an object was wanted")
    return content


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies on disk; name, shape and dtype as stored."""

    file: Path
    name: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file."""
    if file.exists() and not os.access(file, os.R_OK):
        raise CheckpointError(f"{file} cannot be read: its permissions do not let you")
    try:
        # mx.load accepts overlapping, negative and trailing data; safetensors' own reader refuses them
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, though its index names it; fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); it may be cut off, a Git LFS pointer or an HTML "
            f"page: fetch it again"
        ) from error
    header.pop("__metadata__", None)
    entries = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        entries[name] = Entry(file, name, 8 + length + begin, end - begin, tuple(tensor["shape"]), tensor["dtype"])
    return entries


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a component: those its index names, or its one file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise CheckpointError(f"{folder} has {len(indexes)} indexes ({indexes[0].name}, {indexes[1].name}); keep one")
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{indexes[0]} has no weight_map; fetch it again")
        for name in weight_map.values():
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                raise CheckpointError(f"{indexes[0]} names {name!r}; shards must lie beside it")
        return [folder / name for name in sorted(set(weight_map.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if not files:
        raise CheckpointError(f"{folder} has no safetensors file; other formats must be converted first")
    raise CheckpointError(f"{folder} has {len(files)} safetensors files and no index to say which belong together")


# Threads of `read_all`. Reading with MLX's CUDA build, each takes a tensor from the disk's cache, then copies it to the
# GPU, both at 5 GB/s. Measured on an H100, in all: one 2 to 4 GB/s, two 4 to 6, four 5 to 8, eight no more.
READERS = 4


class Component:
    """One network's folder: its config and its tensors on disk, compared with the architecture."""

    def __init__(self, folder: Path, name: str):
        self.folder = folder / name
        self.name = name
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder} has no folder {name}/; is it a whole diffusers folder?")
        self.raw_config = read_json(self.folder / "config.json")
        self.config = _read_config(COMPONENTS[name], self.folder / "config.json")
        self.entries: dict[str, Entry] = {}
        self.bytes_read = 0  # of tensors, in this component's life
        self._counting = Lock()
        for file in find_shards(self.folder):
            for key, entry in read_header(file).items():
                if key in self.entries:
                    raise CheckpointError(
                        f"{self.folder}: {key} is both in {self.entries[key].file.name} and {file.name}"
                    )
                self.entries[key] = entry
        if name == "text_encoder":
            self.entries = {_with_model_prefix(key): entry for key, entry in self.entries.items()}
        self._check()

    @cached_property
    def quantizations(self) -> dict[str, Quantization]:
        """How each quantized layer is packed, from mlx-lm's block in config.json; keyed by the layer's path."""
        block = self.raw_config.get("quantization")
        if not block:
            return {}
        layers = [name.removesuffix(".scales") for name in self.entries if name.endswith(".scales")]
        try:
            return {layer: Quantization.from_dict(block.get(layer) or block) for layer in layers}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: quantization is not mlx-lm's block of bits and group_size ({error})"
            ) from error
        except RequestError as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: {error}") from error

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that must be here, quantized layers in their packed form."""
        shapes = {}
        for name, shape in self.config.shapes().items():
            q = self.quantizations.get(name.removesuffix(".weight"))
            shapes |= q.packed(name, shape) if q else {name: shape}
        return shapes

    def _unused(self, name: str) -> bool:
        return self.name == "text_encoder" and self.config.unused(name)

    def _check(self):
        expected = self.expected()
        missing = [name for name in expected if name not in self.entries and not self._unused(name)]
        extra = [name for name in self.entries if name not in expected and not self._unused(name)]
        misshapen = [
            f"{name} is {self.entries[name].shape}, wanted {shape}"
            for name, shape in expected.items()
            if name in self.entries and self.entries[name].shape != shape
        ]
        unknown = [
            f"{name} is {self.entries[name].dtype}"
            for name in expected
            if name in self.entries and self.entries[name].dtype not in self._dtypes(name)
        ]
        for fault, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape than config.json says", misshapen),
            (f"of a dtype other than {', '.join(FLOATS)}", unknown),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                raise CheckpointError(
                    f"{self.folder}: {len(names)} of {len(expected)} weights are {fault}: "
                    f"{', '.join(names[:SHOWN])}{more}"
                )

    def _dtypes(self, name: str) -> Collection[str]:
        # only a quantized layer may hold integers
        return DTYPES if name.rpartition(".")[0] in self.quantizations else FLOATS

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def read(
        self, prefix: str, dtype: mx.Dtype, without: str = "", stream: mx.Stream | mx.ThreadLocalStream | None = None
    ):
        """The tree of arrays under `prefix`, lazy, floating ones in dtype. A whole name gives its array.

        `without` names a part of the tree to leave out; stream is where the reading happens.
        """
        start = len(prefix) + 1
        # In one order, however shards cut a block: compiled functions take trees in another order for other ones.
        names = sorted(name for name in self.entries if name.startswith(f"{prefix}."))
        if without:
            names = [name for name in names if not name.startswith(without, start)]
        entries = [self.entries[name] for name in names or [prefix]]
        with self._counting:
            self.bytes_read += sum(entry.nbytes for entry in entries)
        files = {entry.file for entry in entries}
        loaded = {file: mx.load(str(file), stream=stream) for file in files}

        def array(name: str) -> mx.array:
            entry = self.entries[name]
            stored = loaded[entry.file][entry.name]
            if mx.issubdtype(stored.dtype, mx.floating):
                stored = stored.astype(dtype, stream=stream)
            return self.config.sanitize(name, stored)

        return tree_unflatten([(name[start:], array(name)) for name in names]) if names else array(prefix)

    def read_all(self, prefixes: Sequence[str], dtype: mx.Dtype, without: str = "") -> Iterator[dict]:
        """The tree of each of the prefixes in turn, as `read` gives it, but computed, by READERS threads."""

        def read(prefix: str) -> dict:
            tree = self.read(prefix, dtype, without)
            for _, array in tree_flatten(tree):
                mx.eval(array)  # one by one: what a tensor is made of goes before the next is read
            return tree

        # Its threads end here: one in which MLX's CUDA build works to a process's end may abort it (MLX 4506).
        with ThreadPoolExecutor(READERS, "mlx-zimage-reader") as readers:
            yield from readers.map(read, prefixes)

    def rows(self, name: str, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Single rows of a dense table, (len(ids), width) in dtype, read without the rest of it."""
        entry = self.entries[name]
        stored = np.memmap(entry.file, mode="r", offset=entry.offset, dtype=np.uint8, shape=(entry.nbytes,))
        picked = stored.reshape(entry.shape[0], -1)[np.asarray(ids)]
        self.bytes_read += picked.nbytes
        return mx.array(picked).view(DTYPES[entry.dtype]).astype(dtype)


# Whether a block is read while the one before is computed, by a thread of its own. MLX's CUDA build cannot: there a GPU
# that waits for such a thread may wait for ever. Its own reading keeps the calling thread, a hundred times as long as
# the GPU needs for a block; to begin before the GPU has done would only cost the memory of another block. There,
# what is kept is read before anything else, by `Component.read_all`.
READS_AHEAD = {"cpu": True, "metal": True, "cuda": False}


class Source:
    """Hands a network its weights in one dtype, keeping what it read but for the blocks named in `streamed`.

    Those are read from disk each time they are needed, one ahead of the computation (see READS_AHEAD). Either way the
    same function runs on the same numbers, so the results are the same bits.
    """

    def __init__(self, component: Component, dtype: mx.Dtype, streamed: Collection[str] = ()):
        self.component = component
        self.dtype = dtype
        self.streamed = streamed
        self._kept: dict = {}
        self._disk = mx.new_thread_local_stream(mx.cpu) if READS_AHEAD[backend()] else None
        if backend() == "cuda":
            keep_freed_memory()

    def tree(self, prefix: str, dtype: mx.Dtype | None = None):
        """The weights under a name, kept for the next call."""
        key = prefix, dtype
        if key not in self._kept:
            weights = self.once(prefix, dtype)
            mx.eval(weights)  # before it is kept: what is lazy belongs to this thread
            self._kept[key] = weights
        return self._kept[key]

    def once(self, prefix: str, dtype: mx.Dtype | None = None):
        """The weights under a name, lazy and not kept."""
        return self.component.read(prefix, dtype or self.dtype)

    def rows(self, name: str, ids: Sequence[int]) -> mx.array:
        return self.component.rows(name, ids, self.dtype)

    def run(self, *args, **kwargs) -> mx.array:
        """What `walk` returns."""
        return result(self.walk(*args, **kwargs))

    def walk(
        self, blocks: Sequence[str], x: mx.array, apply: Callable, without: str = "", wait: bool = False
    ) -> Generator[int, None, mx.array]:
        """Send x through the named blocks in turn: x = apply(x, weights, index); yields how many are done.

        `without` names a part of the blocks that is not needed.

        A GPU is given each block while it still computes the one before, so that it never waits; no more than those
        two blocks' intermediates are alive, and beside what is kept two blocks' weights, one where nothing is read
        ahead. `wait` holds one block's intermediates only, and so does reading.
        """
        wait = wait or mx.default_device() == mx.cpu
        if self._disk is None:
            self._keep(blocks, without, x)
        before, weights = x, self._start(blocks[0], without, x)
        for i in range(len(blocks)):
            x = apply(x, weights, i)
            weights = None  # not needed here any longer
            mx.async_eval(x)
            mx.eval(before)
            if i + 1 < len(blocks):
                weights = self._start(blocks[i + 1], without, x)
            if wait:
                settle(x)
            before = x
            yield i + 1
        return x

    def _start(self, block: str, without: str, x: mx.array) -> dict:
        """The weights of a block, from what is kept or on their way from the disk while x is computed."""
        if block in self._kept:
            return self._kept[block]
        weights = self.component.read(block, self.dtype, without=without, stream=self._disk)
        # A GPU would wait for the reading anyway, and so what led to x need not stay until it has its next block.
        if self._disk is None:
            settle(x)
            mx.async_eval(weights)
        else:
            mx.async_eval(weights)
            settle(x)
        if block not in self.streamed:
            self._kept[block] = weights
        return weights

    def _keep(self, blocks: Sequence[str], without: str, x: mx.array) -> None:
        """Read those of the blocks that are to be kept and are not yet, all at once after x is computed."""
        wanted = [block for block in blocks if block not in self._kept and block not in self.streamed]
        if wanted:
            settle(x)
            self._kept.update(zip(wanted, self.component.read_all(wanted, self.dtype, without), strict=True))

    def release(self) -> None:
        """Forget everything kept, and give its memory back."""
        self._kept.clear()
        mx.clear_cache()


@cache
def keep_freed_memory() -> None:
    """Have glibc's malloc keep up to 2 GB of what this process frees, in one heap for all threads.

    MLX's CUDA build reads every tensor into memory of its own. By default that is given back to the system each time,
    and to touch new memory takes about as long as the reading.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder: three checked components, the tokenizer's file and the scheduler's config."""

    folder: Path
    transformer: Component
    text_encoder: Component
    vae: Component
    scheduler: SchedulerConfig

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer" / "tokenizer.json"

    @property
    def components(self) -> Iterable[Component]:
        return self.transformer, self.text_encoder, self.vae


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find a model and compare it with the architecture. Reads configs and headers, no tensor data."""
    folder = resolve(source)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} has no model_index.json; a model is a diffusers folder")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != PIPELINE_CLASS:
        raise CheckpointError(f"{folder / 'model_index.json'} tells of a {kind}, a {PIPELINE_CLASS} was wanted")
    checkpoint = Checkpoint(
        folder,
        **{name: Component(folder, name) for name in COMPONENTS},
        scheduler=_read_config(SchedulerConfig, folder / "scheduler" / "scheduler_config.json"),
    )
    if not checkpoint.tokenizer_file.is_file():
        raise CheckpointError(f"{checkpoint.tokenizer_file} is missing; fetch the model again")
    text, wanted = checkpoint.text_encoder.config.hidden_size, checkpoint.transformer.config.cap_feat_dim
    if text != wanted:
        raise CheckpointError(
            f"{folder}: the text encoder gives {text} features a token, the transformer takes {wanted}; "
            f"they belong to different models"
        )
    return checkpoint


def _read_config(cls, file: Path):
    try:
        return cls.from_dict(read_json(file))
    except CheckpointError as error:
        raise error if str(file) in str(error) else CheckpointError(f"{file}: {error}") from error


def _with_model_prefix(name: str) -> str:
    # saving transformers' Qwen3Model instead of Qwen3ForCausalLM drops the prefix
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
