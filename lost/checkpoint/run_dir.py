"""The run directory: one writer at a time, its status for schedulers, its metrics file after a resume."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any, Literal, get_args

from lost.checkpoint.io import read_json, replace, write_json_atomically, write_text_atomically
from lost.utils.errors import CheckpointError
from lost.utils.files import flush
from lost.utils.logging import get_logger

__all__ = [
    "RunLock",
    "RunState",
    "read_status",
    "truncate_metrics",
    "write_json_atomically",
    "write_status",
    "write_text_atomically",
]

logger = get_logger(__name__)

RunState = Literal["running", "finished", "preempted", "failed"]


class RunLock:
    """A context that holds <run_dir>/.lock; the operating system releases it when the process ends, however it ends.

    Raises:
        CheckpointError: another process holds it; the message names its process id and host.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock or raises at once; never waits."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"run_dir {self.path.parent} cannot be written: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise CheckpointError(
                    f"run_dir {self.path.parent} is in use by {holder}: wait for it, stop it, or choose another run_dir"
                ) from error
            # Some cluster file systems have no flock; refusing to train there would help nobody.
            logger.warning("%s cannot be locked here (%s): do not start a second run in this folder", self.path, error)
        text = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        self._descriptor = descriptor
        # A forked data worker that outlives a killed run must not keep the lock.
        reference: weakref.ref[RunLock] = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(reference))

    def release(self) -> None:
        """Gives the lock back; the file stays, because deleting it would let two processes lock two files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _close_in_child(reference: "weakref.ref[RunLock]") -> None:
    lock = reference()
    if lock is not None and lock._descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(lock._descriptor)
        lock._descriptor = None


def write_status(run_dir: str | Path, state: RunState, step: int, reason: str = "") -> None:
    """Replaces <run_dir>/status.json atomically.

    Args:
        run_dir: the run directory.
        state: running, finished, preempted (stopped early, can go on) or failed.
        step: optimizer steps done.
        reason: why it stopped, in words; empty while running.
    """
    assert state in get_args(RunState), state
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    status = {"state": state, "step": step, "reason": reason, "written_at": written}
    write_json_atomically(Path(run_dir) / "status.json", status)


def read_status(run_dir: str | Path) -> dict[str, Any] | None:
    """The contents of status.json (state, step, reason, written_at), or None if there is none."""
    path = Path(run_dir) / "status.json"
    return read_json(path) if path.is_file() else None


def truncate_metrics(path: str | Path, step: int) -> None:
    """Removes from a metrics file what a resume at `step` writes again, atomically.

    Keeps whole lines up to and including `step`, each (step, kind of line) once, and drops a torn last line. Two lines
    are of one kind if they have the same keys and the same text values. Step -1 empties the file (a start anew).
    """
    path = Path(path)
    if not path.is_file():
        return
    kept: dict[tuple, bytes] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        values = _parsed(line)
        if values is None:
            if line.strip():
                logger.warning("%s: line %d is torn and was dropped", path, number)
        elif values["step"] <= step:
            kept[_kind(values)] = line
    temporary = path.with_name(f".tmp_{path.name}")
    temporary.write_bytes(b"".join(line + b"\n" for line in kept.values()))
    flush(temporary)
    replace(temporary, path)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The line's values, or None if it is not a whole metrics line."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    has_step = isinstance(values, dict) and isinstance(values.get("step"), int)
    return values if has_step else None


def _kind(values: dict[str, Any]) -> tuple:
    texts = sorted((key, value) for key, value in values.items() if isinstance(value, str))
    return values["step"], tuple(sorted(values)), tuple(texts)
