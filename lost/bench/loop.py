"""What the training loop itself costs: steps of a real `fit` against the work of model and optimizer within them."""

import json
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lost.accounting import flops_per_token
from lost.assemble.run import batches_of
from lost.bench.fresh import meta_model_and_fill, num_rows_of
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import NUM_WARMUP_ROUNDS, Timing, wait_for
from lost.config.data import TextFilesDataConfig
from lost.config.runtime import CheckpointConfig, LoggingConfig, RuntimeConfig, TrainEvaluationConfig
from lost.config.schema import BenchConfig, PretrainConfig
from lost.config.training import AdamWConfig, CosineScheduleConfig, TrainConfig
from lost.data import prepare
from lost.train.engine import Fill, TorchEngine, set_up_blocks
from lost.train.metrics import MetricsLogger, Progress
from lost.train.profile import StepProfiler
from lost.train.runtime import Runtime, start_runtime
from lost.train.state import TrainState
from lost.train.stop import StopRequest
from lost.train.trainer import Run, fit

# Forward, loss, backward and update, which the whole step is compared with.
WORK = "model"
NUM_DOCUMENTS = 500


class TimedEngine(TorchEngine):
    """Adds up the time from each forward to the end of its backward, and of the update; waits for the device."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.work_seconds: list[float] = []
        self.step_ends: list[float] = []
        self._seconds, self._started = 0.0, 0.0
        self.wrapped.register_forward_pre_hook(self._start)

    def _start(self, *_: object) -> None:
        wait_for(self.runtime.device)
        self._started = time.perf_counter()

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        wait_for(self.runtime.device)
        self._seconds += time.perf_counter() - self._started

    def step(self) -> None:
        self._start()
        super().step()
        wait_for(self.runtime.device)
        self._seconds += time.perf_counter() - self._started

    def zero_grad(self) -> None:
        super().zero_grad()
        self.step_ends.append(time.perf_counter())
        self.work_seconds.append(self._seconds)
        self._seconds = 0.0


def bench_loop(config: BenchConfig) -> BenchResult:
    """Steps of `fit` on num_tokens // seq_len rows that the data loader reads; nothing is evaluated or saved.

    Raises:
        ConfigError: a device or precision that is not there.
    """
    runtime = start_runtime(RuntimeConfig(name="single", **vars(config.runtime)))
    with tempfile.TemporaryDirectory() as folder:
        engine = timed_run(run_config(config, Path(folder)), runtime, *meta_model_and_fill(config, runtime))
    whole = [end - start for start, end in pairwise(engine.step_ends)][NUM_WARMUP_ROUNDS - 1 :]
    num_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    arms = {
        WORK: Arm(Timing(tuple(engine.work_seconds[NUM_WARMUP_ROUNDS:])), num_parameters, 0),
        "whole step": Arm(Timing(tuple(whole)), num_parameters, 0),
    }
    num_rows = num_rows_of(config)
    title = f"training loop of {config.model.name}: {num_rows} rows of {config.seq_len} tokens"
    num_tokens = num_rows * config.seq_len
    return BenchResult(
        config, title, num_tokens, runtime.device, runtime.precision, torch.get_num_threads(), arms, base=WORK
    )


def run_config(config: BenchConfig, folder: Path) -> PretrainConfig:
    """A run of `repeats` steps and the untimed ones, on made-up text."""
    num_rows = num_rows_of(config)
    return PretrainConfig(
        experiment="bench",
        model=config.model,
        parameterization=config.parameterization,
        data=TextFilesDataConfig(train_files=[str(write_words(folder))], cache_dir=str(folder / "cache")),
        train=TrainConfig(
            seq_len=config.seq_len,
            global_batch_size=num_rows,
            micro_batch_size=num_rows,
            max_steps=NUM_WARMUP_ROUNDS + config.repeats,
        ),
        optimizer=AdamWConfig(learning_rate=1e-4),
        schedule=CosineScheduleConfig(),
        runtime=RuntimeConfig(),
        checkpoint=CheckpointConfig(every_steps=0),
        evaluation=TrainEvaluationConfig(every_steps=0),
        logging=LoggingConfig(name="none"),
        run_dir=str(folder / "run"),
    )


def write_words(folder: Path) -> Path:
    """Documents of made-up words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9))) for _ in range(3000)]
    path = folder / "words.jsonl"
    documents = (" ".join(generator.choices(words, k=400)) for _ in range(NUM_DOCUMENTS))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def timed_run(config: PretrainConfig, runtime: Runtime, model: PreTrainedModel, fill: Fill) -> TimedEngine:
    """The engine after the run, with its times."""
    prepared = prepare(config.data, vocab_size=config.model.vocab_size, seq_len=config.train.seq_len)
    set_up_blocks(model, config.runtime, runtime)
    engine = TimedEngine(model, config.runtime, config.optimizer, runtime, fill)
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    batches = batches_of(config, prepared, runtime, TrainState())
    with MetricsLogger(run_dir, config.logging) as metrics, StopRequest(0) as stop:
        run = Run(
            config=config,
            runtime=runtime,
            engine=engine,
            batches=batches,
            metrics=metrics,
            progress=Progress(config.train.num_steps),
            stop=stop,
            profiler=StepProfiler(0, run_dir),
            flops_per_token=flops_per_token(config.model, config.parameterization, config.train.seq_len),
            peak_flops=runtime.peak_tflops(0) * 1e12,
        )
        fit(run, TrainState(), evaluate=dict, save=lambda _: None, save_final=lambda: None)
    batches.close()
    return engine
