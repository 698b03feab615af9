"""Being asked to stop: a signal or the wall-clock limit. The loop finishes its step, saves and leaves."""

import os
import signal
import time
from types import FrameType

# SLURM's early warning is SIGUSR1 where the job asks for it (--signal=USR1@120).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Watches signals (while entered) and the limit of train.max_hours.

    Args:
        max_hours: wall-clock limit from now, in hours; 0 = none.
        is_main: whether this process says that it was asked.
    """

    def __init__(self, max_hours: float = 0.0, is_main: bool = False):
        self._is_main = is_main
        self.signal_name = ""
        self.max_hours = max_hours
        # Of all processes, as the loop's last reduction saw it.
        self.num_signalled = 0
        self._deadline = time.monotonic() + max_hours * 3600 if max_hours else float("inf")
        self._previous: dict[signal.Signals, object] = {}

    @property
    def is_requested(self) -> bool:
        return bool(self.signal_name) or time.monotonic() >= self._deadline

    @property
    def is_by_signal(self) -> bool:
        """Whether any process of the run was signalled."""
        return bool(self.signal_name) or self.num_signalled > 0

    @property
    def reason(self) -> str:
        """Why, in words; of another process where this one was not asked."""
        if self.signal_name:
            return f"received {self.signal_name}"
        if time.monotonic() >= self._deadline:
            return f"train.max_hours = {self.max_hours:g} reached"
        return "another process was asked to stop"

    def __enter__(self) -> "StopRequest":
        for stop_signal in STOP_SIGNALS:
            self._previous[stop_signal] = signal.signal(stop_signal, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for stop_signal, handler in self._previous.items():
            signal.signal(stop_signal, handler)  # pyright: ignore[reportArgumentType]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # A second Ctrl-C means now.
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._is_main and not self.signal_name:
            # Not print: a signal may arrive in the middle of one.
            os.write(2, b"\nstopping: finishing this step and saving (Ctrl-C again stops at once)\n")
        self.signal_name = signal.Signals(number).name
