import json

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_zimage import scheduler
from mlx_zimage.errors import CheckpointError
from mlx_zimage.scheduler import SchedulerConfig, sigmas

ROWS = json.loads((tiny.GOLDEN / "schedules.json").read_text())
ULP = 1.2e-7  # one float32 rounding at 1: torch.linspace rounds some of 28 and 50 steps the other way


def schedule(config: dict, *args, **options) -> np.ndarray:
    return SchedulerConfig.from_dict(config).sigmas(*args, **options)


def rows(kind: str) -> list:
    return [
        pytest.param(row, id=f"{row['steps']}-{row.get('shift', row.get('tokens'))}")
        for row in ROWS
        if row["kind"] == kind
    ]


@pytest.mark.parametrize("row", rows("static"))
def test_sigmas_equal_the_reference(row):
    ours = sigmas(row["steps"], row["shift"])
    assert np.abs(ours - np.float32(row["sigmas"])).max() <= ULP
    assert np.array_equal(schedule({"shift": row["shift"]}, row["steps"], 4096), ours)


@pytest.mark.parametrize("row", rows("dynamic"))
def test_dynamic_sigmas_equal_the_reference(row):
    config = {"use_dynamic_shifting": True, "shift": 1.0}
    assert SchedulerConfig.from_dict(config).dynamic_mu(row["tokens"]) == pytest.approx(row["mu"], rel=1e-12)
    assert np.abs(schedule(config, row["steps"], row["tokens"]) - np.float32(row["sigmas"])).max() <= ULP


@pytest.mark.parametrize("row", rows("diffusers 0.36"))
def test_the_model_cards_nine_steps_are_eight_here(row):
    # diffusers 0.36 spent its last model call at sigma 0, where it changes nothing
    ours = sigmas(row["steps"] - 1, row["shift"])
    assert np.abs(np.append(ours, 0) - np.float32(row["sigmas"])).max() <= 2 * ULP


@pytest.mark.parametrize("steps", [1, 2, 8, 50, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_sigmas_fall_from_1_to_0(steps, shift):
    values = sigmas(steps, shift)
    assert values.dtype == np.float32
    assert len(values) == steps + 1
    assert values[0] == 1
    assert values[-1] == 0
    assert (np.diff(values) < 0).all()


def test_a_shift_of_1_spaces_sigmas_evenly():
    assert np.allclose(sigmas(10, 1.0), np.linspace(1, 0, 11), atol=ULP)


def test_dynamic_shifting_equals_static_shifting_by_exp_mu():
    assert np.allclose(sigmas(8, mu=np.log(3.0)), sigmas(8, 3.0), atol=2 * ULP)


def test_an_explicit_shift_overrides_the_config():
    assert np.array_equal(schedule({"shift": 3.0}, 8, 4096, shift=6.0), sigmas(8, 6.0))
    assert np.array_equal(schedule({"use_dynamic_shifting": True}, 8, 4096, shift=6.0), sigmas(8, 6.0))


def test_given_sigmas_are_shifted_like_the_evenly_spaced_ones():
    even = [1.0, 0.75, 0.5, 0.25]
    for config in ({"shift": 3.0}, {"use_dynamic_shifting": True}):
        assert np.array_equal(schedule(config, 4, 4096, unshifted=even), schedule(config, 4, 4096))
    assert np.array_equal(schedule({"shift": 1.0}, 2, 4096, unshifted=[0.75, 0.5]), np.float32([0.75, 0.5, 0]))


def test_a_config_without_shift_gets_turbos_shift():
    assert np.array_equal(schedule({}, 8, 4096), sigmas(8, 3.0))


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "DDIMScheduler"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"shift_terminal": 0.02},
        {"time_shift_type": "linear"},
        {"shift": "3.0"},
        {"shift": None},
        {"shift": 0.0},
        {"max_image_seq_len": 256},
    ],
    ids=str,
)
def test_a_schedule_that_is_not_implemented_is_refused(change):
    with pytest.raises(CheckpointError, match=rf"scheduler config: .*{next(iter(change))}"):
        SchedulerConfig.from_dict(change)


def test_a_step_along_a_straight_line_reaches_its_end():
    image, noise = (mx.array(tiny.randn(0, tag, 1, 4, 4, 16)) for tag in ("image", "noise"))
    there = scheduler.add_noise(image, noise, 0.8)
    back = scheduler.step(there, noise - image, 0.8, 0.3)
    # float32: values of order 1 and four roundings
    assert mx.abs(back - scheduler.add_noise(image, noise, 0.3)).max() < 1e-6


def test_sigma_0_is_the_image_and_sigma_1_the_noise():
    image, noise = (mx.array(tiny.randn(0, tag, 1, 4, 4, 16)) for tag in ("image", "noise"))
    assert mx.array_equal(scheduler.add_noise(image, noise, 0.0), image)
    assert mx.array_equal(scheduler.add_noise(image, noise, 1.0), noise)
