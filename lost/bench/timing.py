"""Times of several functions in one run: interleaved, so that a slow minute of the machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one arm, one value a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20 % and 80 % quantiles."""
        return quantiles(self.seconds)

    def ratios_to(self, base: "Timing") -> tuple[float, ...]:
        """Time of this arm over the base's in the same round."""
        return tuple(own / other for own, other in zip(self.seconds, base.seconds, strict=True))


def quantiles(values: tuple[float, ...]) -> tuple[float, float]:
    """The 20 % and 80 % quantiles."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], cuts[-1]


def time_interleaved(
    arms: dict[str, Callable[[], None]],
    num_rounds: int,
    device: torch.device,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Each round runs every arm once, each round starting with another arm.

    Args:
        arms: by name; what a call queues on the device belongs to its time.
        num_rounds: timed rounds, after 2 untimed ones.
        device: waited for before and after each call.
        on_round: called with the number of finished rounds, untimed ones included.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(NUM_WARMUP_ROUNDS + num_rounds):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            wait_for(device)
            start = time.perf_counter()
            arms[name]()
            wait_for(device)
            if round_index >= NUM_WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - start)
        if on_round:
            on_round(round_index + 1)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class SavedBytes:
    """Bytes of the tensors that autograd keeps for the backward pass, parameters and given inputs left out."""

    def __init__(self, not_counted: list[Tensor]):
        self._not_counted = {tensor.untyped_storage().data_ptr() for tensor in not_counted}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._not_counted:
            # Kept here, so that no later storage gets the address of a freed one.
            self._storages[storage.data_ptr()] = storage
        return tensor

    @contextmanager
    def counting(self) -> Iterator["SavedBytes"]:
        with torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor):
            yield self

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
