"""What a checkpoint costs: how long training waits for a save, how long the save takes, how long a resume takes."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lost.assemble.resume import restore
from lost.bench.fresh import meta_model_and_fill
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import Timing
from lost.checkpoint import CheckpointManager
from lost.checkpoint.io import read_json
from lost.checkpoint.manager import FACTS_NAME
from lost.checkpoint.shards import Groups, read_into
from lost.config.schema import AdamWConfig, BenchConfig, RuntimeConfig
from lost.train.engine import Engine, build_engine
from lost.train.runtime import Runtime, start_runtime
from lost.train.state import TrainState, snapshot

SAVE = "save"


def bench_checkpoint(config: BenchConfig) -> BenchResult:
    """Saves and loads weights and AdamW state of `model` in a folder beside `to`, or in the temporary folder.

    Each round: a save that training waits for; the same in the background, of which training waits for the copy; a
    resume, verified by its checksums.
    """
    runtime = start_runtime(RuntimeConfig(name="single", **vars(config.runtime)))
    engine = trained_engine(config, runtime)
    if config.to:
        Path(config.to).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.to or None) as folder:
        rounds = [one_round(Path(folder) / str(number), engine, runtime) for number in range(config.repeats)]
    arms = {
        name: Arm(Timing(values), sum(parameter.numel() for parameter in engine.model.parameters()), 0)
        for name, values in zip((SAVE, "save in background", "resume"), zip(*rounds, strict=True), strict=True)
    }
    tensors = [*engine.model_tensors().values(), *engine.optimizer_tensors().values()]
    size = sum(tensor.nbytes for tensor in tensors) / 2**20
    title = f"checkpoint of {config.model.name}, {size:.0f} MiB of weights and AdamW state: what training waits for"
    return BenchResult(config, title, 0, runtime.device, runtime.precision, torch.get_num_threads(), arms, base=SAVE)


def one_round(folder: Path, engine: Engine, runtime: Runtime) -> tuple[float, float, float]:
    """Seconds that training waits for a save, for a save in the background, and for a resume."""
    manager = CheckpointManager(folder, keep=1)

    def save(into: Callable[[int, Groups, dict], object]) -> None:
        tensors, facts = snapshot(engine, TrainState(step=1), runtime)
        into(1, tensors, facts)

    saved = seconds_of(lambda: save(manager.save))
    copied = seconds_of(lambda: save(manager.save_in_background))
    manager.finish()
    resumed = seconds_of(lambda: resume(folder, engine, runtime))
    shutil.rmtree(folder)
    return saved, copied, resumed


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def trained_engine(config: BenchConfig, runtime: Runtime) -> Engine:
    """A model after one update, so that its optimizer has state."""
    model, fill = meta_model_and_fill(config, runtime)
    engine = build_engine(model, RuntimeConfig(), AdamWConfig(learning_rate=1e-4), runtime, fill)
    for parameter in engine.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    engine.step()
    engine.zero_grad()
    return engine


def resume(folder: Path, engine: Engine, runtime: Runtime) -> None:
    """What a resumed run does with its newest checkpoint."""
    path = CheckpointManager(folder).resolve("must")
    assert path is not None
    engine.load_model(lambda tensors: read_into(path, "model", tensors))
    restore(path, read_json(path / FACTS_NAME), engine, runtime)
