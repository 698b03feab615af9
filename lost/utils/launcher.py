"""What a process that torchrun started knows of torchrun, its parent."""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 1.0


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def tied_to_launcher() -> Iterator[None]:
    """Ends this process with exit status 1 as soon as the torchrun that started it is gone; alone it does nothing.

    A torchrun that is killed leaves its processes behind. They would train on without a restart after a failure, and
    keep the run's lock from the next start of the same command.
    """
    if not is_under_torchrun():
        yield
        return
    # The parent's number changes when it ends. Asking for it works everywhere; Linux could send a signal (prctl), but
    # does so when the thread ends that started the process, not the launcher.
    launcher = os.getppid()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if os.getppid() != launcher:
                _end_now(launcher)

    thread = threading.Thread(target=watch, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _end_now(launcher: int) -> None:
    """Without saving: the next start shall not wait, and what a kill loses is lost already."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        message = (
            f"torchrun (process {launcher}) is gone, so its processes end too. The same command goes on from the last"
            " checkpoint\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
    os._exit(1)


def num_own_threads() -> int:
    """This process's share of the cores where torchrun has set OMP_NUM_THREADS=1 unasked, else 0.

    torchrun does so for several processes a node. Its environment at its own start tells it from a 1 that somebody
    chose; where that cannot be read (macOS) it counts as chosen.
    """
    if not is_under_torchrun() or os.environ.get("OMP_NUM_THREADS") != "1":
        return 0
    try:
        given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return 0
    if any(entry.startswith(b"OMP_NUM_THREADS=") for entry in given):
        return 0
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
