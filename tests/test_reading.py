"""Python waits for the disk, the GPU never does: macOS kills GPU work that waits for seconds."""

import io
import re
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_zimage import GenerateRequest, ZImagePipeline
from mlx_zimage.models.text_encoder import Hidden
from mlx_zimage.weights import blocks
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint

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

    class Late(dict):
        def __init__(self, file: str, stream):
            super().__init__(load(file, stream=stream))
            self.stream = stream

        def __getitem__(self, name: str) -> mx.array:
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
        for tensor in submit(evaluate, trees):
            array = unread.pop(tensor, None)
            counts["read"] += 0 if array is None else array.nbytes

    monkeypatch.setattr(mx, "load", lambda file, stream=None: Late(file, stream))
    monkeypatch.setattr(mx, "eval", wait)
    monkeypatch.setattr(mx, "async_eval", lambda *trees: submit(begin, trees) and None)
    return counts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["1GB", "10MB"], ids=["kept", "streamed"])
def test_nothing_is_computed_from_bytes_that_have_not_been_read(memory, dtype, monkeypatch, request):
    asked = GenerateRequest("a red circle", 32, 32, seed=1, steps=2)
    pipe = ZImagePipeline.from_pretrained("pocket", dtype=dtype, memory=memory)
    assert bool(pipe.plan(asked).streamed) == (memory != "1GB")
    expected = [event for event in pipe.stream(asked)][-1].pixels
    counts = request.getfixturevalue("submissions")
    pipe = ZImagePipeline.from_pretrained("pocket", dtype=dtype, memory=memory)
    late = [event for event in pipe.stream(asked)][-1].pixels
    assert counts["computations"] > 20 and counts["read"] > 10**6
    assert counts["too early"] == 0
    assert np.array_equal(late, expected)


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
    begin_next = "read wait compute"  # the last of it makes the weights what is computed with
    assert " ".join(order) == f"{begin_next} compute {begin_next}{waits} compute {begin_next}{waits} compute{waits}"


def add_a_weight(tokens: Hidden, weights: dict, i: int) -> Hidden:
    return Hidden(tokens.x + weights["ffn_norm1"]["weight"][0])
