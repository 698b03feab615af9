"""Who has stopped answering: the processes of a run tell each other their steps, beside the collectives of training.

A collective that fails or hangs does not say which process is missing. So every process writes its step into the
group's key-value store now and then, from a thread that goes on while training waits; whose entry stands still is gone.
"""

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from lost.train.state import TrainState
from lost.utils.errors import LostProcessError

# gloo's and NCCL's failures are plain RuntimeErrors where they come out of a backward pass.
_OF_THE_GROUP = re.compile(r"gloo|nccl|connection (closed|reset)|timed out waiting", re.IGNORECASE)
# Processes named one by one in a message.
_MAX_NAMED = 8
# In the place of the beat: a process that has seen the failure itself and is ending.
_GAVE_UP = "gave_up"

# process -> (step, beat)
Entries = dict[int, tuple[str, str]]


class Watch:
    """Writes this process's step while entered, and says how far the others are.

    Args:
        state: its step is written.
        process_index: of this process.
        timeout_seconds: after which waiting for the others is an error.
        on_stuck: called from another thread with a message, once a step, shortly before the time is over: training
            itself may never get to say it, since NCCL ends the process.
        beat_seconds: between two entries.
    """

    def __init__(
        self,
        state: TrainState,
        process_index: int,
        timeout_seconds: float,
        on_stuck: Callable[[str], None],
        beat_seconds: float = 2.0,
    ):
        self._state = state
        self._index = process_index
        self._count = dist.get_world_size()
        self._timeout_seconds = timeout_seconds
        self._on_stuck = on_stuck
        self._beat_seconds = min(beat_seconds, timeout_seconds / 5)
        store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateImportUsage]
        # One connection a thread: the store's own has a lock that a waiting call would keep.
        self._store = dist.PrefixStore("lost_steps", store.clone())  # pyright: ignore
        self._ended = threading.Event()
        self._gave_up = threading.Event()
        self._moved_at = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # A thread that still lets go of tensors and process groups while the interpreter ends aborts the process. Not
        # for ever: the store may have died with its machine.
        self._thread.join(5)

    def touch(self) -> None:
        """Says that what takes long now (an evaluation) is no hanging step."""
        self._moved_at = time.monotonic()

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Turns a failure of the process group into a message with the step and the missing processes.

        Raises:
            LostProcessError: in place of what the failed collective raised.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _OF_THE_GROUP.search(str(error)):
                raise
            self._gave_up.set()
            with suppress(RuntimeError):
                self._write(0)
            raise LostProcessError(
                f"process {self._index} lost the others in step {self._state.step}: {self._others()}. What failed:"
                f" {_short(error)}. The same command goes on from the last checkpoint;"
                f" runtime.timeout_seconds = {self._timeout_seconds:g} is how long processes wait for each other"
            ) from error

    def _beat(self) -> None:
        last_step, warned_step = -1, -1
        for beat in itertools.count():
            step = self._state.step
            try:
                self._write(beat)
            except RuntimeError:
                # The store is gone with the machine that held it; the next collective says so.
                return
            if step != last_step:
                last_step = step
                self.touch()
            if time.monotonic() - self._moved_at > 0.9 * self._timeout_seconds and step != warned_step:
                warned_step = step
                # Not from here: asking the others takes longer than a beat.
                threading.Thread(target=self._warn, name="watch", daemon=True).start()
            if self._ended.wait(self._beat_seconds):
                return

    def _warn(self) -> None:
        waited = time.monotonic() - self._moved_at
        self._on_stuck(
            f"process {self._index} has been in step {self._state.step} for {waited:.0f} s: {self._others()}."
            f" runtime.timeout_seconds = {self._timeout_seconds:g} is near"
        )

    def _write(self, beat: int) -> None:
        word = _GAVE_UP if self._gave_up.is_set() else beat
        self._store.set(f"process_{self._index}", f"{self._state.step} {word}")

    def _others(self) -> str:
        """The other processes in words: which are silent, and which are at another step."""
        answers: list[Entries] = []

        def listen() -> None:
            answers.append(self._entries())
            time.sleep(2.5 * self._beat_seconds)
            answers.append(self._entries())

        # The store may have died with its machine; then an answer may never come.
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        listener.join(2.5 * self._beat_seconds + 5)
        if len(answers) < 2 or not answers[1]:
            return "nothing is known of them, for the store that they share does not answer"
        return words_about_others(*answers, own=self._index, count=self._count, own_step=self._state.step)

    def _entries(self) -> Entries:
        """What every process wrote last; without those that wrote nothing yet."""
        try:
            there = [index for index in range(self._count) if self._store.check([f"process_{index}"])]
            values = [self._store.get(f"process_{index}").decode().split() for index in there]
        except RuntimeError:
            return {}
        return {index: (step, beat) for index, (step, beat) in zip(there, values, strict=True)}


def _short(error: BaseException) -> str:
    """The first line of a failure, without the place in the source of gloo and its advice."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S+\] ", "", line).split(". This is typically")[0]


def words_about_others(before: Entries, after: Entries, *, own: int, count: int, own_step: int) -> str:
    """What two readings of the entries, some beats apart, say about the processes other than `own`."""
    others = [index for index in range(count) if index != own]
    missing = [index for index in others if index not in after]
    there = [index for index in others if index in after]
    silent = [index for index in there if after[index][1] != _GAVE_UP and before.get(index) == after[index]]
    away = [index for index in there if index not in silent and int(after[index][0]) != own_step]
    facts = [f"process {index} never began" for index in missing]
    facts += [f"process {index} is silent since step {after[index][0]}" for index in silent]
    facts += [f"process {index} is at step {after[index][0]}" for index in away]
    more = [f"and {len(facts) - _MAX_NAMED} more are missing"] if len(facts) > _MAX_NAMED else []
    return ", ".join(facts[:_MAX_NAMED] + more) or "all of them are alive and in the same step"
