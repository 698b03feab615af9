"""What a checkpoint costs: how long training waits for a save, what a save in the background costs it in all, how long
a resume takes."""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from lost.assemble.resume import restore
from lost.bench.fresh import meta_model_and_fill, num_rows_of, random_ids
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import Timing, time_interleaved
from lost.checkpoint import CheckpointManager
from lost.checkpoint.io import read_json
from lost.checkpoint.manager import FACTS_NAME
from lost.checkpoint.shards import Groups, read_into
from lost.config.runtime import CheckpointConfig, RuntimeConfig
from lost.config.schema import BenchConfig
from lost.config.training import AdamWConfig
from lost.train.engine import Engine, build_engine
from lost.train.runtime import Runtime, start_runtime
from lost.train.state import TrainState, snapshot

SAVE = "save"
# A window of training is so many times as long as a save that has the machine to itself: one beside training takes
# longer, and training need hardly wait for its end.
WINDOW_OVER_SAVE = 3
EVERY_STEPS = CheckpointConfig().every_steps

SaveInto = Callable[[int, Groups, dict], object]


def bench_checkpoint(config: BenchConfig) -> BenchResult:
    """Saves and loads weights and AdamW state of `model` in a folder beside `to`, or in the temporary folder.

    Each round: a save that training waits for; the same in the background, of which training waits for the copy; a
    resume, verified by its checksums. Then in turns: training steps with a save in the background at their beginning,
    until it is written; the same steps without it.
    """
    runtime = start_runtime(RuntimeConfig(name="single", **vars(config.runtime)))
    model, fill = meta_model_and_fill(config, runtime)
    engine = build_engine(model, RuntimeConfig(), AdamWConfig(learning_rate=1e-4), runtime, fill)
    step = training_step(config, engine, runtime)
    # Now the optimizer has state to save.
    step()
    if config.to:
        Path(config.to).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.to or None) as folder:
        rounds = [one_round(Path(folder) / str(number), engine, runtime) for number in range(config.repeats)]
        names = (SAVE, "save in background", "resume")
        timings = {name: Timing(values) for name, values in zip(names, zip(*rounds, strict=True), strict=True)}
        num_steps = window_steps(timings[SAVE].median, step)
        windows = time_windows(Path(folder) / "windows", engine, runtime, step, num_steps, config.repeats)
    tensors = [*engine.model_tensors().values(), *engine.optimizer_tensors().values()]
    size = sum(tensor.nbytes for tensor in tensors) / 2**20
    overhead = overhead_of(windows, num_steps)
    num_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    return BenchResult(
        config,
        title=f"checkpoint of {config.model.name}, {size:.0f} MiB of weights and AdamW state: what training waits for",
        num_tokens=0,
        device=runtime.device,
        precision=runtime.precision,
        num_threads=torch.get_num_threads(),
        arms={name: Arm(timing, num_parameters, 0) for name, timing in (timings | windows).items()},
        base=SAVE,
        more_facts={"overhead": overhead},
        remark=(
            f"A save in the background costs training {overhead['seconds']:.2f} s in all (median of the rounds), copy"
            f" and slower steps included: {overhead['fraction']:.2%} of {EVERY_STEPS} steps of {num_rows_of(config)}"
            f" rows of {config.seq_len} tokens."
        ),
    )


def one_round(folder: Path, engine: Engine, runtime: Runtime) -> tuple[float, float, float]:
    """Seconds that training waits for a save, for a save in the background, and for a resume."""
    manager = CheckpointManager(folder, keep=1)
    saved = seconds_of(lambda: save(1, engine, runtime, manager.save))
    copied = seconds_of(lambda: save(1, engine, runtime, manager.save_in_background))
    manager.finish()
    resumed = seconds_of(lambda: resume(folder, engine, runtime))
    shutil.rmtree(folder)
    return saved, copied, resumed


def save(step: int, engine: Engine, runtime: Runtime, into: SaveInto) -> None:
    tensors, facts = snapshot(engine, TrainState(step=step), runtime)
    into(step, tensors, facts)


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def training_step(config: BenchConfig, engine: Engine, runtime: Runtime) -> Callable[[], None]:
    """A function that makes one update on random tokens."""
    ids = random_ids(config, runtime.device)

    def step() -> None:
        with engine.accumulating(is_last=True):
            with runtime.autocast():
                loss = engine.wrapped(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
        engine.clip_gradients(1.0)
        engine.step()
        engine.zero_grad()

    return step


def window_steps(save_seconds: float, step: Callable[[], None]) -> int:
    """Training steps that last WINDOW_OVER_SAVE saves, but no more than there are between two saves."""
    step_seconds = statistics.median(seconds_of(step) for _ in range(3))
    return min(EVERY_STEPS, math.ceil(WINDOW_OVER_SAVE * save_seconds / step_seconds))


def time_windows(
    folder: Path, engine: Engine, runtime: Runtime, step: Callable[[], None], num_steps: int, num_rounds: int
) -> dict[str, Timing]:
    """Times of `num_steps` training steps without a save and with one, in turns."""
    manager = CheckpointManager(folder, keep=1)
    numbers = count(1)

    def steps() -> None:
        for _ in range(num_steps):
            step()

    def steps_and_save() -> None:
        save(next(numbers), engine, runtime, manager.save_in_background)
        steps()
        manager.finish()

    arms = {f"{num_steps} steps": steps, f"{num_steps} steps and a save": steps_and_save}
    return time_interleaved(arms, num_rounds, runtime.device)


def overhead_of(windows: dict[str, Timing], num_steps: int) -> dict[str, Any]:
    """What a save adds to training: the median of the rounds' differences, and its share of EVERY_STEPS steps."""
    without, with_save = (timing.seconds for timing in windows.values())
    added = [longer - shorter for longer, shorter in zip(with_save, without, strict=True)]
    seconds = statistics.median(added)
    return {
        "seconds": seconds,
        "seconds_of_each_round": added,
        "fraction": seconds / (EVERY_STEPS * statistics.median(without) / num_steps),
        "every_steps": EVERY_STEPS,
        "window_steps": num_steps,
    }


def resume(folder: Path, engine: Engine, runtime: Runtime) -> None:
    """What a resumed run does with its newest checkpoint."""
    path = CheckpointManager(folder).resolve("must")
    assert path is not None
    engine.load_model(lambda tensors: read_into(path, "model", tensors))
    restore(path, read_json(path / FACTS_NAME), engine, runtime)
