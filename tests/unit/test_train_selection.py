"""Which evaluation counts as the best of a run."""

from types import SimpleNamespace

import pytest

from lost.train.selection import Selection
from lost.train.state import TrainState
from lost.train.trainer import log_evaluation


def evaluated(state, accuracy, **settings):
    run = SimpleNamespace(metrics=SimpleNamespace(log=lambda _: None), selection=Selection("a", True, **settings))
    return log_evaluation(run, state, lambda: {"a": accuracy})


@pytest.mark.parametrize(("step", "skipped"), [(0, 0), (3, 1)])
def test_neither_the_start_nor_weights_of_a_step_before_are_the_best(step, skipped):
    state = TrainState(step=step, skipped_in_a_row=skipped)
    assert not evaluated(state, 1.0)
    assert state.best_value is None
    state.step, state.skipped_in_a_row = 4, 0
    assert evaluated(state, 0.5)
    assert (state.best_value, state.best_step) == (0.5, 4)


def test_a_best_one_that_is_not_kept_still_counts_for_patience():
    state = TrainState(step=2)
    assert not evaluated(state, 0.5, is_best_kept=False)
    assert (state.best_step, state.evaluations_since_best) == (2, 0)
    assert not evaluated(state, 0.4, is_best_kept=False)
    assert (state.best_step, state.evaluations_since_best) == (2, 1)
