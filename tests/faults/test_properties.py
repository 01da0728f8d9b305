"""Whatever the input, a parser returns a result that keeps its promise, or raises a ZImageError."""

import io
import json
import os
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_zimage.convert import gguf
from mlx_zimage.drafts import Draft, lines_of, parse_seeds, parse_size, read_requests, slug
from mlx_zimage.errors import UNSAFE, CheckpointError, RequestError, ZImageError, plain
from mlx_zimage.images.metadata import Origin, parameters
from mlx_zimage.models import NETWORKS
from mlx_zimage.request import GenerateRequest
from mlx_zimage.scheduler import SchedulerConfig
from mlx_zimage.sizes import parse_memory
from mlx_zimage.untrusted import brief, parse_json
from mlx_zimage.weights import official
from mlx_zimage.weights.component import read_header
from mlx_zimage.weights.manifest import MANIFEST, read_manifest, render_manifest
from mlx_zimage.weights.names import places

# The same inputs in every run; .ci/long's tests/fuzz.py has random ones.
ours = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def counted(record_property):
    """Each of Hypothesis's examples is one attack."""
    record_property("attacks", ours.max_examples)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))
FIELDS = sorted(GenerateRequest.__dataclass_fields__)
LIKELY = st.integers(-1, 2000) | st.floats(-1, 2) | st.sampled_from(["a cat", "torch", "mlx", "0" * 64, None, True, 64])
VALUES = st.dictionaries(st.sampled_from([*FIELDS, "nonsense"]), LIKELY | JSON)
SIZES = st.integers(1, 512).map(lambda n: 16 * n)
REQUESTS = st.builds(
    GenerateRequest,
    prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1).filter(str.strip),
    width=SIZES,
    height=SIZES,
    seed=st.integers(0, 2**64 - 1),
    steps=st.integers(1, 1000),
    guidance_scale=st.floats(0, 1000),
    shift=st.none() | st.floats(0.01, 1000),
    num_images=st.integers(1, 1000),
    rng=st.sampled_from(["torch", "mlx"]),
)


# ---- requests, their metadata and JSON Lines


@ours
@given(VALUES)
def test_a_request_keeps_its_values_or_is_refused(values):
    try:
        request = GenerateRequest.from_dict({"prompt": "a", "seed": 0, **values})
    except RequestError as error:
        assert not UNSAFE.search(str(error))
        return
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@ours
@given(REQUESTS, st.text(), st.integers(0, 100))
def test_an_origin_survives_its_json(request_, model, index):
    origin = Origin(request_, model, "0" * 10, "float32", index)
    if not model.isprintable() or len(model) >= 300:
        with pytest.raises(RequestError):
            Origin.from_json(origin.to_json())
        return
    assert Origin.from_json(origin.to_json()) == origin
    assert "Steps: " in parameters(origin)


@ours
@given(JSON | st.builds(lambda request, extra: {"request": request, **extra}, VALUES, VALUES), st.text())
def test_any_json_as_an_origin_is_refused_or_valid(value, text):
    for content in (json.dumps(value), text):
        try:
            origin = Origin.from_json(content)
        except RequestError:
            continue
        assert isinstance(origin.request, GenerateRequest) and origin.model.isprintable()


@ours
@given(st.lists(JSON | VALUES), st.sampled_from(["\n", "\r\n", "\r"]))
def test_json_lines_are_requests_or_refused(values, end):
    text = end.join(json.dumps(value) for value in values).encode()
    try:
        requests = read_requests(lines_of(io.BytesIO(text), "f"), "f")
    except RequestError:
        return
    # as text, since NaN is not equal to itself
    assert repr([*requests.values()]) == repr([value for value in values if isinstance(value, dict)])


@ours
@given(st.binary())
def test_any_bytes_are_lines_or_refused(content):
    try:
        lines = list(lines_of(io.BytesIO(content), "f"))
    except RequestError:
        with pytest.raises(UnicodeDecodeError):
            content.decode()
        return
    assert all(not {"\n", "\r"} & set(line) for line in lines)
    assert "\n".join(lines) == content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


@ours
@given(st.text())
def test_words_are_numbers_or_refused(text):
    for parse in (parse_memory, parse_seeds, parse_size):
        try:
            assert parse(text)
        except RequestError as error:
            assert len(str(error)) < 300 + len("seeds")


# ---- names


@ours
@given(REQUESTS, st.lists(st.sampled_from(["{prompt}", "{seed}", "{n}", "{{", "}}", "a", ".", "猫" * 90]), min_size=1))
def test_a_file_name_fits_and_stays_in_its_folder(request_, parts):
    path = Draft({}, Path("folder") / f"{''.join(parts)}x.png", 7).path(request_)
    assert path.parent == Path("folder") and path.suffix == ".png"
    assert len(os.fsencode(path.name)) <= 255 and "\0" not in str(path)


@ours
@given(st.text(st.characters()))
def test_a_prompt_becomes_a_name_of_words(prompt):
    name = slug(prompt)
    assert name and len(os.fsencode(name)) <= 60
    assert all(char.isalnum() or char == "-" for char in name)


@ours
@given(st.text(st.characters()))
def test_plain_text_is_printed_on_one_line(text):
    shown = plain(text)
    assert not UNSAFE.search(shown) and plain(shown) == shown
    shown.encode()
    assert len(brief(text)) <= 80


@ours
@given(st.lists(st.sampled_from(["model", "layers", "0", "attention", "to_q", "weight", "qkv", "x_embedder", "é", ""])))
def test_any_name_of_a_tensor_has_places_or_none(parts):
    found = places(".".join(parts))
    assert found is None or all(place.component in NETWORKS for place in found)


@ours
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("0123456789abcdef", max_size=64)))
def test_a_manifest_has_names_inside_its_folder_or_is_refused(tmp_path, sums):
    (tmp_path / MANIFEST).write_bytes(render_manifest(sums))
    try:
        found = read_manifest(tmp_path)
    except CheckpointError:
        return
    assert found == sums
    assert all(Path(os.path.normpath(tmp_path / name)).is_relative_to(tmp_path) for name in found)


# ---- files of models


@ours
@given(st.sampled_from([*official.CONFIGS, "scheduler"]), st.data())
def test_a_config_is_bounded_or_refused(network, data):
    published = official.SCHEDULER if network == "scheduler" else official.CONFIGS[network]
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(published)), JSON | LIKELY, max_size=4))
    kind = SchedulerConfig if network == "scheduler" else NETWORKS[network]
    try:
        config = kind.from_dict(published | changed)
    except CheckpointError as error:
        assert not UNSAFE.search(str(error))
        return
    if network != "scheduler":
        assert 0 < len(config.shapes()) < 100_000
    json.dumps(asdict(config))


@ours
@given(JSON | st.dictionaries(st.text(), st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON})))
def test_any_header_is_refused_or_lists_tensors(tmp_path, header):
    file, text = tmp_path / "model.safetensors", json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        entries = read_header(file)
    except CheckpointError as error:
        assert not UNSAFE.search(str(error))
        return
    assert all(entry.offset + entry.nbytes <= file.stat().st_size for entry in entries.values())


@ours
@given(st.integers(0, 4), st.integers(0, 2**64 - 1), st.integers(0, 3), st.binary(max_size=500))
def test_any_gguf_is_refused_or_lists_tensors_inside_it(tmp_path, version, tensors, pairs, content):
    file = tmp_path / "dit.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors % 5 if pairs else tensors, pairs) + content)
    try:
        found = gguf.read_tensors(file)
    except CheckpointError as error:
        assert not UNSAFE.search(str(error))
        return
    assert all(tensor.offset + tensor.nbytes <= file.stat().st_size for tensor in found.values())


@ours
@given(JSON)
def test_json_is_what_python_reads_or_refused(value):
    text = json.dumps(value)
    try:
        assert json.dumps(parse_json(text)) == text
    except ValueError as error:
        assert not isinstance(error, ZImageError) and str(error).startswith("it ")
