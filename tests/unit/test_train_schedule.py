"""Learning-rate schedules against their formulas written out by hand."""

import math

import pytest

from lost.config.training import ConstantScheduleConfig, CosineScheduleConfig, LinearScheduleConfig, WsdScheduleConfig
from lost.train.schedule import learning_rate_at

PEAK, NUM_STEPS = 0.3, 50
ALL = [
    CosineScheduleConfig(warmup_steps=10, final_fraction=0.1),
    LinearScheduleConfig(warmup_steps=10, final_fraction=0.1),
    WsdScheduleConfig(warmup_steps=10, decay_steps=20, final_fraction=0.1),
    ConstantScheduleConfig(warmup_steps=10),
]


def trace(schedule, num_steps=NUM_STEPS):
    return [learning_rate_at(step, PEAK, schedule, num_steps) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_warm_up_is_linear_from_the_first_step(schedule):
    assert trace(schedule)[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)], rel=1e-15)


@pytest.mark.parametrize("schedule", ALL[:3], ids=lambda s: s.name)
def test_floor_is_reached_exactly_at_the_last_step(schedule):
    rates = trace(schedule)
    assert rates[-1] == pytest.approx(0.1 * PEAK, rel=1e-12)
    assert rates[-2] > rates[-1]


def test_cosine_values():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 40)) for step in range(11, 51)]
    assert trace(ALL[0])[10:] == pytest.approx([PEAK * e for e in expected], rel=1e-12)


def test_linear_values():
    expected = [0.1 + 0.9 * (50 - step) / 40 for step in range(11, 51)]
    assert trace(ALL[1])[10:] == pytest.approx([PEAK * e for e in expected], rel=1e-12)


def test_wsd_is_flat_and_then_falls():
    rates = trace(ALL[2])
    assert rates[9:30] == [PEAK] * 21
    assert rates[30:] == pytest.approx([PEAK * (0.1 + 0.9 * (50 - s) / 20) for s in range(31, 51)], rel=1e-12)


def test_constant_stays():
    assert set(trace(ALL[3])[9:]) == {PEAK}


def test_fractions_are_of_the_whole_run():
    by_fraction = WsdScheduleConfig(warmup_steps=0.2, decay_steps=0.4, final_fraction=0.1)
    assert trace(by_fraction) == trace(ALL[2])


@pytest.mark.parametrize("warmup_steps", [0, 0.0])
def test_without_warm_up_the_first_step_is_near_the_peak(warmup_steps):
    rates = trace(LinearScheduleConfig(warmup_steps=warmup_steps, final_fraction=0.0))
    assert rates[0] == pytest.approx(PEAK * 49 / 50)
    assert rates[-1] == 0.0


def test_a_run_of_one_step():
    assert trace(CosineScheduleConfig(warmup_steps=1), num_steps=1) == [PEAK]
