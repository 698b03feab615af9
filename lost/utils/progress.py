"""A bar for work of known length: on a terminal only, so that log files stay readable."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lost.utils.logging import console


@contextmanager
def progress_bar(title: str, unit: str, *, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves the bar; the bar disappears at the end."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    is_disabled = not (is_shown and console().is_terminal)
    with Progress(*columns, console=console(), transient=True, disable=is_disabled) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
