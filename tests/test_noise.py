import json
import zlib

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_zimage import RequestError
from mlx_zimage.noise import (
    STATE_BYTES,
    TWISTER,
    _uniform,
    check_generator,
    generator_randn,
    initial_noise,
    torch_randn,
)

ROWS = json.loads((tiny.GOLDEN / "noise.json").read_text())
SHAPES = sorted({tuple(row["shape"]) for row in ROWS}, key=np.prod)
RECORDED = {str(shape): [row for row in ROWS if tuple(row["shape"]) == shape] for shape in SHAPES}
LARGEST = RECORDED.pop(str(SHAPES[-1]))
recorded = pytest.mark.parametrize(
    "rows",
    [*RECORDED.values(), LARGEST[-3:], pytest.param(LARGEST, marks=pytest.mark.slow)],
    ids=[*RECORDED, f"{SHAPES[-1]}, three seeds", str(SHAPES[-1])],
)


@recorded
def test_normals_match_torch(rows):
    for row in rows:
        shape = tuple(row["shape"])
        normals = torch_randn(row["seed"], shape).reshape(-1)
        ends = np.concatenate([normals[:16], normals[-16:]])
        # float32 logarithms and cosines of two libraries, at values up to 6; a wrong number errs by about 1
        assert np.abs(ends - np.float32(row["ends"])).max() < 2e-6, row["seed"]
        # measured at most 2e-8 per value: errors of both signs cancel
        assert abs(normals.sum(dtype=np.float64) - row["sum"]) < 1e-7 * normals.size, row["seed"]


@recorded
def test_uniforms_match_torch_bit_for_bit(rows):
    for row in rows:
        uniforms = _uniform(np.random.RandomState(row["seed"] % 2**32)._bit_generator, int(np.prod(row["shape"])))
        assert zlib.crc32(uniforms.tobytes()) == row["uniform_crc32"], row["seed"]


def test_seeds_with_the_same_low_32_bits_give_the_same_noise():
    # torch keeps only these
    shape = (1, 16, 4, 4)
    assert np.array_equal(torch_randn(5, shape), torch_randn(2**32 + 5, shape))
    assert not np.array_equal(torch_randn(5, shape), torch_randn(6, shape))


def test_the_first_noise_of_a_batch_equals_a_single_one():
    several, single = initial_noise(42, (3, 16, 6, 10)), initial_noise(42, (1, 16, 6, 10))
    assert mx.array_equal(several[:1], single)
    assert not mx.array_equal(several[1], several[2])


def test_an_incomplete_last_group_of_16_is_generated_again():
    # torch fills such a tail with 16 new normals, which overwrite some of the previous ones
    whole, ragged = torch_randn(3, (32,)), torch_randn(3, (40,))
    assert np.array_equal(whole[:24], ragged[:24])
    assert not np.array_equal(whole[24:], ragged[24:32])


def test_fewer_than_16_numbers_are_refused():
    with pytest.raises(ValueError, match="at least 16 normally distributed values"):
        torch_randn(0, (1, 15))


@pytest.mark.parametrize("rng", ["torch", "mlx"])
def test_noise_is_standard_normal_float32(rng):
    noise = initial_noise(2**64 - 1, (2, 16, 64, 64), rng)
    assert noise.dtype == mx.float32
    # 131072 numbers: three standard deviations of the mean, and of the variance
    assert abs(noise.mean().item()) < 3 / 131072**0.5
    assert abs(noise.var().item() - 1) < 3 * (2 / 131072) ** 0.5


def test_mlx_noise_depends_only_on_its_seed():
    mx.random.seed(1)
    first = initial_noise(9, (1, 16, 4, 4), "mlx")
    mx.random.seed(2)
    assert mx.array_equal(initial_noise(9, (1, 16, 4, 4), "mlx"), first)
    assert not mx.array_equal(initial_noise(10, (1, 16, 4, 4), "mlx"), first)


class Generator:
    """torch.Generator(), as far as it is needed here: the state has torch's layout. tests/parity uses the real one."""

    def __init__(self, seed: int):
        self.seed = seed
        self.state = np.zeros(STATE_BYTES, np.uint8)
        twister = self.state[: TWISTER.itemsize].view(TWISTER)
        twister["seed"], twister["left"], twister["seeded"] = seed, 1, 1
        twister["key"] = np.random.RandomState(seed % 2**32).get_state()[1]

    def initial_seed(self) -> int:
        return self.seed

    def get_state(self) -> np.ndarray:
        return self.state.copy()

    def set_state(self, state: np.ndarray) -> None:
        self.state = state


def test_a_generator_gives_the_noise_of_its_seed_and_advances():
    generator = Generator(5)
    first, second = (generator_randn(generator, (1, 16, 6, 8)) for _ in range(2))
    # whole groups of 16: two draws are one of twice the size
    assert np.array_equal(np.concatenate([first, second]), torch_randn(5, (2, 16, 6, 8)))
    assert generator.initial_seed() == 5


@pytest.mark.parametrize("count", [1, 39, 2])
def test_a_generator_continues_from_its_current_state(count):
    """39 groups of 16 are 624 numbers: all that a state has."""
    generator = Generator(1)
    generator_randn(generator, (16 * count,))
    assert np.array_equal(generator_randn(generator, (64,)), torch_randn(1, (16 * count + 64,))[16 * count :])


def test_anything_but_a_generator_of_known_noise_is_refused():
    with pytest.raises(RequestError, match=r"generator must be a torch.Generator, got int; or use seed=N"):
        check_generator(7)
    gpu = Generator(7)
    gpu.device = type("device", (), {"type": "mps"})
    with pytest.raises(RequestError, match=r"got one on mps, whose noise cannot be reproduced here"):
        check_generator(gpu)
    other = Generator(7)
    other.state = other.state[:16]
    with pytest.raises(RequestError, match="whose noise cannot be reproduced"):
        check_generator(other)
