"""Batches of pieces to token ids, in their order, on one or several processes.

One process reads and writes, the others only tokenise: so the rows are the same bit for bit at any number of them.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice

import numpy as np

from lost.data.files import Piece
from lost.data.tokenizer import Encoder
from lost.utils.errors import InterruptedDataError

# One process reads and writes for this many at most (it gets through about 20 times as much as one that tokenises).
_MAX_PROCESSES = 16
# Batches of a process that are under way: one in work, one waiting.
_BATCHES_AHEAD = 2

EncodedBatch = tuple[list[Piece], list[np.ndarray]]


def processes_to_use(setting: int) -> int:
    """data.num_processes, or for 0 one a core that this process may use."""
    if setting:
        return setting
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(num_cores, _MAX_PROCESSES)


def encode_in_order(
    batches: Iterable[list[Piece]], encoder: Encoder, num_processes: int
) -> Generator[EncodedBatch, None, None]:
    """Each batch with the ids of its pieces, in the order of the batches; bounded memory.

    Raises:
        InterruptedDataError: a process ended that should not.
    """
    batches = iter(batches)
    first = list(islice(batches, 2))
    if num_processes == 1 or len(first) < 2:
        with tokenizer_threads(1):
            for batch in chain(first, batches):
                yield batch, encoder.encode([piece.text for piece in batch])
        return
    with tokenizer_threads(1):
        pool = ProcessPoolExecutor(num_processes, initializer=_start_worker, initargs=(encoder,))
        try:
            yield from _encode_with(pool, chain(first, batches), num_processes * _BATCHES_AHEAD)
        except BrokenProcessPool as error:
            raise InterruptedDataError(
                "a process that tokenises was ended from outside, perhaps for want of memory: start again (finished"
                f" shards are kept), with data.num_processes below {num_processes} if it comes again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _encode_with(pool: ProcessPoolExecutor, batches: Iterable[list[Piece]], num_ahead: int) -> Iterator[EncodedBatch]:
    waiting: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode, [piece.text for piece in batch])))
        if len(waiting) >= num_ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # Ctrl-C is for the process that reads, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent leaves its workers waiting for work for ever, with its file lock in their hands."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return _worker_encoder.encode(texts)


@contextmanager
def tokenizer_threads(num_threads: int) -> Iterator[None]:
    """Lets the tokenizers library use this many threads; of more than one only its first number counts in a process."""
    wanted = {"TOKENIZERS_PARALLELISM": str(num_threads > 1).lower(), "RAYON_NUM_THREADS": str(num_threads)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
