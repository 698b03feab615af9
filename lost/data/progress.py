"""Preparing as a person sees it: a bar on a terminal, a plain line now and then in a log file."""

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lost.data.report import PrepareReport, Progress
from lost.utils.logging import console as shared_console

_STAGES = {"tokenizer": "reading for the tokenizer", "rows": "tokenising"}


class PreparationBar:
    """Shows how far preparing has come; its `show` is the progress callable of `prepare`.

    Args:
        is_main: whether this is process 0; others show nothing.
        every_seconds: least time between two plain lines.
        console: where to; default: standard error, shared with our log messages.
    """

    def __init__(self, *, is_main: bool = True, every_seconds: float = 5.0, console: Console | None = None):
        self.console = console or shared_console()
        self._is_main = is_main
        self._every_seconds = every_seconds
        self._last_line = time.monotonic()
        self._stage: tuple[str, str] | None = None
        self._stage_started = time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> "PreparationBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Shows one report of progress."""
        if not self._is_main:
            return
        if self._stage != (progress.stage, progress.corpus):
            self._begin(progress)
        if self._bar is not None:
            total = progress.size_bytes or None
            facts = self._facts(progress)
            self._bar.update(self._task, total=total, completed=progress.position_bytes, facts=facts)
        elif time.monotonic() - self._last_line >= self._every_seconds:
            self._last_line = time.monotonic()
            self.console.print(f"{self._title(progress)}: {self._facts(progress)}", markup=False)

    def _begin(self, progress: Progress) -> None:
        """Starts the clock of a stage and, on a terminal, its bar; the bar appears with the first work."""
        self._stage, self._stage_started = (progress.stage, progress.corpus), time.monotonic()
        # What was there when the clock started: finished shards of a preparation that goes on.
        self._first = progress
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=self.console,
                refresh_per_second=4,
            )
            self._bar.start()
        self._task = self._bar.add_task(self._title(progress), total=None, facts="")

    def _title(self, progress: Progress) -> str:
        return f"{_STAGES[progress.stage]} {progress.corpus}"

    def _facts(self, progress: Progress) -> str:
        seconds = max(1e-3, time.monotonic() - self._stage_started)
        megabytes_per_second = (progress.text_bytes - self._first.text_bytes) / 1e6 / seconds
        facts = [
            f"{progress.documents:,} documents",
            f"{progress.text_bytes / 1e6:,.1f} MB at {megabytes_per_second:.1f} MB/s",
        ]
        if progress.tokens:
            per_second = (progress.tokens - self._first.tokens) / seconds
            facts.append(f"{progress.tokens / 1e6:,.2f} M tokens at {per_second / 1e6:.2f} M/s")
        if progress.size_bytes and not self.console.is_terminal:
            facts.append(f"{100 * progress.position_bytes / progress.size_bytes:.0f} %")
        return " | ".join(facts)


def report_lines(report: PrepareReport) -> list[str]:
    """A PrepareReport in words, a line each."""
    lines = []
    for name, counts in report.sets.items():
        lines.append(
            f"{name}: {counts.documents:,} documents, {counts.text_bytes / 1e6:,.1f} MB of text,"
            f" {counts.tokens:,} tokens, {counts.rows:,} rows"
        )
        lines.append(f"  rows in {report.folders[name]}")
        if counts.empty_documents:
            lines.append(f"  {counts.empty_documents:,} empty documents, no row")
        if counts.truncated_documents:
            lines.append(
                f"  {counts.truncated_documents:,} documents longer than a row,"
                f" {counts.truncated_tokens:,} tokens cut off"
            )
        if counts.invalid_documents:
            lines.append(
                f"  {counts.invalid_documents:,} documents with invalid UTF-8, {counts.invalid_sequences:,} byte"
                f" sequences replaced, for instance in {', '.join(counts.invalid_files)}"
            )
    if report.tokens:
        lines.append(f"tokens per byte: {report.tokens / report.text_bytes:.3f}")
    lines.append(f"tokenizer: {report.tokenizer}")
    if report.tokenizer_sample_bytes:
        lines.append(f"  trained on {report.tokenizer_sample_bytes / 1e6:,.1f} MB of the training documents")
    if report.verified_bytes:
        lines.append(f"checksums compared: {report.verified_bytes / 1e6:,.1f} MB of rows are as they were written")
    if report.is_cached:
        lines.append(f"everything was in the cache ({report.seconds:.1f} s)")
    else:
        lines += _throughput_lines(report)
    return lines


def _throughput_lines(report: PrepareReport) -> list[str]:
    """How long it took and what came out a second, of what was made now."""
    processes = f"{report.num_processes} process{'es' if report.num_processes > 1 else ''}"
    parts = [f"{report.row_seconds:.1f} s rows"]
    if report.tokenizer_seconds:
        parts.insert(0, f"{report.tokenizer_seconds:.1f} s tokenizer")
    return [
        f"took {report.seconds:.1f} s on {processes} ({', '.join(parts)}):"
        f" {report.encoded_bytes / 1e6 / report.seconds:.2f} MB/s,"
        f" {report.encoded_tokens / report.seconds:,.0f} tokens/s"
    ]
