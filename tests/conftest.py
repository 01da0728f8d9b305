"""Fixtures for all tests: tiny models, and what diffusers computes with them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import create_autospec

# An M5 multiplies float32 in TF32 otherwise, which keeps 11 bits; MLX reads this when it is imported.
os.environ["MLX_ENABLE_TF32"] = "0"
# Two files are tested at a time, and the threads of OpenBLAS in one would wait for those in the other. Set here for the
# processes that pytest starts: in this one the library has been loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import huggingface_hub
import mlx.core as mx
import pytest
import tiny
from hub import Hub, User
from lanes import slow
from safetensors.numpy import load_file
from serving import serving
from tiny import Golden

from mlx_zimage import RequestError, ZImagePipeline, weights
from mlx_zimage.models.text_encoder import TextEncoder
from mlx_zimage.variants import TURBO
from mlx_zimage.weights.component import Component
from mlx_zimage.weights.hub import POCKET


@pytest.fixture(scope="session", autouse=True)
def nothing_kept(tmp_path_factory):
    """Keep what tests cache and convert outside the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ZIMAGE_EMBEDDINGS", "off")
        patch.setenv("MLX_ZIMAGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Where Python is set to write no bytecode, let the processes that tests start write theirs, until the tests end.

    Otherwise each of them compiles the package and its libraries, which takes longer than what most are started for.
    """
    with pytest.MonkeyPatch.context() as patch:
        if sys.dont_write_bytecode:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_reach_children():
    """Let signals end the processes that tests start, even if pytest itself ignores them (nohup, a background job).

    A process inherits what is ignored, but not a handler.
    """
    ignored = [number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session", params=[0, slow(7)], ids=["seed0", "seed7"])
def golden(request, tmp_path_factory) -> Golden:
    folder = tmp_path_factory.mktemp("golden")
    return Golden(request.param, folder, load_file(tiny.GOLDEN / f"seed{request.param}.safetensors"))


@pytest.fixture
def golden_pipe(golden) -> ZImagePipeline:
    return golden.pipe


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint in the official layout. It is shared: copy it before changing it."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", seed=0)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture(scope="session")
def small_pocket(tmp_path_factory) -> Path:
    """Pocket with a default size of 64x64 and a narrow VAE, which takes a tenth of the time."""
    folder = shutil.copytree(POCKET, tmp_path_factory.mktemp("small") / "pocket")
    tiny.lighten(folder, "vae", sample_size=64)
    return folder


@pytest.fixture(scope="session")
def server(small_pocket, tmp_path_factory):
    """A server with a key, a LoRA called style and pocket's ControlNet, shared by all tests that do not stop it."""
    from test_cli_lora import write as write_lora

    folder = tmp_path_factory.mktemp("server")
    (folder / "loras").mkdir()
    write_lora(folder / "loras/style.safetensors")
    options = ("--model", small_pocket, "--lora-dir", folder / "loras", "--control-model", "pocket")
    with serving(*options, "--queue", 3, "--cors", "https://app.example", log=folder / "log") as server:
        yield server


@pytest.fixture(scope="session")
def light_folder(tmp_path_factory) -> Path:
    return tiny.write_light_pocket(tmp_path_factory.mktemp("light") / "pocket")


@pytest.fixture
def light_pocket(light_folder, monkeypatch) -> Path:
    """Use a smaller random model in place of pocket in this process, for tests of what commands do, whatever their
    images show."""
    monkeypatch.setattr(weights.hub, "POCKET", light_folder)
    return light_folder


@pytest.fixture
def whole_pocket(light_pocket, monkeypatch) -> None:
    """Use pocket itself, in a file whose tests use light_pocket."""
    monkeypatch.setattr(weights.hub, "POCKET", POCKET)


@pytest.fixture
def hub(tmp_path):
    """A local hub with pocket as the official repository, and a file there that is not part of the model."""
    repository = shutil.copytree(POCKET, tmp_path / "repository")
    (repository / "assets").mkdir()
    (repository / "assets/large.png").write_bytes(bytes(1000))
    with Hub(repository, TURBO.repository) as hub:
        yield hub


@pytest.fixture
def run(tmp_path, hub) -> User:
    """run("plan", ...) runs mlx-zimage for a user who has nothing yet and downloads from the local hub."""
    return User(tmp_path, hub)


@pytest.fixture(scope="session")
def pipe(tiny_folder) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(tiny_folder, dtype="float32")


@pytest.fixture
def on_cpu():
    """Make MLX compute on the CPU, on every machine."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def watch(monkeypatch):
    """watch(module, "f") returns a list to which each later call of module.f appends its result."""

    def watch(module, name: str) -> list:
        original, seen = getattr(module, name), []

        def watched(*args, **kwargs):
            seen.append(original(*args, **kwargs))
            return seen[-1]

        monkeypatch.setattr(module, name, watched)
        return seen

    # inside a compiled function a call sees placeholders, and only once
    mx.disable_compile()
    yield watch
    mx.enable_compile()


@pytest.fixture
def bytes_read(monkeypatch) -> Counter:
    """Bytes of tensors read from disk, by network."""
    seen: Counter = Counter()
    read, rows = Component.read, Component.rows

    def counted_read(self, prefix, dtype, without="", stream=None):
        seen[self.name] += sum(
            entry.nbytes
            for name, entry in self.entries.items()
            if name == prefix or (name.startswith(f"{prefix}.") and not (without and without in name))
        )
        return read(self, prefix, dtype, without, stream)

    def counted_rows(self, name, ids, dtype):
        seen[self.name] += len(ids) * self.entries[name].nbytes // self.entries[name].shape[0]
        return rows(self, name, ids, dtype)

    monkeypatch.setattr(Component, "read", counted_read)
    monkeypatch.setattr(Component, "rows", counted_rows)
    return seen


@pytest.fixture(scope="session")
def hub_client():
    """The methods of the Hugging Face client, whose signatures take a long time to look up."""
    return create_autospec(huggingface_hub.HfApi, instance=True)


@pytest.fixture
def api(monkeypatch, hub_client):
    """A stand-in for the Hugging Face client that records its calls."""
    hub_client.reset_mock(return_value=True, side_effect=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub_client)
    return hub_client


@pytest.fixture(scope="session")
def mflux(tmp_path_factory):
    """Folders saved by mflux 0.24.0 itself: see golden/mflux_folders.py."""
    folder = tmp_path_factory.mktemp("mflux")
    with zipfile.ZipFile(tiny.GOLDEN / "mflux.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def few_tokens(tmp_path_factory):
    """A tokenizer.json of no more tokens than mflux's tiny text encoder has."""
    import tokenizers

    file = tmp_path_factory.mktemp("few") / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({chr(i): i for i in range(32, 127)}, [])).save(str(file))
    return file


@pytest.fixture
def refused_at_once(pipe, watch):
    """refused_at_once(message, **call) checks that a call is refused with the message before a prompt is encoded."""

    def refused_at_once(message: str, **call) -> None:
        encoded = watch(TextEncoder, "steps")
        with pytest.raises(RequestError) as caught:
            pipe(**{"prompt": "a red fox", "num_inference_steps": 2, **call})
        assert message in str(caught.value)
        assert not encoded

    return refused_at_once
