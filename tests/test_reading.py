"""Python waits for the disk, the GPU never does: macOS kills GPU work that waits for seconds."""

import io
import re
from collections import Counter
from threading import RLock

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.convert import convert
from mlx_zimage.memory import Workload
from mlx_zimage.models.text_encoder import Hidden
from mlx_zimage.weights import blocks
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.component import Component
from mlx_zimage.weights.lora import read_lora

pytestmark = pytest.mark.metal


@pytest.fixture
def submissions(monkeypatch) -> Counter:
    """Counts what MLX is given to do: bytes read, computations, and those that need bytes not known to be read.

    The bytes of each tensor come late: after other work of the stream that reads them.
    """
    counts: Counter = Counter()
    given: dict[int, mx.array] = {}  # tensors of files
    unread: dict[int, mx.array] = {}  # those that MLX was told to read, and that nobody has waited for
    load, evaluate, begin = mx.load, mx.eval, mx.async_eval
    lock = RLock()  # a graph must not be searched while another thread evaluates, and so takes apart, some of it

    class Late(dict):
        def __init__(self, file: str, stream):
            super().__init__(load(file, stream=stream))
            self.stream = stream

        def __getitem__(self, name: str) -> mx.array:
            with lock:
                begin(mx.sin(mx.ones((2**16,), stream=self.stream or mx.cpu), stream=self.stream or mx.cpu))
                array = super().__getitem__(name)
                given[id(array)] = array
                return array

    def submit(evaluate, trees) -> list[int]:
        leaves = [leaf for _, leaf in tree_flatten(list(trees)) if isinstance(leaf, mx.array)]
        tensors = [id(leaf) for leaf in leaves if id(leaf) in given]
        unread.update({tensor: given[tensor] for tensor in tensors})
        if rest := [leaf for leaf in leaves if id(leaf) not in given]:
            graph = io.StringIO()
            mx.export_to_dot(graph, *rest, **{f"unread {tensor}": array for tensor, array in unread.items()})
            counts["computations"] += "label" in graph.getvalue()
            counts["too early"] += re.search(r'label ="Load"|"unread \d+" ->', graph.getvalue()) is not None
        evaluate(*trees)
        return tensors

    def wait(*trees) -> None:
        with lock:
            for tensor in submit(evaluate, trees):
                counts["read"] += given.pop(tensor).nbytes
                unread.pop(tensor)

    def start(*trees) -> None:
        with lock:
            submit(begin, trees)

    monkeypatch.setattr(mx, "load", lambda file, stream=None, **_: Late(file, stream))
    monkeypatch.setattr(mx, "eval", wait)
    monkeypatch.setattr(mx, "async_eval", start)
    return counts


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("streamed", [False, True], ids=["kept", "streamed"])
def test_nothing_is_computed_from_bytes_that_have_not_been_read(streamed, dtype, monkeypatch, request):
    asked = GenerateRequest("a red circle", 32, 32, seed=1, steps=2)
    pipe = ZImagePipeline.from_pretrained("pocket", dtype=dtype)
    least = pipe.planner.best(Workload(32, 32, 1, len(pipe.tokenize(asked.prompt)), asked.steps), 1).room
    pipe.budget = memory = least if streamed else 10**9
    assert bool(pipe.plan(asked).streamed) == streamed
    expected = [event for event in pipe.stream(asked)][-1].pixels
    counts = request.getfixturevalue("submissions")
    pipe = ZImagePipeline.from_pretrained("pocket", dtype=dtype, memory=memory)
    late = [event for event in pipe.stream(asked)][-1].pixels
    assert counts["computations"] > 20 and counts["read"] > 10**6
    assert counts["too early"] == 0
    assert np.array_equal(late, expected)


def test_fused_tensors_are_read_before_they_are_split(submissions, tmp_path):
    """ComfyUI stores queries, keys and values as one tensor."""
    convert("pocket", tmp_path / "all.safetensors", format="comfyui")
    submissions.clear()
    model = open_checkpoint("pocket", parts={"transformer": tmp_path / "all.safetensors"}).transformer
    assert any(entry.parts == 3 for entry in model.entries.values())
    runner = Blocks(model, mx.float32, streamed=model.config.blocks)
    list(runner.walk(model.config.blocks[-3:], [Hidden(mx.zeros(1))], add_a_weight))
    runner.tree(model.config.blocks[0])
    assert submissions["computations"] > 0 == submissions["too early"]


def test_a_lora_is_read_before_anything_is_computed_from_it(submissions, tmp_path):
    config = open_checkpoint("pocket").transformer.config
    factors = {"lora_A": (4, config.dim), "lora_B": (config.dim, 4)}
    tensors = {f"layers.0.attention.to_q.{name}.weight": mx.random.normal(shape) for name, shape in factors.items()}
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), tensors)
    submissions.clear()
    read_lora(tmp_path / "lora.safetensors", {"transformer": config})
    assert submissions["read"] == sum(array.nbytes for array in tensors.values())


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_a_reader_that_does_not_wait_is_counted(submissions, monkeypatch, begun):
    def impatient(self, prefix, *args, **options):
        stored = mx.load(str(self.entries[f"{prefix}.ffn_norm1.weight"].file), stream=options.get("stream"))
        weight = stored[f"{prefix}.ffn_norm1.weight"]
        if begun:
            mx.async_eval(weight)
        return lambda: {"ffn_norm1": {"weight": weight.astype(mx.float16)}}

    model = open_checkpoint("pocket").transformer
    *_, block = model.config.blocks

    def walk() -> None:
        list(Blocks(model, mx.float16, streamed=[block]).walk([block], [Hidden(mx.zeros(1))], add_a_weight))

    walk()
    assert submissions["computations"] > 0 == submissions["too early"]
    monkeypatch.setattr(Component, "read", impatient)
    walk()
    assert submissions["too early"] > 0


def test_a_tree_is_read_before_anything_is_computed_from_it(submissions):
    runner = Blocks(open_checkpoint("pocket").vae, mx.float32)  # stored in bfloat16
    tree = runner.tree("decoder")
    assert submissions["computations"] > 0 == submissions["too early"]
    assert submissions["read"] * 2 == sum(array.nbytes for _, array in tree_flatten(tree))


def test_a_block_is_read_while_the_one_before_is_computed(monkeypatch):
    runner = Blocks(open_checkpoint("pocket").transformer, mx.float32)
    if runner._disk is None:
        pytest.skip("this backend does not read ahead")
    order, begin, settle = [], mx.async_eval, blocks.settle

    def noted(*trees):
        order.append("read" if isinstance(trees[0], dict) and "layers" in next(iter(trees[0])) else "compute")
        begin(*trees)

    monkeypatch.setattr(mx, "async_eval", noted)
    monkeypatch.setattr(blocks, "settle", lambda x: (order.append("wait"), settle(x)))
    walk = runner.walk(runner.weights.config.blocks[-3:], [Hidden(mx.zeros(1))], add_a_weight)
    assert len(list(walk)) == 3
    waits = " wait" if mx.default_device() == mx.cpu else ""  # before a CPU begins the next block
    begin_next = "read wait compute"  # the last of these converts the weights into the form used for computing
    assert " ".join(order) == f"{begin_next} compute {begin_next}{waits} compute {begin_next}{waits} compute{waits}"


def add_a_weight(tokens: Hidden, weights: dict, i: int) -> Hidden:
    return Hidden(tokens.x + weights["ffn_norm1"]["weight"][0])
