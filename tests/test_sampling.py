import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import relative_error

from mlx_zimage.errors import NumericsError
from mlx_zimage.sampling import denoise, guide
from mlx_zimage.scheduler import sigmas

IMAGE, NOISE = (mx.array(tiny.randn(0, tag, 2, 4, 6, 16)) for tag in ("image", "noise"))


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_constant_velocity_lands_on_the_image(steps):
    *_, last = denoise(lambda latents, i: NOISE - IMAGE, NOISE, sigmas(steps))
    # float32: one rounding per step, of values up to 4
    assert mx.abs(last.latents - IMAGE).max() < 1e-6 * (1 + steps)


def test_steps_report_index_and_sigma():
    values = sigmas(4)
    steps = list(denoise(lambda latents, i: NOISE - IMAGE, NOISE, values))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert {step.steps for step in steps} == {4}
    assert np.array_equal(np.float32([step.sigma for step in steps]), values[1:])
    for step in steps:
        # on the straight line, at that sigma
        assert mx.abs(step.latents - (step.sigma * NOISE + (1 - step.sigma) * IMAGE)).max() < 5e-6
        assert mx.abs(step.clean - IMAGE).max() < 5e-6, "which the velocity points to all the time"
    assert mx.array_equal(steps[-1].clean, steps[-1].latents)


def test_steps_are_euler_steps():
    # d x / d sigma = x grows by 1 + d sigma each step
    values = sigmas(8)
    *_, last = denoise(lambda latents, i: latents, NOISE, values)
    assert relative_error(last.latents, NOISE * float(np.prod(1 + np.diff(values.astype(np.float64))))) < 1e-6


def test_velocity_is_called_once_per_step_and_only_on_demand():
    asked = []

    def velocity(latents, i):
        asked.append(i)
        return latents

    for step in denoise(velocity, NOISE, sigmas(8)):
        if step.index == 2:
            break
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_stop_the_run_at_their_step(bad):
    def velocity(latents, i):
        return latents if i < 2 else mx.where(latents == latents[0, 0, 0, 0], bad, latents)

    steps = denoise(velocity, NOISE, sigmas(4))
    next(steps), next(steps)
    with pytest.raises(NumericsError, match="after step 3 of 4"):
        next(steps)


def test_guidance_0_is_the_positive_velocity():
    positive, negative = (lambda latents, i: latents * 2), (lambda latents, i: latents - i)
    assert mx.array_equal(guide(lambda *at: [positive(*at), negative(*at)], 0.0)(NOISE, 3), positive(NOISE, 3))


def test_guidance_extrapolates_from_the_negative_through_the_positive():
    guided = guide(lambda latents, i: [IMAGE, NOISE], 4.0)(NOISE, 0)
    # 4 in diffusers is 5 in other programs: negative + 5 * (positive - negative)
    assert relative_error(guided, NOISE + 5 * (IMAGE - NOISE)) < 1e-6


def test_guidance_between_equal_velocities_changes_nothing():
    guided = guide(lambda latents, i: [IMAGE, IMAGE], 7.5)(NOISE, 0)
    assert mx.array_equal(guided, IMAGE)
