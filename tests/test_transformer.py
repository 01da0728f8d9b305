from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import TOLERANCE, relative_error

from mlx_zimage.errors import CheckpointError
from mlx_zimage.models import transformer
from mlx_zimage.models.layers import linear, rms_norm
from mlx_zimage.models.runner import Alone
from mlx_zimage.models.transformer import (
    Stream,
    Transformer,
    TransformerConfig,
    patchify,
    positions,
    rope_table,
    unpatchify,
)
from mlx_zimage.weights.blocks import Blocks

pytestmark = pytest.mark.metal


def run(network: Transformer, latents: np.ndarray, caption: np.ndarray, time: float) -> mx.array:
    """Data minus noise (16, h, w) for latents (16, h, w), like the output of diffusers' transformer."""
    out = run_batch(network, latents[None], caption, time)
    return out[0]


def run_batch(network: Transformer, latents: np.ndarray, caption: np.ndarray, time: float) -> mx.array:
    """The same for latents (B, 16, h, w) that share a caption and a time."""
    _, _, h, w = latents.shape
    modulation, final_scale = network.modulate([time])
    captions = network.captions([mx.array(caption)], h, w)
    (out,) = network(mx.array(latents).transpose(0, 2, 3, 1), captions, modulation[0], final_scale[0])
    return out.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("case", tiny.CASES)
def test_outputs_equal_the_reference(golden, golden_pipe, case):
    for i, (latents, caption, time) in enumerate(tiny.case_inputs(golden.seed, case)):
        out = run(golden_pipe.transformer, latents, caption, time)
        assert relative_error(out, golden[f"transformer/{case}.out{i}"]) < TOLERANCE


def test_outputs_of_a_model_wider_than_the_time_embedding_equal_the_reference(golden):
    network = golden.wide.transformer
    (latents, caption, time), *_ = tiny.case_inputs(golden.seed, "a_pad_both", network.config.cap_feat_dim)
    assert relative_error(run(network, latents, caption, time), golden["wide/out"]) < TOLERANCE


def test_outputs_for_near_zero_activations_equal_the_reference(golden):
    (latents, caption, time), *_ = tiny.case_inputs(golden.seed, "a_pad_both")
    ours = run(golden.faint.transformer, latents, caption * np.float32(1e-3), time)
    assert relative_error(ours, golden["faint/out"]) < TOLERANCE


def test_every_part_equals_the_reference(golden, golden_pipe, watch, monkeypatch):
    found, walk = {}, Blocks.walk

    def walk_watched(self, blocks, streams, apply, **options):
        def watched(stream, weights, i):
            stream = apply(stream, weights, i)
            found[blocks[i]] = stream.x
            return stream

        return walk(self, blocks, streams, watched, **options)

    monkeypatch.setattr(Blocks, "walk", walk_watched)
    attentions, feeds = watch(transformer, "joined_heads"), watch(transformer, "feed_forward")
    network = golden_pipe.transformer
    (latents, caption, time), *_ = tiny.case_inputs(golden.seed, "a_pad_both")
    out = run(network, latents, caption, time)
    names = list(found)
    assert names == ["context_refiner.0", "context_refiner.1", *network.config.modulated]
    found["layers.0.attention"] = attentions[names.index("layers.0")]
    found["layers.0.feed_forward"] = feeds[names.index("layers.0")]
    tokens = patchify(out.transpose(1, 2, 0)[None])
    found["final_layer"] = tokens
    patches = patchify(mx.array(latents).transpose(1, 2, 0)[None])
    runner = network.runner
    found["x_embedder"] = linear(patches, runner.tree("all_x_embedder.2-1"))[0]
    embedder = runner.tree("cap_embedder")
    found["cap_embedder"] = linear(rms_norm(mx.array(caption), embedder[0], network.config.norm_eps), embedder[1])
    found["t_embedder"] = transformer.time_embedding([time], runner.tree("t_embedder"), network.config.t_scale)
    found["patches"] = patches[0]
    for name, ours in found.items():
        wanted = golden[f"transformer/a_pad_both.mid.{name}"]
        if name in ("final_layer", "x_embedder", "cap_embedder", "patches", names[-1]):
            wanted = wanted[
                ..., : ours.shape[-2], :
            ]  # diffusers also computes rows that it then drops, such as padding
        assert relative_error(ours, wanted) < TOLERANCE, name


def test_modulations_equal_the_reference(golden, golden_pipe):
    network = golden_pipe.transformer
    (_, _, time), *_ = tiny.case_inputs(golden.seed, "a_pad_both")
    ours = network.modulate([time])[0][0, network.config.modulated.index("layers.0")]
    scale_attn, gate_attn, scale_ffn, gate_ffn = np.split(
        golden["transformer/a_pad_both.mid.layers.0.adaLN_modulation"][0], 4
    )
    wanted = np.stack([1 + scale_attn, np.tanh(gate_attn), 1 + scale_ffn, np.tanh(gate_ffn)])
    assert relative_error(ours, wanted) < TOLERANCE


def test_positions_equal_the_reference(golden):
    (latents, *_), *_ = tiny.case_inputs(golden.seed, "a_pad_both")
    ours = positions(32, *latents.shape[1:])
    assert np.array_equal(ours[:32], golden["transformer/a_pad_both.mid.x_pos_ids"])
    assert np.array_equal(ours[32:], golden["transformer/a_pad_both.mid.cap_pos_ids"][:32])


def test_rotary_tables_equal_the_reference(golden):
    cos, sin = rope_table(golden["transformer/a_pad_both.mid.x_pos_ids"], tiny.TRANSFORMER["axes_dims"], 256.0)
    # both are cosines of the same float32 angles; two libraries round them differently, 6e-8 measured
    assert np.abs(np.array(cos) - golden["transformer/a_pad_both.mid.x_rope_cos"]).max() < 2e-7
    assert np.abs(np.array(sin) - golden["transformer/a_pad_both.mid.x_rope_sin"]).max() < 2e-7


def test_images_of_a_batch_do_not_affect_each_other(pipe):
    (_, caption, time), *_ = tiny.case_inputs(0, "a_pad_both")
    latents = tiny.randn(0, "batch", 3, 16, 12, 10)
    together = run_batch(pipe.transformer, latents, caption, time)
    alone = [run(pipe.transformer, one, caption, time) for one in latents]
    # float32: only the order of the sums may differ, 0 measured
    assert relative_error(together, mx.stack(alone)) < 5e-6


def test_all_times_of_a_schedule_can_be_modulated_at_once(pipe):
    times = [0.0, 0.25, 0.7]
    blocks, final = pipe.transformer.modulate(times)
    for i, time in enumerate(times):
        one_blocks, one_final = pipe.transformer.modulate([time])
        assert relative_error(blocks[i], one_blocks[0]) < 1e-6
        assert relative_error(final[i], one_final[0]) < 1e-6


def test_velocity_points_from_data_to_noise(pipe):
    (latents, caption, _), *_ = tiny.case_inputs(0, "a_pad_both")
    velocity = pipe.transformer.velocity(mx.array(caption), [1.0, 0.75], 12, 10)
    ours = velocity(mx.array(latents).transpose(1, 2, 0)[None], 1)[0].transpose(2, 0, 1)
    assert relative_error(ours, -run(pipe.transformer, latents, caption, 0.25)) < 1e-6


def test_unpatchify_inverts_patchify():
    x = mx.array(tiny.randn(0, "patches", 2, 6, 10, 16))
    assert mx.array_equal(unpatchify(patchify(x), 6, 10), x)


def test_rotation_preserves_lengths_and_depends_only_on_distances(pipe):
    cos, sin = rope_table(np.array([[3, 1, 2], [5, 4, 6], [13, 11, 12], [15, 14, 16]]), (4, 6, 6), 256.0)
    q, k = mx.array(tiny.randn(0, "q", 16)), mx.array(tiny.randn(0, "k", 16))
    q, k = (transformer.rotate(mx.broadcast_to(x, (1, 4, 1, 16)), cos, sin)[0, :, 0] for x in (q, k))
    lengths = mx.linalg.norm(q, axis=-1)
    assert mx.allclose(lengths, mx.broadcast_to(lengths[:1], (4,)), rtol=1e-6)
    # float32: the sum of 16 products, each of order 1
    assert abs((q[0] * k[1]).sum() - (q[2] * k[3]).sum()).item() < 1e-5


@pytest.mark.parametrize(
    "change", [{"all_patch_size": [4]}, {"qk_norm": False}, {"siglip_feat_dim": 1152}, {"all_f_patch_size": [2]}]
)
def test_unsupported_configs_are_refused(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        TransformerConfig.from_dict(tiny.TRANSFORMER | change)


def stream_of(network: Transformer, length: int, blocks: int) -> Stream:
    """A stream of random tokens for this many blocks, with the tables for their positions."""
    config = network.config
    x = mx.array(tiny.randn(0, "stream.x", 1, length, config.dim))
    modulation = mx.array(tiny.randn(0, "stream.modulation", blocks, 4, config.dim))
    return Stream(x, modulation, *rope_table(positions(0, 2, 2 * length)[:length], config.axes_dims, config.rope_theta))


@pytest.mark.parametrize("parts", [0, 2])
def test_attention_split_by_rows_with_gathered_keys_and_values_equals_the_whole(pipe, parts):
    """As on several machines: each has some of the rows, and attends to all."""
    network = pipe.transformer
    whole = stream_of(network, 64, 1)
    bounds = [(0, 40), (40, 64)]
    shares = [replace(whole, x=whole.x[:, a:b], cos=whole.cos[a:b], sin=whole.sin[a:b]) for a, b in bounds]
    theirs: list[list[mx.array]] = []

    class Gathering(Alone):
        def __init__(self, gather):
            self._gather = gather

        def parts(self, rows: int) -> int:
            return parts

        def gather(self, x: mx.array, shares, apart: bool = True) -> mx.array:
            return self._gather(x)

    def run(share: Stream, gather) -> mx.array:
        machine = Transformer(network.config, network.runner, ranks=Gathering(gather))
        return machine.run(["layers.0"], [replace(share, shares=(40, 24))])[0].x

    for share in shares:  # what each machine would send
        theirs.append([])
        run(share, lambda x: theirs[-1].append(x) or x)
    everything = [mx.concatenate(list(sent), axis=1) for sent in zip(*theirs, strict=True)]
    assert len(everything) == max(parts, 1)
    found = []
    for share in shares:
        pieces = iter(everything)
        found.append(run(share, lambda x, pieces=pieces: next(pieces)))
    found = mx.concatenate(found, axis=1)
    # float32: products of fewer rows may be summed in another order, by other kernels on a GPU; attending to a part of
    # the rows only would change everything
    assert relative_error(found, network.run(["layers.0"], [whole])[0].x) < TOLERANCE
