"""A model folder is read in every form in which it is published; anything else is reported by name."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import refusal, relative_error
from lanes import slow
from serving import answering
from tiny import CONFIGS

from mlx_zimage import CheckpointError, ModelNotFoundError, RequestError, ZImagePipeline
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.component import read_header
from mlx_zimage.weights.hub import POCKET, locate
from mlx_zimage.weights.listing import choose_files

COMPONENTS = tuple(CONFIGS)


def rewrite(folder: Path, component: str, change=lambda arrays: None, config: dict | None = None, **options) -> None:
    """Rewrite a component with change(arrays), where arrays maps names to float32 arrays."""
    arrays = tiny.weights(0, component, CONFIGS[component])
    arrays = change(arrays) or arrays
    shutil.rmtree(folder / component)
    tiny.save_component(folder / component, component, arrays, config or CONFIGS[component], **options)


def generate(folder: Path) -> np.ndarray:
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32")
    return pipe("a red fox", width=32, height=32, num_inference_steps=1, seed=0, output_type="latent").images


def parse(content: bytes) -> tuple[dict, bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def build(header: dict, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


# ---- the forms that a checkpoint comes in


@pytest.mark.parametrize("shards", [slow(1), 2, slow(5)])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_single_file_and_shards_give_the_same_model(folder, component, shards):
    before = generate(folder)
    dtype = mx.float32 if component == "transformer" else mx.bfloat16
    rewrite(folder, component, dtype=dtype, shards=shards)
    assert np.array_equal(generate(folder), before)


@pytest.mark.parametrize("dtype", [slow(mx.float32), mx.bfloat16, slow(mx.float16)], ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_dtype_on_disk_is_read_exactly(folder, component, dtype):
    rewrite(folder, component, dtype=dtype)
    part = getattr(open_checkpoint(folder), component)
    for name, exact in tiny.weights(0, component, CONFIGS[component]).items():
        stored = mx.array(exact).astype(dtype).astype(mx.float32)
        assert mx.array_equal(part.read(name, mx.float32)(), part.config.sanitize(name, stored)), name


@pytest.mark.parametrize(
    "rename", [lambda name: name, lambda name: name.removeprefix("model.")], ids=["model.", "no prefix"]
)
@pytest.mark.parametrize("head", [False, True], ids=["tied", "lm_head"])
def test_text_encoders_with_and_without_prefix_and_head_give_the_same_image(folder, rename, head):
    before = generate(folder)

    def change(arrays):
        arrays = {rename(name): x for name, x in arrays.items()}
        return arrays | ({"lm_head.weight": np.ones((512, 40), np.float32)} if head else {})

    rewrite(folder, "text_encoder", change, dtype=mx.bfloat16, shards=2)
    assert np.array_equal(generate(folder), before)


def test_both_spellings_of_the_text_encoders_config_give_the_same_image(folder):
    before = generate(folder)
    config = dict(tiny.TEXT_ENCODER)
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        del config[key]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "dtype": "bfloat16"}
    rewrite(folder, "text_encoder", config=config, dtype=mx.bfloat16)
    assert np.array_equal(generate(folder), before)
    config["rope_parameters"]["rope_theta"] = 100.0
    rewrite(folder, "text_encoder", config=config, dtype=mx.bfloat16)
    assert not np.array_equal(generate(folder), before)


def test_the_last_layer_and_the_norm_of_the_text_encoder_are_never_read(folder):
    before = generate(folder)

    def poison(arrays):
        for name in arrays:
            if name.startswith("model.layers.3.") or name == "model.norm.weight":
                arrays[name][:] = np.nan

    rewrite(folder, "text_encoder", poison, dtype=mx.bfloat16)
    assert np.array_equal(generate(folder), before)


def test_the_last_layer_and_the_norm_of_the_text_encoder_may_be_missing(folder):
    before = generate(folder)

    def leave_out(arrays):
        return {name: x for name, x in arrays.items() if "layers.3." not in name and name != "model.norm.weight"}

    rewrite(folder, "text_encoder", leave_out, dtype=mx.bfloat16)
    assert np.array_equal(generate(folder), before)


def test_opening_reads_no_tensor_data(folder, monkeypatch):
    monkeypatch.setattr(mx, "load", lambda *args, **kwargs: pytest.fail("read tensor data"))
    ZImagePipeline.from_pretrained(folder)


def test_files_not_listed_in_the_index_are_ignored(folder):
    before = generate(folder)
    (folder / "transformer" / "stale.safetensors").write_bytes(b"of another model")
    assert np.array_equal(generate(folder), before)


# ---- the embedding table


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_embedding_rows_match_the_table(folder, dtype):
    rewrite(folder, "text_encoder", dtype=dtype, shards=3)
    part = open_checkpoint(folder).text_encoder
    name, ids = "model.embed_tokens.weight", [511, 0, 3, 3, 480]
    assert mx.array_equal(part.rows(name, ids, mx.float32), part.read(name, mx.float32)()[mx.array(ids)])
    assert part.rows(name, ids, mx.bfloat16).dtype == mx.bfloat16


def test_a_prompt_reads_only_its_rows_of_the_embedding(folder):
    ids = ZImagePipeline.from_pretrained(folder).tokenizer.encode("a red fox")
    before = generate(folder)

    def poison(arrays):
        others = sorted(set(range(512)) - set(ids))
        arrays["model.embed_tokens.weight"][others] = np.nan

    rewrite(folder, "text_encoder", poison, dtype=mx.bfloat16)
    assert np.array_equal(generate(folder), before)


# ---- weights that do not fit


@pytest.mark.parametrize("component", COMPONENTS)
def test_missing_weights_are_named(folder, component):
    gone = [name for name in tiny.weights(0, component, CONFIGS[component]) if "layers.3." not in name][1:10:4]
    gone = [name for name in gone if name != "model.norm.weight"]

    def leave_out(arrays):
        return {name: x for name, x in arrays.items() if name not in gone}

    rewrite(folder, component, leave_out)
    message = refusal(folder)
    assert f"{folder / component}: missing weights ({len(gone)} of " in message
    assert f"): {', '.join(gone)}" in message


def test_at_most_five_missing_weights_are_named(folder):
    rewrite(folder, "vae", lambda arrays: {name: x for name, x in arrays.items() if name.startswith("encoder")})
    message = refusal(folder)
    assert "missing weights (138 of 244): decoder.conv_in.weight, decoder.conv_in.bias, " in message
    assert message.endswith("and 133 more")
    assert message.count("decoder.") == 5


@pytest.mark.parametrize("component", COMPONENTS)
def test_unexpected_weights_are_named(folder, component):
    rewrite(folder, component, lambda arrays: arrays | {"layers.0.lora_A.weight": np.zeros((4, 4), np.float32)})
    message = refusal(folder)
    assert ": unexpected weights (1): " in message
    assert message.endswith("layers.0.lora_A.weight")


@pytest.mark.parametrize(
    ("component", "name", "shape", "expected"),
    [
        ("transformer", "layers.1.attention.to_q.weight", (48, 40), (48, 48)),
        ("transformer", "x_pad_token", (48,), (1, 48)),
        ("text_encoder", "model.layers.0.mlp.up_proj.weight", (40, 96), (96, 40)),
        ("vae", "decoder.conv_in.weight", (24, 3, 3, 16), (24, 16, 3, 3)),
    ],
)
def test_misshapen_weights_are_named_with_both_shapes(folder, component, name, shape, expected):
    rewrite(folder, component, lambda arrays: arrays | {name: np.zeros(shape, np.float32)})
    message = refusal(folder)
    assert "weights whose shape differs from the one in config.json (1 of " in message
    assert f"{name} is {shape}, expected {expected}" in message


@pytest.mark.parametrize("dtype", ["F64", "I64", "F8_E4M3", "U32"])
def test_weights_of_another_dtype_are_named(folder, dtype):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    header, tensors = parse(file.read_bytes())
    del header["__metadata__"]
    name = max(header, key=lambda name: header[name]["data_offsets"])  # the last in the file
    begin, _ = header[name]["data_offsets"]
    size = {"F64": 8, "I64": 8, "F8_E4M3": 1, "U32": 4}[dtype] * int(np.prod(header[name]["shape"]))
    header[name] |= {"dtype": dtype, "data_offsets": [begin, begin + size]}
    file.write_bytes(build(header, tensors[:begin] + bytes(size)))
    assert f"{name} is {dtype}" in refusal(folder)


def test_networks_of_different_models_are_refused(folder):
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(POCKET / "text_encoder", folder / "text_encoder")
    assert "they belong to different models" in refusal(folder)


# ---- files that are damaged or missing


def vae_file(folder: Path) -> Path:
    return folder / "vae" / "diffusion_pytorch_model.safetensors"


def swap_offsets(content: bytes) -> bytes:
    """Make two tensors share their bytes."""
    header, tensors = parse(content)
    header["encoder.conv_in.bias"]["data_offsets"] = header["encoder.conv_norm_out.bias"]["data_offsets"]
    return build(header, tensors)


def negative_shape(content: bytes) -> bytes:
    header, tensors = parse(content)
    header["encoder.conv_in.bias"]["shape"] = [-2, -4]
    return build(header, tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: content[:7],
        lambda content: b"",
        lambda content: content + b"junk",
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n",
        lambda content: b"<!DOCTYPE html><html><body>Sign in</body></html>",
        lambda content: np.random.default_rng(0).bytes(10000),
        lambda content: struct.pack("<Q", 2**40) + content[8:],
        lambda content: struct.pack("<Q", 5) + b"[1,2]",
        swap_offsets,
        negative_shape,
    ],
    ids=[
        *("half", "a byte short", "cut in its header", "7 bytes", "empty", "junk behind", "LFS pointer", "HTML"),
        *("random", "endless header", "not an object", "overlap", "negative shape"),
    ],
)
def test_a_damaged_file_is_named_before_it_is_read(folder, change):
    file = vae_file(folder)
    file.write_bytes(change(file.read_bytes()))
    message = refusal(folder)
    assert f"{file} is not a complete safetensors file" in message
    assert "download it again" in message


def test_a_damaged_shard_is_named(folder):
    file = folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is not a complete safetensors file" in refusal(folder)


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_missing_shard_is_named(folder, component):
    file = sorted((folder / component).glob("*.safetensors"))[1]
    file.unlink()
    assert f"{file} is missing, but the index lists it" in refusal(folder)


def test_an_index_without_one_of_the_shards_leaves_its_weights_missing(folder):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = "diffusion_pytorch_model-00003-of-00003.safetensors"
    names = [name for name, file in content["weight_map"].items() if file == last]
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != last}
    index.write_text(json.dumps(content))
    message = refusal(folder)
    assert f"missing weights ({len(names)} of 116)" in message
    assert names[0] in message


def test_a_weight_in_two_shards_is_refused(folder):
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    first, second = (mx.load(str(shard)) for shard in shards[:2])
    name = next(iter(first))
    mx.eval(list(second.values()))
    mx.save_safetensors(str(shards[1]), second | {name: first[name] + 1})
    message = refusal(folder)
    assert name in message
    assert shards[0].name in message
    assert shards[1].name in message


@pytest.mark.parametrize(
    "name",
    [
        "../vae/diffusion_pytorch_model.safetensors",
        "/etc/passwd",
        "..",
        "a/b.safetensors",
        "",
        "a\0.safetensors",
        3,
        None,
        ["x"],
    ],
)
def test_an_index_may_list_only_files_in_its_folder(folder, name):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x_pad_token"] = name
    index.write_text(json.dumps(content))
    assert f"{index} lists {name!r}; shards must be in the same folder" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "\x00"])
def test_a_damaged_index_is_named(folder, content):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in refusal(folder)


def test_two_indexes_are_refused(folder):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    shutil.copy(index, index.with_name("model.safetensors.index.json"))
    assert "has 2 index files" in refusal(folder)


def test_two_files_without_an_index_are_refused(folder):
    shutil.copy(vae_file(folder), folder / "vae" / "other.safetensors")
    assert "2 safetensors files but no index" in refusal(folder)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_folder_of_a_network_is_named(folder, component):
    shutil.rmtree(folder / component)
    assert f"{folder} has no folder {component}/" in refusal(folder)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        *(f"{component}/config.json" for component in COMPONENTS),
    ],
)
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    message = refusal(folder)
    assert Path(file).name in message
    assert str(folder) in message


def test_a_folder_without_safetensors_is_refused(folder):
    vae_file(folder).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    assert f"{folder / 'vae'} has no safetensors file" in refusal(folder)


# ---- finding a model


@pytest.mark.parametrize("source", ["/nowhere/to/be/found", "no such model", "./nowhere/model/here"])
def test_a_missing_folder_is_reported_with_what_is_accepted(source):
    with pytest.raises(ModelNotFoundError, match="give a folder, a file, a Hugging Face id such as") as caught:
        locate(source)
    assert source in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_path_may_start_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/model") == (folder, None)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = """
import sys
from mlx_zimage.errors import ZImageError
from mlx_zimage.weights.checkpoint import open_checkpoint
try:
    print(open_checkpoint(sys.argv[1]).folder)
except ZImageError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub_cache(tiny_folder, tmp_path) -> Path:
    """A hub cache with the tiny checkpoint as someone/tiny, with links to blobs as the hub client makes them."""
    cache = tmp_path / "home" / "hub"
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(tiny_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for i, file in enumerate(path for path in snapshot.rglob("*") if path.is_file()):
        blob = repository / "blobs" / f"{i:064x}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    return cache


def open_elsewhere(source: str, **environment: str) -> subprocess.CompletedProcess:
    """Open a model in a separate process, since the hub client reads its environment only once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    command = [sys.executable, "-c", OPEN, source]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", slow("HF_HOME")])
def test_a_cached_repository_opens_offline(hub_cache, variable):
    place = hub_cache if variable == "HF_HUB_CACHE" else hub_cache.parent
    result = open_elsewhere("someone/tiny", HF_HUB_OFFLINE="1", **{variable: str(place)})
    assert result.stdout == f"{hub_cache / 'models--someone--tiny' / 'snapshots' / COMMIT}\n", result.stderr


def test_a_repository_that_is_not_cached_is_reported_offline(hub_cache):
    result = open_elsewhere("someone/else", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(hub_cache))
    assert result.returncode == 3
    assert result.stdout.startswith("ModelNotFoundError: someone/else is not a local folder")
    assert "HF_HUB_OFFLINE" in result.stdout


def test_a_hub_that_cannot_be_reached_is_reported(hub_cache):
    # nothing listens on port 9
    result = open_elsewhere("someone/else", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(hub_cache))
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("ModelNotFoundError: someone/else is not a local folder")


@pytest.fixture
def hub(tiny_folder):
    """A hub on this machine that serves someone/tiny, and an image next to it, to clients with the token."""
    files = {str(path.relative_to(tiny_folder)): path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}
    files |= {"README.md": b"# Tiny", "assets/showcase.jpg": b"JPEG"}

    class Hub(BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def do_GET(self, body=True):
            headers, content = {}, b""
            if self.headers.get("Authorization") != "Bearer hf_secret":
                status, headers = 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            elif self.path.startswith("/api/models/someone/tiny/tree/"):
                sizes = {name: len(content) for name, content in files.items()}
                tree = [{"type": "file", "path": x, "size": size, "oid": "0" * 40} for x, size in sizes.items()]
                status, content = 200, json.dumps(tree).encode()
            elif self.path.startswith("/api/models/someone/tiny"):
                listed = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                status, content = 200, json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": listed}).encode()
            else:
                name = self.path.removeprefix(f"/someone/tiny/resolve/{COMMIT}/")
                self.asked.append(name)
                status, content = 200, files[name]
                headers = {"ETag": f'"{zlib.crc32(content):08x}"', "X-Repo-Commit": COMMIT}
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args):
            pass

    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Hub)) as url:
        yield Hub, url


def test_a_repository_is_downloaded_once_without_unneeded_files(hub, tmp_path):
    handler, endpoint = hub
    environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path)}
    fetched = open_elsewhere("someone/tiny", **environment)
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    assert fetched.stdout == f"{snapshot}\n", fetched.stderr
    assert {path.name for path in snapshot.iterdir()} == {
        *("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    }
    assert "README.md" not in handler.asked
    handler.asked.clear()
    assert open_elsewhere("someone/tiny", HF_HUB_OFFLINE="1", **environment).stdout == f"{snapshot}\n"
    assert not handler.asked


def test_a_repository_that_the_hub_refuses_is_reported_with_the_reason(hub, tmp_path):
    _, endpoint = hub
    result = open_elsewhere("someone/tiny", HF_ENDPOINT=endpoint, HF_TOKEN="hf_wrong", HF_HOME=str(tmp_path))
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("ModelNotFoundError: someone/tiny is not a local folder, and downloading it")
    assert "401" in result.stdout


def test_a_partly_downloaded_repository_is_reported_by_its_missing_shard(hub_cache):
    shard = next((hub_cache / "models--someone--tiny").rglob("*-00002-of-00003.safetensors"))
    shard.unlink()
    result = open_elsewhere("someone/tiny", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(hub_cache))
    assert result.returncode == 4
    assert f"{shard} is missing, but the index lists it; download the model again" in result.stdout


def test_a_header_gives_the_offset_of_each_tensor(folder):
    entries = read_header(vae_file(folder))
    content = vae_file(folder).read_bytes()
    name = "decoder.conv_out.weight"
    stored = content[entries[name].offset :][: entries[name].nbytes]
    exact = tiny.weight(0, "vae", name, entries[name].shape)
    # bfloat16 is the upper half of a float32
    read = (np.frombuffer(stored, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(exact.shape)
    assert relative_error(read, exact) < 2**-8


@pytest.mark.skipif(sys.platform != "linux", reason="only CUDA, which is Linux's, has this need")
def test_freed_memory_is_kept_for_the_next_tensor():
    program = """
import ctypes, sys
if sys.argv[1] == "keep":
    from mlx_zimage.machine import keep_freed_memory
    keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resident()
pointer = libc.malloc(2**28)
ctypes.memset(pointer, 1, 2**28)
libc.free(pointer)
print(resident() - before > 2**27)
"""
    for way, stays in (("keep", "True"), ("default", "False")):
        result = subprocess.run([sys.executable, "-c", program, way], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == stays, way


# ---- unrelated files, and alternatives to choose from


def test_hidden_files_are_ignored(folder):
    before = generate(folder)
    tiny.litter(folder)
    assert np.array_equal(generate(folder), before)


def as_variant(
    folder: Path, component: str, variant: str, shards: int, legacy: bool = False, keep: bool = True
) -> None:
    """Add a component's weights plus 1 under a variant's names, next to or instead of the existing ones."""
    arrays = {name: x + 1 for name, x in tiny.weights(0, component, CONFIGS[component]).items()}
    aside = folder.parent / f"aside-{component}"
    tiny.save_component(aside, component, arrays, CONFIGS[component], shards=shards)
    if not keep:
        for file in (folder / component).glob("*.safetensors*"):
            file.unlink()
    stem = tiny.FILE_STEM[component]
    for file in aside.glob("*.safetensors"):
        part = file.stem.removeprefix(stem)
        name = f"{stem}{part}.{variant}.safetensors" if legacy else f"{stem}.{variant}{part}.safetensors"
        file.rename(folder / component / name)
    for file in aside.glob("*.index.json"):
        index = json.loads(file.read_text())
        for name, shard in index["weight_map"].items():
            part = Path(shard).stem.removeprefix(stem)
            index["weight_map"][name] = (
                f"{stem}{part}.{variant}.safetensors" if legacy else f"{stem}.{variant}{part}.safetensors"
            )
        name = f"{stem}.safetensors.{variant}.index.json" if legacy else f"{stem}.safetensors.index.{variant}.json"
        (folder / component / name).write_text(json.dumps(index))


@pytest.mark.parametrize("legacy", [False, True], ids=["today's names", "former names"])
@pytest.mark.parametrize("shards", [slow(1), 3])
@pytest.mark.parametrize("component", COMPONENTS)
def test_files_without_a_variant_are_preferred_unless_one_is_named(folder, component, shards, legacy):
    as_variant(folder, component, "fp16", shards, legacy)
    name, exact = next(iter(tiny.weights(0, component, CONFIGS[component]).items()))
    for variant, added in ((None, 0), ("fp16", 1), ("turbo", 0)):
        part = getattr(open_checkpoint(folder, variant), component)
        assert {"fp16" in entry.file.name for entry in part.entries.values()} == {bool(added)}
        stored = part.config.sanitize(name, mx.array(exact + added))
        assert np.allclose(part.read(name, mx.float32)(), stored, rtol=2**-8)  # some are bfloat16


def test_weights_that_no_network_reads_are_not_a_network(folder):
    (file,) = (folder / "vae").glob("*.safetensors")
    mx.save_safetensors(str(file), {"norm_final.weight": mx.zeros(4)})
    (folder / "vae" / f"{file.name}.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert refusal(folder).endswith("/vae contains no weights; give a file with the weights of Z-Image")


def test_a_variant_must_be_named_only_if_there_is_a_choice(folder):
    as_variant(folder, "vae", "fp16", 1, keep=False)
    assert open_checkpoint(folder).vae.entries["decoder.conv_in.bias"].file.name.endswith(".fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"only the file variant fp16, not 'bf16'; name it with --variant"):
        choose_files([path.name for path in (folder / "vae").iterdir()], "bf16", {}.get, folder)
    as_variant(folder, "vae", "bf16", 1)
    assert "has only the file variants bf16 and fp16; choose one with --variant" in refusal(folder)
    assert open_checkpoint(folder, "bf16").vae.entries["decoder.conv_in.bias"].file.name.endswith(".bf16.safetensors")
    with pytest.raises(
        RequestError, match=r"must be turbo, base, de-turbo or a file variant of .* \(bf16, fp16\); got 'fp8'"
    ):
        open_checkpoint(folder, "fp8")


def test_a_stale_index_is_ignored_next_to_one_complete_file(folder):
    before = generate(folder)
    arrays = tiny.weights(0, "transformer", CONFIGS["transformer"])
    for shard in (folder / "transformer").glob("*-of-*.safetensors"):
        shard.unlink()
    tiny.save_component(folder / "transformer", "transformer", arrays, CONFIGS["transformer"])
    assert np.array_equal(generate(folder), before)
    arrays.pop("x_pad_token")
    tiny.save_component(folder / "transformer", "transformer", arrays, CONFIGS["transformer"])
    message = refusal(folder)
    assert "missing weights (1 of 116): x_pad_token; diffusion_pytorch_model.safetensors.index.json lists " in message
    assert "-00003-of-00003.safetensors, missing here: download them, or delete that index" in message


def test_numbered_shards_need_no_index(folder):
    before = generate(folder)
    for index in folder.rglob("*.index.json"):
        index.unlink()
    assert np.array_equal(generate(folder), before)
    next((folder / "transformer").glob("*-00002-of-*")).unlink()
    assert "has 2 of 3 parts, such as diffusion_pytorch_model-00001-of-00003.safetensors" in refusal(folder)


@pytest.mark.parametrize("use", ["", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint"])
def test_other_pipelines_with_the_same_networks_are_read(folder, use):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": f"ZImage{use}Pipeline"}))
    assert open_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("LoRA", ["diffusion_model.layers.0.attention.to_q.lora_A.weight"]),
        ("LoRA", ["lora_unet_layers_0_attention_to_q.lora_down.weight", "lora_unet_layers_0_attention_to_q.alpha"]),
        ("LoRA", ["lycoris_layers_0_attention_to_q.lokr_w1", "lycoris_layers_0_attention_to_q.lokr_w2"]),
        ("ControlNet", ["control_layers.0.attention.to_q.weight", "control_all_x_embedder.2-1.weight"]),
    ],
)
def test_a_lora_or_controlnet_instead_of_a_model_is_named(tmp_path, folder, kind, names):
    tensors = {name: mx.zeros((4, 4)) for name in names}
    mx.save_safetensors(str(tmp_path / "pytorch_lora_weights.safetensors"), tensors)
    assert f"has no model_index.json: it is a {kind}; expected a diffusers folder" in refusal(tmp_path)
    shutil.rmtree(folder / "transformer")
    tiny.save_component(folder / "transformer", "transformer", tensors, CONFIGS["transformer"])
    assert refusal(folder).startswith(f"{folder / 'transformer'} is a {kind}, not a model; ")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(CheckpointError, match=f"safetensors is a {kind}, not a model; (apply|expected)"):
        open_checkpoint(file)


def test_tensors_that_no_network_reads_are_ignored(folder):
    before = generate(folder)
    extra = {"norm_final.weight": np.ones(48, np.float32)}
    rewrite(folder, "transformer", lambda arrays: arrays | extra)
    assert np.array_equal(generate(folder), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_a_quantized_embedding_match_the_table(tmp_path, bits):
    """mlx-lm packs the embedding too, and a head if there is one."""
    folder = shutil.copytree(POCKET, tmp_path / "model")
    file, config = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    arrays = mx.load(str(file))
    table = arrays["model.embed_tokens.weight"]
    packed = mx.quantize(table, group_size=64, bits=bits)
    for layer in ("model.embed_tokens", "lm_head"):
        arrays |= {f"{layer}.{part}": x for part, x in zip(("weight", "scales", "biases"), packed, strict=True)}
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)
    block = {"quantization": {"group_size": 64, "bits": bits}}
    config.write_text(json.dumps(json.loads(config.read_text()) | block))
    part, ids = open_checkpoint(folder).text_encoder, [3, 0, 3, table.shape[0] - 1]
    for dtype in (mx.float32, mx.bfloat16):
        wanted = mx.dequantize(packed[0], *(x.astype(dtype) for x in packed[1:]), group_size=64, bits=bits)
        got = part.rows("model.embed_tokens.weight", ids, dtype)
        assert got.dtype == dtype and mx.array_equal(got, wanted[mx.array(ids)])
    assert np.isfinite(generate(folder)).all()


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused_when_opened(folder):
    shutil.copy(POCKET / "tokenizer" / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json has \d+ tokens, but the text encoder has 512; they belong to"
    ):
        ZImagePipeline.from_pretrained(folder)
