"""What a run reports: metrics.jsonl, wandb, a progress bar on a terminal or plain lines in a log file."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from lost.checkpoint import truncate_metrics
from lost.checkpoint.io import space_left
from lost.config.runtime import LoggingConfig
from lost.train.wandb_run import WandbRun, start_wandb
from lost.utils.errors import TrainingError
from lost.utils.logging import console as shared_console

METRICS_NAME = "metrics.jsonl"
# Characters beside the bar: step 12345/100000, loss, learning rate, tokens/s and time left.
_FACTS_WIDTH = 68


class MetricsLogger:
    """Appends lines to <run_dir>/metrics.jsonl and mirrors them to wandb; does nothing on other processes.

    After a resume call `lost.checkpoint.truncate_metrics` first.

    Args:
        run_dir: the run directory.
        config: the `logging` section; `name` decides about wandb.
        is_main: whether this is process 0.
        run_config: nested plain settings of the run, shown by wandb.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: LoggingConfig,
        is_main: bool = True,
        run_config: Mapping[str, Any] | None = None,
    ):
        self._file: TextIO | None = None
        self._wandb: WandbRun | None = None
        if is_main:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            self._file = (Path(run_dir) / METRICS_NAME).open("a", encoding="utf-8")
            self._wandb = start_wandb(Path(run_dir), config, run_config or {})

    def log(self, line: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
            line: plain values by name; must have `step`. A number that is not finite is written as null.
        Raises:
            TrainingError: the disk is full or gone.
        """
        if self._file is None:
            return
        assert isinstance(line.get("step"), int), line
        values = {key: _finite_or_none(value) for key, value in line.items()}
        # One write a line: a kill can tear the last line but never mix two.
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self._file.name} could not be written: {error}. {space_left(Path(self._file.name))}"
            ) from error
        if self._wandb is not None:
            self._wandb.log(values)

    def sync(self) -> None:
        """Waits until all lines are on the disk; call before saving a checkpoint, so that after a power cut no line is
        missing below the step where the run goes on."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def go_back_to(self, step: int) -> None:
        """Removes the lines after `step`, whose steps are trained again. wandb keeps its own and takes no others until
        the run has passed them."""
        if self._file is None:
            return
        path = Path(self._file.name)
        self._file.close()
        truncate_metrics(path, step)
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file and ends the wandb run; safe to call twice."""
        if self._file is not None:
            # A line that a full disk did not take was reported when it was written.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """Where a run stands: a bar on a terminal, else one plain line every `every_seconds`; only on process 0.

    Args:
        total_steps: steps of the whole run.
        first_step: steps already done (of a resumed run).
        is_main: whether this is process 0; others show nothing.
        every_seconds: least time between two plain lines; the first and the last step always get one.
        console: where to; default: standard error, shared with our log messages.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        is_main: bool = True,
        every_seconds: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.first_step = first_step
        self.is_main = is_main
        self.every_seconds = every_seconds
        self.console = console or shared_console()
        self._clock = clock
        self._started = clock()
        self._last_line: float | None = None
        self._bar = _rich_bar(self.console) if is_main and self.console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, facts="starting")

    def update(self, line: Mapping[str, Any]) -> None:
        """Shows a finished step.

        Args:
            line: the step's training line: step, loss (null or nan: a skipped step), learning_rate, tokens_per_second.
        """
        if not self.is_main:
            return
        step = line["step"]
        facts = (
            f"{_loss_words(line['loss'])} | lr {line['learning_rate']:.1e}"
            f" | {count_words(line['tokens_per_second'])} tok/s | {duration_words(self.seconds_left(step))} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif self._is_line_due(step):
            self._last_line = self._clock()
            self.console.print(f"step {step}/{self.total_steps} | {facts}", markup=False)

    def seconds_left(self, step: int) -> float:
        """Time to the last step at the mean speed of this process's steps so far."""
        done = step - self.first_step
        if done <= 0:
            return math.inf
        return (self._clock() - self._started) / done * (self.total_steps - step)

    def print(self, message: str) -> None:
        """A line of text above the bar, or just a line."""
        if self.is_main:
            self.console.print(message, markup=False)

    def close(self) -> None:
        """Leaves the bar as it stands; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        """Shows the bar and starts the clock of the time left."""
        self._started = self._clock()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_line_due(self, step: int) -> bool:
        is_time = self._last_line is None or self._clock() - self._last_line >= self.every_seconds
        return is_time or step == self.total_steps


def _rich_bar(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=min(40, max(5, console.width - _FACTS_WIDTH))),
        TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=4,
    )


def _loss_words(loss: float | None) -> str:
    return "skipped: loss or gradient not finite" if loss is None or not math.isfinite(loss) else f"loss {loss:.3f}"


def count_words(value: float) -> str:
    """A rate in few characters: 412, 4.1k, 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What would round to 1000 of the smaller unit is 1.0 of this one.
        if value >= 0.9995 * size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def duration_words(seconds: float) -> str:
    """A duration in its two largest units: 45s, 1m20s, 3h05m, 2d04h; "?" if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
