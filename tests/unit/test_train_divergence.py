"""What counts as a bad step, and which rows are left out after a roll-back."""

import math

import pytest

from lost.train.divergence import StepFacts, advice, as_json, data_step, diagnosis, fault_of, loss_limit, merged

RANGES = [[[6, 7]], [[1, 1]], [[2, 4], [9, 9], [11, 20]], [[1, 3], [5, 5]], []]


@pytest.mark.parametrize("left_out", RANGES)
def test_steps_read_in_order_what_is_not_left_out(left_out):
    gone = {step for first, last in left_out for step in range(first, last + 1)}
    expected = [step for step in range(1, 60) if step not in gone][:30]
    assert [data_step(step, left_out) for step in range(1, 31)] == expected


def test_ranges_that_touch_or_overlap_become_one():
    assert merged([[8, 9], [1, 2], [6, 7], [3, 3], [20, 30], [22, 25]]) == [[1, 3], [6, 9], [20, 30]]
    assert merged([]) == []


def test_a_spike_is_a_loss_above_the_factor_times_the_median():
    # The median of 1 to 11 is 6, their mean too; one huge value moves the mean only.
    losses = [float(value) for value in range(1, 11)] + [1e6]
    assert loss_limit(losses, 2.0) == 12.0
    assert loss_limit(losses, 0.0) == math.inf
    assert loss_limit(losses[:9], 2.0) == math.inf


@pytest.mark.parametrize(
    ("loss", "grad_norm", "limit", "fault"),
    [
        (2.0, 1.0, math.inf, ""),
        (2.0, 1.0, 2.0, ""),
        (2.001, 1.0, 2.0, "loss above 2"),
        (math.nan, 1.0, math.inf, "not finite"),
        (2.0, math.inf, math.inf, "not finite"),
        (math.inf, 1.0, 2.0, "not finite"),
    ],
)
def test_faults(loss, grad_norm, limit, fault):
    assert fault_of(loss, grad_norm, limit) == fault


def facts(step, loss, fault=""):
    return StepFacts(step=step, loss=loss, grad_norm=0.25, learning_rate=3e-4, fault=fault)


def test_the_diagnosis_shows_every_step_and_what_to_try():
    steps = [facts(3, 2.5), facts(4, 2.4), facts(5, math.nan, "not finite"), facts(6, math.nan, "not finite")]
    text = diagnosis(steps, 2, 2)
    assert text.startswith("step 6: 2 steps in a row were skipped (train.max_skipped_steps = 2)")
    lines = [line.split() for line in text.splitlines()[2:]]
    assert lines[0] == ["3", "2.5", "0.25", "0.0003"]
    assert lines[3] == ["6", "nan", "0.25", "0.0003", "not", "finite"]
    assert "bad rows" in advice(steps, 3e-3, "fp32")
    assert "runtime.precision=fp32" in advice(steps, 3e-3, "bf16")
    rising = [facts(3, 2.5), facts(4, 4.4), facts(5, math.nan, "not finite")]
    assert "lower optimizer.learning_rate = 0.003" in advice(rising, 3e-3, "fp32")
    assert as_json(steps[-1])["loss"] is None
