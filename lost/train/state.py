"""What a run is at between two steps, and how it becomes named tensors and back."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from lost.train.divergence import WINDOW_STEPS
from lost.train.engine import Engine
from lost.train.runtime import Runtime

NamedTensors = dict[str, dict[str, torch.Tensor]]


@dataclass
class TrainState:
    """Counters. The row order is a function of the step and what is left out, so these are the data position too.

    Attributes:
        step: optimizer steps done, skipped ones included.
        tokens_seen: label tokens trained on, padding left out, over all processes.
        owes_evaluation: the run was asked to stop at a step that is evaluated, and has not done that yet.
        skipped_steps: steps whose update was left out, in all and since the last good one.
        recent_losses: of the last good steps, oldest first.
        num_rollbacks: how often the run went back to a checkpoint.
        left_out: ranges [first, last] of steps of the undisturbed row order whose rows roll-backs leave out.
        best_value, best_step: of the best evaluation so far, where the run selects by one (`Selection`).
        evaluations_since_best: evaluations in a row that were not better.
    """

    step: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    owes_evaluation: bool = False
    recent_losses: list[float] = field(default_factory=list)
    num_rollbacks: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0

    def record(self, num_tokens: int, loss: float, is_skipped: bool) -> None:
        self.tokens_seen += num_tokens
        if not is_skipped:
            self.recent_losses = [*self.recent_losses, loss][-WINDOW_STEPS:]
        self.skipped_steps += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0


def snapshot(engine: Engine, state: TrainState, runtime: Runtime) -> tuple[NamedTensors, dict[str, Any]]:
    """(tensors by group, JSON facts) of everything that a resume needs. Called on every process."""
    rng = {f"process_{i}/{k}": v for i, states in enumerate(gather_object([rng_tensors()])) for k, v in states.items()}
    tensors = {"model": engine.model_tensors(), "optimizer": engine.optimizer_tensors()}
    if runtime.is_main:
        tensors["rng"] = rng
    return tensors, {"counters": asdict(state), "num_processes": runtime.num_processes, "runtime": runtime.name}


def restore_rng(rng: Mapping[str, torch.Tensor], runtime: Runtime) -> None:
    """Puts this process's generators where those of a checkpoint were."""
    prefix = f"process_{runtime.process_index}/"
    own_rng = {key.removeprefix(prefix): value for key, value in rng.items() if key.startswith(prefix)}
    # Another number of processes: the new ones keep their fresh generators; LLaMA draws nothing while training.
    if own_rng:
        set_rng_tensors(own_rng)


def rng_tensors() -> dict[str, torch.Tensor]:
    """States of torch's, CUDA's, NumPy's and Python's global generators."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_tensors(states: dict[str, torch.Tensor]) -> None:
    """Inverse of `rng_tensors`."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    has_python_gauss, python_gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), python_gauss if has_python_gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    gauss = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
