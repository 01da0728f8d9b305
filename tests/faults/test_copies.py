"""convert copies what a loader needs and nothing else: no file from outside the source, no path on this disk."""

import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from lanes import slow

from mlx_zimage.convert import convert
from mlx_zimage.convert.report import model_card, upload
from mlx_zimage.convert.small import COPIED
from mlx_zimage.convert.verify import verify
from mlx_zimage.errors import CheckpointError
from mlx_zimage.models import NETWORKS
from mlx_zimage.tokenizer import Tokenizer

HOME = "/home/somebody/models/secret"


@pytest.fixture
def key(tmp_path) -> Path:
    file = tmp_path / "home" / ".ssh" / "id_ed25519"
    file.parent.mkdir(parents=True)
    file.write_text("PRIVATE KEY")
    return file


def texts(folder: Path) -> str:
    """Everything written that is not weights."""
    return "\n".join(path.read_text() for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")


def test_only_files_that_a_loader_knows_are_copied(folder, tmp_path):
    others = ("tokenizer/notes.txt", "tokenizer/secret.json", "tokenizer/a.jinja", "vae/old.json", "scheduler/b.json")
    for name in others:
        (folder / name).write_text("{}")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    out = convert(folder, tmp_path / "out")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    written = r"(SHA256SUMS|conversion\.json|(transformer|text_encoder|vae)/(config\.json|model[-.].*))"
    assert {name for name in names if not re.fullmatch(written, name)} <= set(COPIED)
    assert "tokenizer/chat_template.jinja" in names


@pytest.mark.parametrize(
    "name",
    [
        *("model_index.json", "tokenizer/tokenizer_config.json", "tokenizer/merges.txt"),
        "tokenizer/chat_template.jinja",
        *("scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json", "tokenizer/tokenizer.json"),
        *("vae/diffusion_pytorch_model.safetensors", "text_encoder/generation_config.json"),
    ],
)
@pytest.mark.parametrize("kind", ["absolute", "relative", "folder"])
def test_a_link_out_of_the_source_is_refused(folder, tmp_path, name, kind):
    file, outside = folder / name, tmp_path / "home" / "file"
    outside.parent.mkdir()
    if kind == "folder":
        shutil.move(file.parent, outside) if file.parent != folder else shutil.move(folder, outside)
        (outside / file.name).touch()
        file.parent.symlink_to(outside)
        if file.parent == folder:  # the source itself may be a link
            assert verify(convert(folder, tmp_path / "out")) == []
            return
    else:
        shutil.move(file, outside) if file.exists() else outside.write_text("{}")
        file.symlink_to(outside if kind == "absolute" else os.path.relpath(outside, file.parent))
    with pytest.raises(CheckpointError, match=r"is a link to .*/home/file.*, outside "):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_given_on_its_own_may_not_link_to_other_files_either(folder, tmp_path, key):
    own = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (own / "merges.txt").symlink_to(key)
    with pytest.raises(CheckpointError, match=r"merges\.txt is a link to "):
        convert(folder, tmp_path / "out", tokenizer=own)
    (own / "merges.txt").unlink()
    (own / "notes.txt").symlink_to(key)
    assert "PRIVATE" not in texts(convert(folder, tmp_path / "out", tokenizer=own))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs_and_nowhere_else(folder, tmp_path, key):
    repository = tmp_path / "models--me--mine"
    snapshot = shutil.copytree(folder, repository / "snapshots" / "1")
    (repository / "blobs").mkdir()
    for i, file in enumerate(path for path in snapshot.rglob("*") if path.is_file()):
        shutil.move(file, repository / "blobs" / str(i))
        file.symlink_to(os.path.relpath(repository / "blobs" / str(i), file.parent))
    assert verify(convert(snapshot, tmp_path / "out")) == []
    (repository / "blobs" / "key").symlink_to(key)
    (snapshot / "tokenizer" / "merges.txt").symlink_to(repository / "blobs" / "key")
    with pytest.raises(CheckpointError, match=r"merges\.txt is a link to "):
        convert(snapshot, tmp_path / "again")


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "path",
    [
        HOME,
        *map(slow, ["/Users/some body/x", "~/models/x", "C:\\Users\\x", "\\\\nas\\x", "file:///home/x", "../../x"]),
        "./x",
    ],
)
def test_no_local_path_is_in_what_is_written(folder, tmp_path, path):
    for name in NETWORKS:
        change(folder / name / "config.json", _name_or_path=path)
    change(folder / "model_index.json", _name_or_path=path)
    change(folder / "tokenizer" / "tokenizer_config.json", name_or_path=path)
    if not path.startswith("."):
        nested = {"special_tokens_map_file": path, "deep": [{"file": path}, path]}
        change(folder / "tokenizer" / "tokenizer_config.json", **nested)
        record = {"source": path, "converter": path, "dtype": "x", "home": path, "before": {"source": path}}
        (folder / "conversion.json").write_text(json.dumps(record))
    out = convert(folder, tmp_path / "out")
    assert json.dumps(path)[1:-1] not in texts(out)
    assert str(tmp_path) not in texts(out)
    assert verify(out) == []


def test_other_names_and_values_are_kept(folder, tmp_path):
    for name in ("flux-dev", "Tongyi-MAI/Z-Image-Turbo", ""):
        change(folder / "vae" / "config.json", _name_or_path=name, note="either/or")
        out = convert(folder, tmp_path / f"out{len(name)}")
        written = json.loads((out / "vae" / "config.json").read_text())
        assert (written["_name_or_path"], written["note"]) == (name, "either/or")
    config = "tokenizer/tokenizer_config.json"
    assert (out / config).read_bytes() == (folder / config).read_bytes()


NAMES = ["a\nlicense: evil\nb", "a/b\nlicense: evil", "[x](y) <script>\x1b[31m", "a\r\n---\r\nx"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sources_name_adds_nothing_else_to_the_card(folder, tmp_path, name):
    record = {"converter": name, "source": name, "dtype": name, "before": {"source": name}}
    card = model_card(record)
    assert huggingface_hub.ModelCard(card).data.to_dict() == {
        "library_name": "mlx",
        "pipeline_tag": "text-to-image",
        "tags": ["mlx"],
    }
    assert not set("<>[]()\x1b\r") & set(card) and card.splitlines().count("---") == 2
    if "/" not in name:
        source = shutil.copytree(folder, tmp_path / name)
        out = convert(source, tmp_path / "out")
        assert "\n" not in json.loads((out / "conversion.json").read_text())["source"]
        card = model_card(json.loads((out / "conversion.json").read_text()))
        assert "license" not in huggingface_hub.ModelCard(card).data.to_dict()


@pytest.fixture
def uploaded(api):
    return lambda: [name for call in api.upload_folder.call_args_list for name in call.kwargs["allow_patterns"]]


def test_only_what_the_manifest_lists_is_uploaded(folder, tmp_path, key, uploaded):
    out = convert(folder, tmp_path / "out")
    (out / "tokenizer" / "notes.txt").write_text("mine")
    (out / "id").symlink_to(key)
    upload(out, "me/x")
    listed = {line.partition("  ")[2] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert set(uploaded()) == listed | {"SHA256SUMS", "README.md"}
    assert not {"id", "tokenizer/notes.txt"} & set(uploaded())


@pytest.mark.parametrize("spoil", ["link", "changed", "missing", "listed outside"])
def test_a_listed_file_that_is_no_longer_what_was_written_is_not_uploaded(folder, tmp_path, key, uploaded, spoil):
    out = convert(folder, tmp_path / "out")
    file = out / "tokenizer" / "tokenizer_config.json"
    if spoil == "listed outside":
        sums = (out / "SHA256SUMS").read_text() + f"{'0' * 64}  ../home/.ssh/id_ed25519\n"
        (out / "SHA256SUMS").write_text("".join(sorted(sums.splitlines(True), key=lambda line: line[66:])))
    else:
        file.unlink()
        {"link": lambda: file.symlink_to(key), "changed": lambda: file.write_text("{}"), "missing": int}[spoil]()
    with pytest.raises(CheckpointError):
        upload(out, "me/x")
    assert uploaded() == []


LONGER = ["saved from {} yesterday", "--model={}", "a '{}'", '{{"from": "{}"}}', "from:{}", "({})"]


@pytest.mark.parametrize(
    ("turn", "path"),
    [
        (0, HOME),
        slow(1, "/Users/somebody/x"),
        slow(2, "~/models/x"),
        (3, "C:\\Users\\x"),
        slow(4, "\\\\nas\\x"),
        slow(5, "file:///home/x/y"),
    ],
)
def test_no_path_is_left_in_longer_texts_keys_or_the_tokenizer_either(folder, tmp_path, turn, path):
    inside = [text.format(path) for text in LONGER]
    notes = {"deep": [{"list": inside}], path: 1}
    notes |= {f"note {i}": text for i, text in enumerate(inside)} | {text: {text: 2} for text in inside}
    for name in (*(f"{name}/config.json" for name in NETWORKS), "model_index.json"):
        change(folder / name, **notes)
    change(folder / "tokenizer" / "tokenizer_config.json", **notes)
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    values = json.loads(tokenizer.read_text())
    parts = {name: values[name] | notes for name in ("normalizer", "decoder", "post_processor")}
    change(tokenizer, **parts, added_tokens=[token | notes for token in values["added_tokens"]])
    comments = "".join(f"{{# {text} #}}" for text in inside)
    (folder / "tokenizer" / "chat_template.jinja").write_text(f"{comments}{{{{ messages }}}}")
    # over all turns, each text is put in each of these places with one of the paths
    first, source, converter, before = (inside + inside)[turn : turn + 4]
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: {first}\na b\n")
    quantization = {text: text for text in inside}
    record = {"source": source, "converter": converter, "quantization": quantization, "before": {"source": before}}
    (folder / "conversion.json").write_text(json.dumps(record))
    out = convert(folder, tmp_path / "out")
    written = texts(out)
    assert path not in written and json.dumps(path)[1:-1] not in written
    assert verify(out) == []
    assert Tokenizer(out / "tokenizer" / "tokenizer.json").encode("a fox") == Tokenizer(tokenizer).encode("a fox")


KEPT = [
    *("https://huggingface.co/a/b", "see http://a.b/c/d", "</think>/no_think", "'/think' or '/no_think'", "and/or/not"),
    *("./a/b", "../a/b", "{{ '\\n' }}Q:\\nA:\\n", "1/2/3", "a // b", "<a/><b/>", "[^\\s/]+/", "text/plain; a/b/c"),
]


def test_texts_that_only_look_like_paths_are_copied_unchanged(folder, tmp_path):
    change(folder / "tokenizer" / "tokenizer_config.json", notes=KEPT)
    change(folder / "tokenizer" / "tokenizer.json", version="1.0")
    before = {name: (folder / "tokenizer" / name).read_bytes() for name in ("tokenizer_config.json", "tokenizer.json")}
    out = convert(folder, tmp_path / "out")
    assert {name: (out / "tokenizer" / name).read_bytes() for name in before} == before


def test_a_token_that_is_a_path_stays_a_token(folder, tmp_path):
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    values = json.loads(tokenizer.read_text())
    model, decoder, token = values["model"], values["decoder"], f"{HOME}/"
    change(tokenizer, model=model | {"vocab": model["vocab"] | {token: 500}}, decoder=decoder | {"note": HOME})
    out = convert(folder, tmp_path / "out")
    written = json.loads((out / "tokenizer" / "tokenizer.json").read_text())
    assert written["model"]["vocab"][token] == 500 and written["decoder"] == decoder


def test_half_of_a_surrogate_pair_is_written_as_it_was_read(folder, tmp_path):
    names = ["vae/config.json", "tokenizer/tokenizer_config.json", "model_index.json"]
    for name in names:
        change(folder / name, **{"\ud800": "\udc00 🦊", "from": HOME})
    out = convert(folder, tmp_path / "out")
    for name in names:
        written = json.loads((out / name).read_text())
        assert written["\ud800"] == "\udc00 🦊" and "from" not in written
    assert verify(out) == []


@pytest.mark.parametrize("name", ["text_encoder/generation_config.json", "tokenizer/tokenizer_config.json"])
def test_a_file_that_cannot_be_copied_is_named_with_its_folder(folder, tmp_path, name):
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / name} is not valid JSON (")):
        convert(folder, tmp_path / "out")
