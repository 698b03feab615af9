"""What happens when too many steps in a row are skipped: a diagnosis, then the end or a way back before them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lost.assemble.resume import by_main, restore
from lost.checkpoint import CheckpointManager, write_json_atomically
from lost.checkpoint.io import read_json
from lost.checkpoint.manager import FACTS_NAME
from lost.checkpoint.shards import read_into
from lost.data import Mixture, Prepared
from lost.train.divergence import advice, as_json, data_step, merged
from lost.train.state import TrainState
from lost.train.trainer import GoBack, Run, diagnosis_of
from lost.utils.errors import TrainingError
from lost.utils.logging import get_logger

log = get_logger(__name__)

DIAGNOSIS_NAME = "divergence.json"


def go_back_with(
    run: Run, prepared: Prepared, manager: CheckpointManager, restart_batches: Callable[[TrainState], None]
) -> GoBack:
    """The function that fit() calls after too many skipped steps; called on every process.

    It is a function of what the run has seen, so that a run killed right after it comes to the same again.
    """

    def go_back(state: TrainState) -> None:
        text = diagnosis_of(run, state)
        if run.runtime.is_main:
            write_diagnosis(run, state, prepared)
        text += f"\n{what_to_do(run)}; the rows of the skipped steps are in {diagnosis_path(run)}"
        first_bad = state.step - state.skipped_in_a_row + 1
        manager.finish()
        checkpoint = by_main(run.runtime, lambda: checkpoint_before(run, state, manager, first_bad))
        if isinstance(checkpoint, str):
            raise TrainingError(f"{text}. {checkpoint}" if checkpoint else text)
        log.warning("%s", text)
        last_bad = state.step
        put_back(run, state, checkpoint)
        manager.set_aside_after(state.step) if run.runtime.is_main else None
        run.metrics.log({"step": state.step, "went_back_from": last_bad, "num_rollbacks": state.num_rollbacks})
        run.metrics.go_back_to(state.step)
        restart_batches(state)
        log.warning("Went back to step %d; steps %s of the row order are left out", state.step, state.left_out)

    return go_back


def checkpoint_before(run: Run, state: TrainState, manager: CheckpointManager, first_bad: int) -> Path | str:
    """The checkpoint to go back to, or why there is none; empty where none is wanted."""
    train = run.config.train
    if train.on_divergence == "stop":
        return ""
    if state.num_rollbacks >= train.max_rollbacks:
        return (
            f"The run has gone back {state.num_rollbacks} times already (train.max_rollbacks = {train.max_rollbacks})"
        )
    path = manager.latest(before_step=first_bad)
    return path or f"{manager.folder} holds no checkpoint of a step before {first_bad} to go back to"


def put_back(run: Run, state: TrainState, checkpoint: Path) -> None:
    """Weights, optimizer, generators and `state` as the checkpoint has them, the rows of the bad steps left out."""
    first_bad = data_step(state.step - state.skipped_in_a_row + 1, state.left_out)
    bad = [first_bad, data_step(state.step, state.left_out)]
    run.engine.load_model(lambda tensors: read_into(checkpoint, "model", tensors))
    restored = restore(checkpoint, read_json(checkpoint / FACTS_NAME), run.engine, run.runtime)
    restored.num_rollbacks = state.num_rollbacks + 1
    restored.left_out = merged([*state.left_out, bad])
    # Their rows are no longer those of the same steps.
    run.last_steps.clear()
    # In place: status.json and the watch over the processes follow this object.
    vars(state).update(vars(restored))


def what_to_do(run: Run) -> str:
    return advice(list(run.last_steps), run.config.optimizer.learning_rate, run.runtime.precision)


def diagnosis_path(run: Run) -> Path:
    return Path(run.config.run_dir) / DIAGNOSIS_NAME


def write_diagnosis(run: Run, state: TrainState, prepared: Prepared) -> None:
    """The last steps, and of the skipped ones the ids of their rows, which `lost.data` reads."""
    steps: list[dict[str, Any]] = []
    for facts in run.last_steps:
        steps.append(as_json(facts))
        if facts.fault:
            steps[-1]["rows"] = rows_of(run, prepared, data_step(facts.step, state.left_out))
    write_json_atomically(diagnosis_path(run), {"num_rollbacks": state.num_rollbacks, "steps": steps})


def rows_of(run: Run, prepared: Prepared, step: int) -> list[int]:
    """Ids of the rows that a step of the undisturbed order reads; empty for a stream, which has none."""
    if not isinstance(prepared.train, Mixture):
        return []
    size = run.config.train.global_batch_size
    return prepared.train.order(run.config.seed).rows(np.arange((step - 1) * size, step * size)).tolist()
