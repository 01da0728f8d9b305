import sys
from dataclasses import replace
from pathlib import Path

import controls
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from hub import COMMIT, Hub
from PIL import Image

from mlx_zimage import ZImagePipeline, detectors
from mlx_zimage.cli import main
from mlx_zimage.detectors import LIBRARIES, MODELS, depth, detected, lines, network
from mlx_zimage.errors import CheckpointError, ModelNotFoundError, RequestError
from mlx_zimage.images.poses import BODY, BONES, COLOURS, CROP, FINDER, HANDS, STRIDES, people, points, pose
from mlx_zimage.weights.manifest import sha256

BOX = (0.25, 0.1, 0.75, 0.9)  # of the person: left, top, right, bottom as fractions of a square image's side


def write_network(path, nodes, constants, outputs):
    """An ONNX file whose input x is (1, 3, H, W)."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    graph = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "H", "W"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [*"abc"]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    return path


def constant(path, **outputs):
    """An ONNX file that always gives these outputs."""
    nodes = [("Identity", [f"c_{name}"], [name]) for name in outputs]
    return write_network(
        path, nodes, {f"c_{name}": value.astype(np.float32) for name, value in outputs.items()}, outputs
    )


def cells(*boxes):
    """YOLOX's output (1, 8400, 85) for boxes (left, top, right, bottom, score), in pixels of what it sees."""
    count = sum((FINDER // stride) ** 2 for stride in STRIDES)
    found = np.full((1, count, 85), -10.0)
    found[..., 4:] = 0
    for i, (left, top, right, bottom, score) in enumerate(boxes):  # in the first cells, whose place is (i, 0)
        stride = STRIDES[0]
        middle = np.array([left + right, top + bottom]) / 2 / stride - [i, 0]
        found[0, i, :4] = *middle, *np.log(np.array([right - left, bottom - top]) / stride)
        found[0, i, 4:6] = 1, score
    return found


def bins(places):
    """RTMPose's two outputs for 133 places (x, y, score), as fractions of what it sees."""
    sides = np.array(CROP) * 2
    outputs = [np.zeros((1, 133, side)) for side in sides]
    for i, (x, y, score) in enumerate(places):
        for axis, at in enumerate((x, y)):
            outputs[axis][0, i, int(at * sides[axis])] = score
    return {"simcc_x": outputs[0], "simcc_y": outputs[1]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Networks with the inputs and outputs of the real ones: one person with known points, and depth by brightness."""
    folder = tmp_path_factory.mktemp("onnx")
    places = np.random.default_rng(0).uniform(0.2, 0.8, (133, 3))
    places[:, 2] = 0.9
    left, top, right, bottom = (FINDER * part for part in BOX)
    constant(
        folder / "yolox_l.onnx", output=cells((left, top, right, bottom, 0.8), (left, top, right, bottom - 9, 0.6))
    )
    constant(folder / "dw-ll_ucoco_384.onnx", **bins(places))
    write_network(
        folder / "onnx/model.onnx",
        [("ReduceMean", ["x"], ["predicted_depth"], {"axes": [1], "keepdims": 0})],
        {},
        ["predicted_depth"],
    )
    return folder, places


def photo(width=96, height=96):
    made = np.array(Image.fromarray(tiny.photo()).convert("RGB").resize((width, height)))
    made[height // 4 : height // 2, width // 4 : width // 2] = 255
    return made


def test_people_are_found_in_any_aspect_ratio_and_once_each(files):
    finder = network(files[0] / "yolox_l.onnx")
    for width, height in ((640, 640), (320, 160), (100, 300)):
        (box,) = people(Image.new("RGB", (width, height)), finder)  # the second is the same person
        # places are in 640ths of the longer side
        assert np.allclose(box, np.array(BOX) * max(width, height), atol=0.01)


def test_people_far_apart_are_found_and_unlikely_ones_dropped(tmp_path):
    finder = network(
        constant(tmp_path / "x.onnx", out=cells((0, 0, 90, 200, 0.5), (300, 0, 400, 99, 0.9), (0, 400, 9, 420, 0.2)))
    )
    found = people(Image.new("RGB", (640, 640)), finder)
    assert np.allclose(found, [[300, 0, 400, 99], [0, 0, 90, 200]], atol=0.01)


def test_points_are_where_they_were_seen_in_the_enlarged_box(files):
    folder, places = files
    box = np.array([100.0, 50, 160, 250])
    found = points(Image.new("RGB", (400, 300)), box, network(folder / "dw-ll_ucoco_384.onnx"))
    size = np.array([200 * 0.75, 200]) * 1.25  # the box has the crop's aspect ratio, and is enlarged
    wanted = [130, 150] - size / 2 + places[:, :2] * size
    assert np.abs(found[:, :2] - wanted).max() < size[1] / 768 + 1e-6  # half a pixel of what it sees
    assert np.allclose(found[:, 2], 0.9)


def test_the_person_fills_what_the_network_for_points_sees():
    seen = []
    image = Image.new("RGB", (400, 300))
    image.paste((124, 116, 104), (100, 50, 250, 250))  # nearly the mean, in a box of the crop's aspect ratio

    def look(values):
        seen.append(values)
        return list(bins(np.zeros((133, 3))).values())

    points(image, np.array([100.0, 50, 250, 250]), look)
    (values,) = seen
    assert values.shape == (1, 3, 384, 288)
    inside = np.abs(values[0]).max(axis=0) < 0.02
    margin = 0.5 * (1 - 1 / 1.25)
    y, x = np.nonzero(inside)
    edges = x.min() / 288, y.min() / 384, 1 - (x.max() + 1) / 288, 1 - (y.max() + 1) / 384
    assert np.allclose(edges, margin, atol=0.005)


def test_a_pose_has_openposes_dots_at_its_points(files):
    folder, places = files
    networks = network(folder / "yolox_l.onnx"), network(folder / "dw-ll_ucoco_384.onnx")
    made = pose(photo(512, 512), *networks)
    box = np.array(BOX) * 512
    size = (
        np.array([max(box[2] - box[0], (box[3] - box[1]) * 0.75), max((box[2] - box[0]) / 0.75, box[3] - box[1])])
        * 1.25
    )
    at = (box[:2] + box[2:]) / 2 - size / 2 + places[:, :2] * size
    # the face is drawn last, then hands; what is drawn later may cover a dot
    shown = [tuple(made[int(y), int(x)]) for x, y in at]
    assert sum(colour == (255, 255, 255) for colour in shown[23:91]) == 68
    assert sum(colour in ((0, 0, 255), (255, 255, 255)) for part in HANDS for colour in shown[part]) >= 36
    for place, colour in zip(BODY, COLOURS, strict=True):
        if place != 1:
            assert shown[place] in (colour, (0, 0, 255), (255, 255, 255)) or (made == colour).all(axis=-1).any()
    assert len(BONES) == 20 and pose(photo(), lambda _: [cells()], networks[1]) is None


def test_depth_is_white_where_it_is_near(files):
    estimator = network(files[0] / "onnx/model.onnx")
    ramp = np.repeat(np.linspace(40, 180, 200).astype(np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    made = depth(ramp, estimator)
    assert made.shape == ramp.shape and (made[..., 0] == made[..., 1]).all()
    wanted = np.linspace(0, 255, 200)
    assert np.abs(made[50, :, 0] - wanted).max() < 4  # 140 grey levels become 255
    assert depth(np.full((64, 64, 3), 9, np.uint8), estimator) is None


@pytest.mark.parametrize(
    ("size", "seen"), [((1000, 500), (518, 1036)), ((64, 96), (784, 518)), ((16, 8000), (2072, 14))]
)
def test_the_network_for_depth_sees_whole_patches_and_never_a_huge_image(size, seen):
    shapes = []

    def look(values):
        shapes.append(values.shape)
        return [np.arange(values[0, 0].size, dtype=np.float32)]

    assert depth(np.zeros((size[1], size[0], 3), np.uint8), look).shape[1::-1] == size
    assert shapes == [(1, 3, *seen)]


def test_lines_are_straight_edges_and_not_texture():
    image = np.random.default_rng(0).integers(0, 12, (256, 256, 3), np.uint8)
    image[64:192, 64:192] += 200
    made = lines(image)
    on = made[..., 0] > 0
    assert on.any() and set(np.unique(made)) == {0, 255}
    y, x = np.nonzero(on)
    outline = np.minimum(np.abs(x - 64), np.abs(x - 191)).clip(max=99), np.minimum(np.abs(y - 64), np.abs(y - 191))
    assert np.minimum(*outline).max() <= 2  # all on the square's sides
    assert on[:, 62:67].any(axis=1).sum() > 110 and on[62:67].any(axis=0).sum() > 110
    assert lines(np.full((64, 64, 3), 9, np.uint8)) is None


# ---- in a request


@pytest.fixture
def there(files, tmp_path, monkeypatch):
    """A hub that has the networks, and a cache that does not."""
    from huggingface_hub import constants

    folder, _ = files
    for kind, models in MODELS.items():
        own = [replace(model, revision=COMMIT, sha256=sha256(folder / model.name)) for model in models]
        monkeypatch.setitem(MODELS, kind, tuple(own))
    detectors._detected.cache_clear()
    with Hub(folder, "yzd-v/DWPose") as hub:
        hub.serve(folder, "onnx-community/depth-anything-v2-small")
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
    detectors._detected.cache_clear()


def test_networks_are_downloaded_when_asked_for_and_only_then(there, monkeypatch):
    assert detected(photo(), "lines").shape == (96, 96, 3) and not there.seen
    assert detected(photo(), "depth").any()
    assert set(there.sent) == {"onnx/model.onnx"}
    assert detected(photo(), "pose").any()
    assert set(there.sent) == {"onnx/model.onnx", "yolox_l.onnx", "dw-ll_ucoco_384.onnx"}
    there.seen.clear()
    detectors._detected.cache_clear()
    assert detected(photo(), "pose").any() and not there.seen, "nothing is asked again"


def test_without_a_network_the_missing_file_is_named(there, monkeypatch, pipe, tmp_path, bytes_read):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    own = ZImagePipeline(pipe.checkpoint, pipe.dtype)
    own.load_controlnet(controls.write(tmp_path, 0, "control_v21"))
    bytes_read.clear()
    with pytest.raises(ModelNotFoundError, match=r"yzd-v/DWPose:yolox_l.onnx is not in the .* HF_HUB_OFFLINE"):
        own("a dancer", control_image=("pose", Image.fromarray(photo())), num_inference_steps=1)
    assert not bytes_read


def test_a_file_other_than_the_listed_one_is_refused(there, monkeypatch):
    monkeypatch.setitem(MODELS, "depth", (replace(MODELS["depth"][0], sha256="0" * 64),))
    with pytest.raises(
        CheckpointError, match=r"is damaged: its SHA-256 is not that of onnx-community/\S+:onnx/model.onnx; delete it"
    ):
        detected(photo(), "depth")


def test_a_damaged_file_is_downloaded_again_once_the_file_that_the_error_names_is_deleted(there):
    assert detected(photo(), "depth").any()
    detectors._detected.cache_clear()
    path = MODELS["depth"][0].fetch()
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="delete it to download it again") as refused:
        detected(photo(), "depth")
    Path(str(refused.value).partition(" is damaged")[0]).unlink()
    assert detected(photo(), "depth").any()


@pytest.mark.parametrize("kind", LIBRARIES)
def test_without_the_extra_the_command_that_installs_it_is_named(kind, tiny_folder, tmp_path, monkeypatch, bytes_read):
    monkeypatch.setitem(sys.modules, LIBRARIES[kind][0], None)
    monkeypatch.setattr(detectors, "find_spec", lambda name: None)
    photo_file, model = tmp_path / "photo.png", controls.write(tmp_path, 0, "control_v21")
    Image.fromarray(photo()).save(photo_file)
    words = ["generate", "a fox", "--model", tiny_folder, "--control", f"{kind}:{photo_file}", "--control-model", model]
    done = CliRunner().invoke(main, [*map(str, words), "-o", str(tmp_path / "x.png")])
    assert done.exit_code == 2 and "pip install 'mlx-zimage[control]'" in done.output and kind in done.output
    assert {*bytes_read} <= {"controlnet"}, "only looked at, to tell its version"


def test_a_photo_that_shows_no_one_is_refused_before_any_weight_is_read(
    there, files, pipe, tmp_path, monkeypatch, bytes_read
):
    empty = constant(tmp_path / "yolox_l.onnx", output=cells())
    finder = replace(MODELS["pose"][0], sha256=sha256(empty))
    there.repositories["yzd-v/DWPose"]["yolox_l.onnx"] = empty
    monkeypatch.setitem(MODELS, "pose", (finder, MODELS["pose"][1]))
    own = ZImagePipeline(pipe.checkpoint, pipe.dtype)
    own.load_controlnet(controls.write(tmp_path, 0, "control_v21"))
    bytes_read.clear()
    with pytest.raises(RequestError, match="nothing that a control image of kind pose could be made from"):
        own("a dancer", control_image=("pose", Image.fromarray(photo())), num_inference_steps=1)
    assert not bytes_read


def test_a_call_follows_what_was_found(there, pipe, tmp_path):
    own = ZImagePipeline(pipe.checkpoint, pipe.dtype)
    own.load_controlnet(controls.write(tmp_path, 0, "control_v21"))
    call = {"num_inference_steps": 1, "seed": 1, "height": 96, "width": 96, "output_type": "np"}
    for kind in LIBRARIES:
        ready = Image.fromarray(detected(photo(), kind))
        made, given = (
            own("a dancer", control_image=image, **call).images[0]
            for image in ((kind, Image.fromarray(photo())), ready)
        )
        assert np.array_equal(made, given), kind
