"""Batches of training steps: the only state is the step."""

import signal
from collections.abc import Generator, Iterator
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lost.data.rows import Batch, Mixture
from lost.data.stream import StreamBatches, TokenStream
from lost.utils.errors import ConfigError


def train_batches(
    train: Mixture | TokenStream,
    *,
    seed: int,
    first_step: int,
    global_batch_size: int,
    micro_batch_size: int,
    process_index: int,
    num_processes: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[list[Batch], None, None]:
    """The micro-batches of this process, step after step, without end; close() it to end the reading processes.

    Step s reads places [(s - 1) * G, s * G) of the endless order; micro-step m of process p reads the
    `micro_batch_size` places from (s - 1) * G + (m * num_processes + p) * micro_batch_size. So several processes
    together read what one process with as many times larger micro-batches reads, and a resumed run needs the step only.
    A TokenStream is read as it comes instead: each process its own part, from the beginning of a shuffle of the step's.

    Args:
        first_step: the first step wanted, 1-based.
        num_workers: processes that read ahead; the batches are the same at any number (but those of a TokenStream).
        pin_memory: page-locked tensors, for non-blocking copies to a GPU.
    Raises:
        ConfigError: global_batch_size is no multiple of micro_batch_size x num_processes.
    """
    if global_batch_size % (micro_batch_size * num_processes):
        raise ConfigError(
            f"global_batch_size = {global_batch_size} is not divisible by micro_batch_size x processes ="
            f" {micro_batch_size} x {num_processes}: choose sizes that are"
        )
    num_micro_steps = global_batch_size // (micro_batch_size * num_processes)
    if isinstance(train, TokenStream):
        dataset = StreamBatches(
            train,
            seed=seed,
            first_step=first_step,
            micro_batch_size=micro_batch_size,
            process_index=process_index,
            num_processes=num_processes,
        )
        sampler = None
    else:
        dataset = _MicroBatches(train, seed, micro_batch_size, process_index, num_processes)
        sampler = _From((first_step - 1) * num_micro_steps)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own generator: the default one would draw from torch's global random numbers at every start.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_signals_to_the_loop,
    )
    return _steps(iter(loader), num_micro_steps)


def _leave_signals_to_the_loop(_: int) -> None:
    """Launchers signal the whole process group; the readers must live until the loop has finished its step."""
    for stop_signal in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop_signal, signal.SIG_IGN)


def _steps(micro_batches: Iterator[Batch], num_micro_steps: int) -> Generator[list[Batch], None, None]:
    # The only reference to the loader's iterator is in this frame: closing the generator ends its processes.
    while True:
        yield [next(micro_batches) for _ in range(num_micro_steps)]


class _MicroBatches(Dataset):
    """Item i: this process's i-th micro-batch since the beginning of training."""

    def __init__(self, train: Mixture, seed: int, micro_batch_size: int, process_index: int, num_processes: int):
        self._train = train
        self._order = train.order(seed)
        self._micro_batch_size = micro_batch_size
        self._process_index = process_index
        self._num_processes = num_processes

    def __getitem__(self, index: int) -> Batch:
        first = (index * self._num_processes + self._process_index) * self._micro_batch_size
        return self._train.read(self._order.rows(np.arange(first, first + self._micro_batch_size)))


class _From(Sampler[int]):
    """first, first + 1, ... without end."""

    def __init__(self, first: int):
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return count(self._first)
