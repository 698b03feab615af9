"""Which evaluation was the best, and when a run that no longer gets better ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lost.train.state import TrainState


@dataclass(frozen=True)
class Selection:
    """Compares evaluations by one number.

    Attributes:
        key: of the evaluation line.
        is_higher_better: accuracy is, a loss is not.
        patience: evaluations in a row without a better one after which the run ends; 0: never.
        is_best_kept: whether the checkpoint of the best one is saved, and not deleted.
    """

    key: str
    is_higher_better: bool
    patience: int = 0
    is_best_kept: bool = True

    def record(self, state: TrainState, line: Mapping[str, Any]) -> bool:
        """Notes an evaluation after state.step in `state`; whether it is the best so far. NaN is never."""
        value = float(line[self.key])
        sign = 1 if self.is_higher_better else -1
        is_first = state.best_value is None and math.isfinite(value)
        is_best = is_first or (state.best_value is not None and sign * value > sign * state.best_value)
        if is_best:
            state.best_value, state.best_step = value, state.step
        state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
        return is_best

    def is_over(self, state: TrainState) -> bool:
        """Whether the run should end after this step."""
        return self.patience > 0 and state.evaluations_since_best >= self.patience
