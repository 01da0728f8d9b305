"""LoRAs laid over a transformer: the same as merged into its weights, whatever those are packed in or read from."""

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import numpy as np
import pytest
from lanes import slow
from mlx.utils import tree_flatten, tree_unflatten

from mlx_zimage.convert import convert
from mlx_zimage.models.layers import linear, product_from
from mlx_zimage.models.runner import PlainRunner, Tree
from mlx_zimage.models.transformer import Transformer
from mlx_zimage.weights.blocks import Blocks
from mlx_zimage.weights.checkpoint import open_checkpoint
from mlx_zimage.weights.component import Component
from mlx_zimage.weights.deltas import Delta, Dense, DoRA, Hadamard, Kronecker, LowRank, Replacement
from mlx_zimage.weights.overlay import Extra, Overlay

CONFIG = open_checkpoint("pocket").transformer.config
SHAPES, D, HEAD = CONFIG.shapes(), CONFIG.dim, CONFIG.dim // CONFIG.n_heads
SIDE = 8


@pytest.fixture(autouse=True)
def same_numbers():
    mx.random.seed(5)


def normal(*shape: int, scale: float = 0.2) -> mx.array:
    return scale * mx.random.normal(shape)


def low_rank(name: str, rank: int = 3) -> LowRank:
    rows, columns = SHAPES[name]
    return LowRank(normal(rank, columns), normal(rows, rank), 0.7)


def kronecker(name: str) -> Kronecker:
    rows, columns = SHAPES[name]
    return Kronecker(normal(8, 4), normal(rows // 8, columns // 4), 0.7)


def hadamard(name: str) -> Hadamard:
    rows, columns = SHAPES[name]
    return Hadamard(*(normal(*shape, scale=0.4) for shape in ((rows, 2), (2, columns)) * 2))


def dora(inner: Delta, axis: int) -> DoRA:
    size = inner.shape[1 - axis]
    return DoRA(inner, 2 + mx.abs(normal(size, 1) if axis else normal(1, size)))


LAYERS = [f"{block}.{layer}.weight" for block in ("layers.0", "noise_refiner.0") for layer in
          ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1")]  # fmt: skip
KINDS = {
    "low rank": lambda: {
        name: low_rank(name)
        for name in (
            *LAYERS,
            "layers.0.adaLN_modulation.0.weight",
            "cap_embedder.1.weight",
            "all_x_embedder.2-1.weight",
            "t_embedder.mlp.0.weight",
            "all_final_layer.2-1.linear.weight",
        )
    },
    "LoKr": lambda: {name: kronecker(name) for name in LAYERS},
    "LoHa": lambda: {name: hadamard(name) for name in LAYERS},
    "dense": lambda: {name: Dense(normal(*SHAPES[name], scale=0.05)) for name in LAYERS},
    "set_weight": lambda: {name: Replacement(normal(*SHAPES[name], scale=0.05)) for name in LAYERS},
    "DoRA by row": lambda: {name: dora(low_rank(name), 1) for name in LAYERS},
    "DoRA by column": lambda: {name: dora(low_rank(name), 0) for name in LAYERS},
    "DoRA of LoKr": lambda: {name: dora(kronecker(name), 1) for name in LAYERS},
    "DoRA of LoHa by column": lambda: {name: dora(hadamard(name), 0) for name in LAYERS},
    "norms, biases and tokens": lambda: {
        "layers.0.attention_norm1.weight": Dense(normal(D)),
        "layers.1.attention.norm_q.weight": Dense(normal(HEAD)),
        "layers.0.adaLN_modulation.0.bias": Dense(normal(4 * D)),
        "cap_pad_token": Dense(normal(1, D)),
        "noise_refiner.0.ffn_norm2.weight": Replacement(normal(D)),
    },
}


PACKED = {"dense": None, "8 bits": (8, "affine"), "4 bits": (4, "affine"), "mxfp4": (4, "mxfp4"), "nvfp4": (4, "nvfp4")}


@pytest.fixture(scope="module")
def components(tmp_path_factory) -> Callable[[str], Component]:
    """The pocket model's transformer, dense or packed."""

    @cache
    def components(packing: str) -> Component:
        if PACKED[packing] is None:
            return open_checkpoint("pocket").transformer
        bits, mode = PACKED[packing]
        folder = tmp_path_factory.mktemp("packed") / "model"
        convert("pocket", folder, bits=bits, mode=mode, dtype="float32")
        return open_checkpoint(folder).transformer

    return components


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    """Other tests of this process measure memory."""
    yield
    dense.cache_clear()
    mx.clear_cache()


@pytest.fixture(scope="module")
def plain() -> Component:
    return open_checkpoint("pocket").transformer


def overlay(component: Component, deltas: dict[str, dict[str, Delta]], streamed: tuple[str, ...] = ()) -> Overlay:
    found = Overlay(Blocks(component, mx.float32, streamed), CONFIG)
    for file, own in deltas.items():
        found.attach(file, own)
    return found


def velocity(runner, unpack_from: int = 0) -> np.ndarray:
    """The network's output for fixed inputs."""
    key = mx.random.key(1)
    prompt, latents = (
        mx.random.normal((9, CONFIG.cap_feat_dim), key=key),
        mx.random.normal((1, SIDE, SIDE, 16), key=key),
    )
    transformer = Transformer(CONFIG, runner, product_from(unpack_from))
    return np.array(transformer.velocity(prompt, [0.7], SIDE, SIDE)(latents, 0))


@cache
def dense(component: Component) -> dict[str, mx.array]:
    """All of a network's weights in the form used for computing, dense."""
    bare = overlay(component, {})
    return {name: bare.base(name) for name in SHAPES}


def merged(component: Component, files: list[tuple[dict[str, Delta], float]]) -> PlainRunner:
    """All weights dense, each with the difference of every file added to it."""
    weights = dict(dense(component))
    for deltas, strength in files:
        for name, delta in deltas.items():
            own = dense(component)[name]
            added = delta.reordered(partial(CONFIG.sanitize, name)).difference(own)
            weights[name] = weights[name] + strength * added
    return PlainRunner(tree_unflatten(list(weights.items())))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    "kind", [kind if kind in ("low rank", "LoKr", "DoRA by row") else slow(kind) for kind in KINDS]
)
@pytest.mark.parametrize("packing", ["dense", slow("4 bits")])
def test_a_lora_laid_over_the_weights_equals_one_merged_into_them(components, packing, kind):
    check_merged(components(packing), kind, unpack_from=10**6)


@pytest.mark.parametrize("kind", ["low rank", "LoKr"])
@pytest.mark.parametrize(
    "packing, unpack_from",
    [("4 bits", 0), slow("nvfp4", 10**6), slow("8 bits", 0), slow("mxfp4", 0)],
)
def test_a_lora_over_quantized_weights_equals_one_merged_into_them(components, packing, unpack_from, kind):
    check_merged(components(packing), kind, unpack_from)


def check_merged(component: Component, kind: str, unpack_from: int) -> None:
    deltas = KINDS[kind]()
    found = overlay(component, {"a": deltas})
    found.set({"a": 0.8})
    attached = velocity(found, unpack_from)
    # float32, other orders of the same sums: measured 2e-6 at most
    assert difference(attached, velocity(merged(component, [(deltas, 0.8)]))) < 1e-5
    assert difference(attached, velocity(overlay(component, {}), unpack_from)) > 0.01


@pytest.mark.parametrize("packing", [slow("dense"), "4 bits"])
def test_strength_0_and_unloading_give_the_model_itself_bit_for_bit(components, packing):
    component = components(packing)
    model = velocity(Blocks(component, mx.float32))
    found = overlay(component, {"a": KINDS["low rank"]()})
    np.testing.assert_array_equal(velocity(found), model)
    found.set({"a": 1.0})
    assert difference(velocity(found), model) > 0.01
    found.set({"a": 0.0})
    np.testing.assert_array_equal(velocity(found), model)
    found.set({"a": 1.0})
    found.detach("a")
    np.testing.assert_array_equal(velocity(found), model)
    assert found.extra({"a": 1.0}) == Extra()


@pytest.mark.parametrize("kind", ["low rank", slow("LoKr"), "norms, biases and tokens"])
def test_streamed_blocks_give_the_same_bits_as_kept_ones(components, kind):
    component = components("4 bits")
    deltas = {"a": KINDS[kind]()}
    found = [overlay(component, deltas, streamed) for streamed in ((), tuple(CONFIG.blocks))]
    for each in found:
        each.set({"a": 0.6})
    np.testing.assert_array_equal(velocity(found[0]), velocity(found[1]))


def test_files_add_up_to_the_same_bits_in_any_order(plain):
    a, b, c = KINDS["low rank"](), KINDS["DoRA by row"](), KINDS["LoKr"]()
    first, second = overlay(plain, {"a": a, "b": b, "c": c}), overlay(plain, {"c": c, "b": b, "a": a})
    first.set({"a": 0.5, "b": 0.25, "c": -0.5})
    second.set({"c": -0.5, "a": 0.5, "b": 0.25})
    expected = velocity(merged(plain, [(a, 0.5), (b, 0.25), (c, -0.5)]))
    np.testing.assert_array_equal(velocity(first), velocity(second))
    assert difference(velocity(first), expected) < 1e-5


def test_gains_of_rows_and_of_columns_add_up(plain):
    a, b = KINDS["DoRA by row"](), KINDS["DoRA by column"]()
    found = overlay(plain, {"a": a, "b": b})
    found.set({"a": 0.5, "b": 0.25})
    assert difference(velocity(found), velocity(merged(plain, [(a, 0.5), (b, 0.25)]))) < 1e-5


def test_changing_strengths_reads_nothing_and_keeps_every_shape_and_dtype(plain, bytes_read):
    found = overlay(plain, {"a": KINDS["low rank"](), "b": KINDS["LoHa"]()})
    found.set({"a": 1.0, "b": 1.0})
    velocity(found)
    block = found.tree("layers.0")
    before = bytes_read.total()
    found.set({"a": 0.3, "b": -2.0})
    after = found.tree("layers.0")
    assert bytes_read.total() == before
    shapes = [[(name, leaf.shape, leaf.dtype) for name, leaf in tree_flatten(tree)] for tree in (block, after)]
    assert shapes[0] == shapes[1]  # what mx.compile traces by


def test_changing_strengths_makes_no_trace(plain):
    traces = []

    @mx.compile
    def layer(x: mx.array, weights: Tree) -> mx.array:
        traces.append(1)
        return linear(x, weights)

    found = overlay(plain, {kind: KINDS[kind]() for kind in ("low rank", "LoKr", "DoRA by row")})
    for strength in (1.0, 0.3, -2.0):
        found.set(dict.fromkeys(("low rank", "LoKr", "DoRA by row"), strength))
        layer(mx.ones((1, D)), found.tree("layers.0")["attention"]["to_q"])
    assert len(traces) == 1


def test_swapping_loras_many_times_leaks_nothing(plain):
    files = {kind: KINDS[kind]() for kind in ("low rank", "LoKr", "DoRA by row")}
    found = overlay(plain, files)
    seen: dict[str, set[bytes]] = {}
    memory = []
    for i in range(24):
        kind = [*files, "none"][i % 4]
        found.set({kind: 1.0} if kind in files else {})
        seen.setdefault(kind, set()).add(velocity(found).tobytes())
        memory.append(mx.get_active_memory())
    assert all(len(outputs) == 1 for outputs in seen.values()) and len(seen) == 4
    assert max(memory[12:]) <= max(memory[:12])


@pytest.mark.parametrize("kind", KINDS)
def test_what_files_need_is_known_before_they_are_attached(components, kind):
    """To the byte, and without reading the model or the file."""
    component, files = components("dense"), {"a": KINDS[kind](), "b": KINDS["low rank"]()}
    unread = overlay(component, {})
    unread.base = None
    for strengths in ({"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 0.0}):
        needed = unread.extra_of(files, strengths)
        assert needed == overlay(component, files).extra(strengths) and needed.held
