import mlx.core as mx
import numpy as np
import pytest
import tiny
from compare import relative_error

from mlx_zimage.errors import NumericsError
from mlx_zimage.sampling import Change, Guidance, Step, answered, denoise, guide, length
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


def guided(velocities, guidance: Guidance, i: int = 0) -> mx.array:
    return guide(lambda latents, i, count: velocities[:count], guidance, sigmas(4))(NOISE, i)


def test_guidance_0_is_the_positive_velocity():
    assert mx.array_equal(guided([IMAGE, NOISE], Guidance(0.0)), IMAGE)


def test_guidance_extrapolates_from_the_negative_through_the_positive():
    # 4 in diffusers is 5 in other programs: negative + 5 * (positive - negative)
    assert relative_error(guided([IMAGE, NOISE], Guidance(4.0)), NOISE + 5 * (IMAGE - NOISE)) < 1e-6


def test_guidance_between_equal_velocities_changes_nothing():
    assert mx.array_equal(guided([IMAGE, IMAGE], Guidance(7.5)), IMAGE)


def test_normalization_keeps_the_direction_and_limits_the_length_of_each_image_by_itself():
    positive = mx.concatenate([IMAGE[:1], 100 * IMAGE[1:]])  # the second is hardly changed by guidance
    free, limited = (guided([positive, NOISE], Guidance(2.0, x)) for x in (0.0, 1.5))
    longer = length(free) / length(positive)
    assert longer[0].item() > 1.5
    # float32 sums of 384 squares
    assert (length(limited) / length(positive))[0].item() == pytest.approx(1.5, rel=1e-5)
    assert relative_error(limited[0] / length(limited)[0], free[0] / length(free)[0]) < 1e-5
    assert mx.array_equal(guided([positive, positive], Guidance(2.0, 1.5)), positive), "what is short enough is left"


def test_steps_after_the_truncation_run_the_positive_prompt_alone():
    asked = []

    def velocities(latents, i, count):
        asked.append(count)
        return [IMAGE, NOISE][:count]

    along = guide(velocities, Guidance(1.0, truncation=0.2), sigmas(4))  # times 0, 0.1, 0.25 and 0.5
    found = [along(NOISE, i) for i in range(4)]
    assert asked == [None, None, 1, 1]
    assert [mx.array_equal(v, IMAGE) for v in found] == [False, False, True, True]


def test_a_step_may_be_answered_with_other_latents_or_with_a_stop():
    def answer(step: Step) -> Change:
        return Change(IMAGE if step.index == 1 else None, stop=step.index == 2)

    steps = list(answered(denoise(lambda latents, i: mx.zeros_like(latents), NOISE, sigmas(8)), answer))
    assert [step.index for step in steps] == [0, 1, 2]
    assert mx.array_equal(steps[0].latents, NOISE)
    assert mx.array_equal(steps[1].latents, IMAGE) and mx.array_equal(steps[2].latents, IMAGE)
