"""Files that would hang, fill memory or write elsewhere: FIFOs, devices, links and hostile headers."""

import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from lanes import slow

from mlx_zimage import CheckpointError, OutputError, RequestError, cli, machine
from mlx_zimage.convert import convert, writer
from mlx_zimage.convert.small import COPIED
from mlx_zimage.convert.verify import verify
from mlx_zimage.images.metadata import read_origin
from mlx_zimage.inputs import MAX_NPY, read_latents
from mlx_zimage.machine import RATES
from mlx_zimage.models.transformer import TransformerConfig
from mlx_zimage.weights import hub, library
from mlx_zimage.weights.hub import POCKET
from mlx_zimage.weights.library import REGISTER
from mlx_zimage.weights.lora import read_lora
from mlx_zimage.weights.manifest import CONVERSION, MANIFEST, read_manifest, render_manifest, sha256

SPECIAL = ["fifo", "zero"]


@pytest.fixture(params=SPECIAL)
def special(request):
    """special(path) puts a FIFO, or a link to an endless device, at a path."""

    def put(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if request.param == "fifo" else path.symlink_to("/dev/zero")
        return path

    return put


def run(*args: object):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "weights"],
)
@pytest.mark.parametrize("command", ["info", "verify -q", "generate a -m", "convert"])
def test_a_folder_with_a_special_file_is_refused(folder, tmp_path, special, name, command):
    path = next((folder / "vae").glob("*.safetensors")) if name == "weights" else folder / name
    special(path)
    out = tmp_path / "out"
    result = run(*command.split(), folder, *([out] if command == "convert" else []))
    unread = command == "info" and name.startswith("tokenizer") and not path.is_symlink()
    assert result.exit_code == (0 if unread else 4), result.output
    assert not out.exists()


@pytest.mark.parametrize("name", [*COPIED, CONVERSION])
def test_convert_refuses_a_special_file_in_the_place_of_any_that_it_reads(folder, tmp_path, special, name):
    special(folder / name)
    with pytest.raises(CheckpointError, match=re.escape(Path(name).name)):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "vae/config.json"])
def test_a_special_file_in_a_part_from_elsewhere_is_refused(folder, tmp_path, special, name):
    special(folder / name)
    place = folder / "tokenizer" if name.startswith("tokenizer") else folder
    with pytest.raises(CheckpointError, match=r"json (cannot be read|is a link to /dev/zero)"):
        convert(POCKET, tmp_path / "out", **{name.partition("/")[0]: place})


def test_a_special_file_in_a_manifest_is_a_fault(tmp_path, special):
    model = shutil.copytree(POCKET, tmp_path / "model")
    convert(model, tmp_path / "made")
    special(tmp_path / "made/vae/config.json")
    (fault,) = verify(tmp_path / "made")
    assert fault.startswith("vae/config.json: ") and ("cannot be read" in fault or "is a link to /dev/zero" in fault)


def test_a_special_manifest_is_a_fault(tmp_path, special):
    model = shutil.copytree(POCKET, tmp_path / "model")
    special(model / MANIFEST)
    assert ["SHA256SUMS: cannot be read" in fault for fault in verify(model)] == [True]


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "vae/../../secret", "a\0b"])
def test_a_manifest_names_only_files_in_its_folder(tmp_path, monkeypatch, name):
    (tmp_path / "secret").write_text("mine")
    model = shutil.copytree(POCKET, tmp_path / "model")
    (model / MANIFEST).write_text(f"{sha256(tmp_path / 'secret')}  {name}\n")
    from mlx_zimage.convert import verify as module

    monkeypatch.setattr(module, "sha256", lambda path, most: pytest.fail(f"read {path}"))
    assert ["not in its folder" in fault for fault in verify(model)] == [True]


@pytest.mark.parametrize("name", ["tokenizer/merges.txt", "vae/config.json"])
def test_a_listed_link_out_of_the_folder_is_a_fault_and_is_not_read(tmp_path, monkeypatch, name):
    made, secret = convert(POCKET, tmp_path / "made"), tmp_path / "secret"
    secret.write_text("mine")
    (made / name).unlink(missing_ok=True)
    (made / name).symlink_to(secret)
    sums = read_manifest(made) | {name: sha256(secret)}  # which is how its checksum would be guessed
    (made / MANIFEST).write_bytes(render_manifest(sums))
    from mlx_zimage.convert import verify as module

    read = []
    monkeypatch.setattr(module, "sha256", lambda path, most: read.append(path.resolve()) or sha256(path, most))
    assert [fault for fault in verify(made) if f"is a link to {secret}, outside " in fault]
    assert secret not in read


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "json"])
def test_an_origin_is_read_from_regular_files_only(tmp_path, special, ending):
    with pytest.raises(RequestError, match="not a regular file"):
        read_origin(special(tmp_path / f"image.{ending}"))


@pytest.mark.parametrize("text", ["[" * 50_000, '{"seed": ' + "9" * 5000 + "}", " " * 1_000_001])
def test_hostile_json_as_an_origin_is_refused(tmp_path, text):
    (tmp_path / "image.json").write_text(text)
    with pytest.raises(RequestError, match=r"image\.json is not a JSON file"):
        read_origin(tmp_path / "image.json")


def test_latents_are_read_from_regular_files_only(tmp_path, special):
    with pytest.raises(RequestError, match="not a regular file"):
        read_latents(special(tmp_path / "latents.npy"))


def npy(header: str, version: int = 1, content: bytes = b"") -> bytes:
    text = header.encode("latin1").ljust(64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + content


FORM = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }"
HOSTILE_NPY = {
    "a shape of 2**60": npy(FORM % ("<f4", "(1, 16, 1152921504606846976, 1)")),
    "a shape of 4 TB": npy(FORM % ("<f4", "(1, 16, 262144, 262144)")),
    "a negative shape": npy(FORM % ("<f4", "(1, 16, -8, 8)")),
    "objects": npy(FORM % ("|O", "(1, 16, 1, 1)"), content=b"\x80\x04N."),
    "nested": npy("'shape': ()" + "-" * 60_000 + "1"),
    "brackets": npy("'shape': ()" + "(" * 60_000),
    # NumPy's own tokenizer raises what it does not declare, as mutated input has shown
    "an open bracket": npy("{'descr': '<f4', 'fortran_order': False 'shape': (1, 16, 2, 2), }      ("),
    "an open string": npy("{'descr': '<f4', '''fortran_order': False, 'shape': (1, 16, 2, 2), }", content=bytes(256)),
    "a shape without commas": npy("'shape': (1 16 2, 2)"),
    "a program": npy("__import__('os').system('touch ran') # 'shape': ()"),
    "no header": b"\x93NUMPY",
    "an unknown version": npy(FORM % ("<f4", "(1, 16, 1, 1)"), version=9),
    "a pickle": b"\x80\x04N.",
    "an archive": b"PK\x03\x04" + bytes(100),
    "a header of 4 GB": b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b"'shape': ()",
    "too short": npy(FORM % ("<f4", "(1, 16, 2, 2)"), content=bytes(16)),
    "fields": npy(FORM.replace("'%s'", "%s") % ("[('a', '<f4')]", "(1, 16, 1, 1)"), content=bytes(64)),
}


@pytest.mark.parametrize("content", HOSTILE_NPY.values(), ids=list(HOSTILE_NPY))
def test_hostile_latents_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latents.npy").write_bytes(content)
    with pytest.raises(RequestError, match=r"latents\.npy (is not a \.npy file|contains)"):
        read_latents(tmp_path / "latents.npy")
    assert os.listdir() == ["latents.npy"]


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "<i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_latents_of_every_numeric_dtype_are_read(tmp_path, dtype, order):
    latents = np.asarray(np.arange(2 * 16 * 4 * 6).reshape(2, 16, 4, 6) % 99, dtype, order=order)
    np.save(tmp_path / "latents.npy", latents)
    assert np.array_equal(read_latents(tmp_path / "latents.npy"), latents)


def test_a_sparse_file_of_latents_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "latents.npy").write_bytes(npy(FORM % ("<f4", "(1, 16, 16384, 16384)")))
    os.truncate(tmp_path / "latents.npy", 2**34 + 200)
    with pytest.raises(RequestError, match=f"expected at most {MAX_NPY:,}"):
        read_latents(tmp_path / "latents.npy")


def test_a_lora_is_a_regular_file(tmp_path, special):
    with pytest.raises(CheckpointError, match=r"lora\.safetensors cannot be read: not a regular file"):
        read_lora(
            special(tmp_path / "lora.safetensors"), {"transformer": TransformerConfig.from_dict(tiny.TRANSFORMER)}
        )


# ---- links planted where we write


@pytest.mark.parametrize("name", [".out.partial", ".out.lock"])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_link_planted_where_convert_writes_is_not_followed(tmp_path, name, kind):
    victim = tmp_path / "victim"
    if kind == "file":
        victim.write_text("precious")
    elif kind == "folder":
        victim.mkdir()
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(
        OutputError, match=rf"{name} is a link to \S*victim, and nothing is written through links; remove the link"
    ):
        convert(POCKET, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {name, *(["victim"] if kind != "nothing" else [])}
    assert kind != "file" or victim.read_text() == "precious"
    assert kind != "folder" or not list(victim.iterdir())


def test_a_partial_folder_of_another_user_is_not_written_to(tmp_path, monkeypatch):
    (tmp_path / ".out.partial").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".out.partial" / writer.JOURNAL).symlink_to(victim)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"\.out\.partial belongs to another user"):
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        convert(POCKET, tmp_path / "out")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", [slow(writer.JOB), writer.JOURNAL])
def test_a_special_file_in_a_partial_folder_starts_it_over(tmp_path, special, name):
    (tmp_path / ".out.partial").mkdir()
    special(tmp_path / ".out.partial" / name)
    assert verify(convert(POCKET, tmp_path / "out")) == []


@pytest.mark.parametrize("name", [REGISTER, RATES])
@pytest.mark.parametrize(
    "content", ["[" * 10**5, '{"a": ' + "9" * 5000 + "}", "\0", None], ids=["deep", "digits", "NUL", "FIFO"]
)
def test_a_damaged_note_of_our_own_is_ignored(tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("MLX_ZIMAGE_HOME", str(tmp_path))
    os.mkfifo(tmp_path / name) if content is None else (tmp_path / name).write_text(content)
    assert library._registered() == [] and machine._rates() == {}


@pytest.mark.parametrize(
    "main", ["../../../secret", "/etc", "a\0b", "1" * 10**6, None], ids=["up", "root", "NUL", "long", "FIFO"]
)
def test_a_cached_revision_is_one_of_its_snapshots(tmp_path, main):
    repository = tmp_path / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    for name in "ab":
        (repository / "snapshots" / name).mkdir(parents=True)
    file = repository / "refs" / "main"
    os.mkfifo(file) if main is None else file.write_text(main)
    assert hub.snapshot(repository) is None
    file.unlink()
    file.write_text("b\n")
    assert hub.snapshot(repository) == repository / "snapshots" / "b"


def test_a_link_in_an_images_place_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "image.png").symlink_to(tmp_path / "victim")
    (tmp_path / "image-1.png").symlink_to(tmp_path / "nothing")
    args = ["generate", "a red circle", "-m", "pocket", "--steps", "1", "--size", "32x32", "-q"]
    assert run(*args, "-o", tmp_path / "image.png").stdout == f"{tmp_path / 'image-2.png'}\n"
    assert run(*args, "-o", tmp_path / "image.png", "--overwrite").exit_code == 0
    assert not (tmp_path / "image.png").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "nothing").exists()


def test_a_config_of_gigabytes_is_refused_by_its_size(folder):
    os.truncate(folder / "vae/config.json", 2**34)
    result = run("info", folder)
    assert result.exit_code == 4 and "vae/config.json cannot be read: larger than" in result.output
    assert json.loads((folder / "transformer/config.json").read_text())


def test_weights_in_another_kind_of_file_are_refused(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    for content in (b"", b"PK\x03\x04", b"<html>", mx.__name__.encode()):
        file.write_bytes(content)
        assert run("info", folder).exit_code == 4


@pytest.mark.parametrize("command", ["info", "plan", "verify"])
@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", f"{'a' * 300}/b"], ids=["long", "NUL", "long folder"])
def test_a_name_that_the_system_does_not_take_is_not_a_model(command, name):
    result = run(command, name)
    assert result.exit_code == 3 and len(result.output) < 1000, result.output
