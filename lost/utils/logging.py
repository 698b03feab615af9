"""Messages to people: rich on a terminal, plain lines in a file, one console for messages and progress bars."""

import functools
import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

_ROOT = "lost"


@functools.cache
def console() -> Console:
    """The console of this process, on standard error: results go to standard output.

    Progress bars and messages share it, so that messages appear above the bar and do not break it.
    """
    return Console(stderr=True, highlight=False, soft_wrap=True)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of ours (pass `__name__`)."""
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")


def setup(is_main: bool = True) -> None:
    """Sends our messages to the console; processes other than the main one only say warnings. Safe to call twice."""
    logger = logging.getLogger(_ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(_rich_handler() if console().is_terminal else _plain_handler())
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    logger.propagate = False


def _rich_handler() -> logging.Handler:
    return RichHandler(console=console(), show_path=False, show_time=False, omit_repeated_times=False)


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler
