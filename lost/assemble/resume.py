"""Whether a run directory holds this run already, and the checkpoint to go on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate.utils import broadcast_object_list

from lost.checkpoint import CheckpointManager, check_same, differences, fixed_keys, read_status
from lost.checkpoint.io import read_json
from lost.checkpoint.manager import FACTS_NAME
from lost.checkpoint.shards import read_into, read_whole, stored_tensors
from lost.config.finetune import FinetuneConfig
from lost.config.schema import PretrainConfig
from lost.config.section import leaves, to_dict
from lost.data import Prepared
from lost.train.engine import Engine
from lost.train.runtime import Runtime
from lost.train.state import TrainState, restore_rng
from lost.utils.errors import CheckpointError, LostError
from lost.utils.logging import get_logger

log = get_logger(__name__)

Result = TypeVar("Result")
RunConfig = PretrainConfig | FinetuneConfig
# Settings that do not change what a finished run came to.
WITHOUT_EFFECT_ON_RESULTS = (
    *("logging.", "checkpoint.", "runtime.", "run_dir", "data.cache_dir", "data.num_workers", "data.num_processes"),
    *(
        "train.micro_batch_size",
        "train.max_hours",
        "train.max_skipped_steps",
        "train.max_rollbacks",
        "evaluation.micro_batch_size",
    ),
)


def stored_config(run_dir: Path) -> dict[str, Any] | None:
    """The settings of the run that run_dir holds; None where it holds neither a checkpoint nor a final model."""
    path = run_dir / "config.yaml"
    has_results = (run_dir / "final").is_dir() or CheckpointManager(run_dir / "checkpoints").complete()
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() and has_results else None


def is_finished(config: RunConfig, run_dir: Path, stored: dict[str, Any]) -> bool:
    """Whether run_dir holds this very run, done to the last step asked for.

    Raises:
        CheckpointError: it is done, but with other settings.
    """
    status = read_status(run_dir)
    if status is None or status["state"] != "finished":
        return False
    # A finished run says why, where it ended before its last step.
    is_done = status["step"] == config.train.num_steps or bool(status["reason"])
    if not is_done or config.checkpoint.resume not in ("auto", "must") or not (run_dir / "final").is_dir():
        return False
    keys = [key for key, _, _ in leaves(config) if not key.startswith(WITHOUT_EFFECT_ON_RESULTS)]
    # max_tokens and max_steps are two ways to say the number of steps, which was compared above.
    keys = [key for key in keys if key not in ("train.max_steps", "train.max_tokens")]
    lines = differences(stored, to_dict(config), keys)
    if lines:
        listed = "\n".join(f"  - {line.replace(': checkpoint ', ': finished with ')}" for line in lines)
        raise CheckpointError(f"{run_dir} holds a finished run with other settings:\n{listed}\nChoose another run_dir")
    return True


def find_checkpoint(config: RunConfig, manager: CheckpointManager, runtime: Runtime) -> Path | None:
    """The checkpoint to go on from, the same on every process.

    Raises:
        CheckpointError: run_dir does not hold what checkpoint.resume asks for, or has a final model but no checkpoint.
    """

    def find() -> Path | None:
        manager.clean()
        found = manager.resolve(config.checkpoint.resume)
        if found is None and (Path(config.run_dir) / "final").is_dir():
            raise CheckpointError(
                f"{config.run_dir} holds a final model but no checkpoint to go on from, and starting anew would replace"
                f" it: start from its weights with source={config.run_dir} and another run_dir"
            )
        return found

    return by_main(runtime, find)


def by_main(runtime: Runtime, action: Callable[[], Result]) -> Result:
    """What `action` returns on process 0, on every process.

    Raises:
        CheckpointError: where it is a mistake on process 0, on every process: none waits for one that has left.
    """
    if runtime.num_processes == 1:
        return action()
    answer: list[Any] = [None, ""]
    failure = None
    if runtime.is_main:
        try:
            answer[0] = action()
        except LostError as error:
            failure, answer[1] = error, str(error)
    result, problem = broadcast_object_list(answer)
    if problem:
        raise failure or CheckpointError(problem)
    return result


def check_checkpoint(path: Path, config: RunConfig, prepared: Prepared, runtime: Runtime) -> dict[str, Any]:
    """The facts of a checkpoint that process 0 has verified.

    Raises:
        CheckpointError: it was made with other settings, precision or data, or lies after the last step.
    """
    facts = read_json(path / FACTS_NAME)
    check_same(facts["config"], to_dict(config), fixed_keys(config), path)
    if facts["precision"] != runtime.precision:
        raise CheckpointError(
            f"{path} was trained in {facts['precision']}, and this run would go on in {runtime.precision}: set"
            f" runtime.precision={facts['precision']}"
        )
    refuse_other_data(path, facts, config, prepared)
    step = facts["counters"]["step"]
    if step > config.train.num_steps:
        raise CheckpointError(
            f"{path} is after step {step}, and train.max_steps or max_tokens ends the run at step"
            f" {config.train.num_steps}: raise it, or choose another run_dir"
        )
    return facts


def check_data(run_dir: Path, config: RunConfig, prepared: Prepared) -> None:
    """Refuses data that a finished run was not trained on.

    Raises:
        CheckpointError: other rows; not where the checkpoints of the run are gone.
    """
    newest = CheckpointManager(run_dir / "checkpoints").latest()
    if newest is not None:
        refuse_other_data(newest, read_json(newest / FACTS_NAME), config, prepared)


def refuse_other_data(path: Path, facts: dict[str, Any], config: RunConfig, prepared: Prepared) -> None:
    if facts["data_fingerprint"] != prepared.fingerprint:
        raise CheckpointError(
            f"{path} was trained on other data: its rows have the fingerprint {facts['data_fingerprint']}, those of"
            f" {data_words(config)} now {prepared.fingerprint}. Bring the old data (for stdlib: the old"
            " Python version) back, or start a new run from its weights: source=<run_dir> run_dir=<new folder>"
        )


def log_changes(path: Path, facts: dict[str, Any], config: RunConfig) -> None:
    """Says which settings a run goes on with that its checkpoint was not made with."""
    for line in differences(facts["config"], to_dict(config), [key for key, _, _ in leaves(config)]):
        log.info("%s", line.replace(": checkpoint ", f": {path.name} was made with "))


def data_words(config: RunConfig) -> str:
    return f"data={to_dict(config.data)['name']}" if isinstance(config, PretrainConfig) else "the files of data"


def restore(path: Path, facts: dict[str, Any], engine: Engine, runtime: Runtime) -> TrainState:
    """Optimizer, random generators and counters of a checkpoint, whose weights the model has already.

    Raises:
        CheckpointError: the optimizer state does not fit the model.
    """
    names = {name.removeprefix("optimizer/") for name in stored_tensors(path) if name.startswith("optimizer/")}
    engine.load_optimizer(lambda tensors: read_into(path, "optimizer", tensors), names)
    restore_rng(read_whole(path, "rng", {}), runtime)
    return TrainState(**facts["counters"])
