"""Initial values that are computed once: each piece by one process, which gives it to the others."""

import heapq
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lost.model.workers import run_side_by_side
from lost.utils.errors import LostError


def _alone(tensor: Tensor, source: int) -> None:
    """The broadcast of a process that has no others."""


@dataclass(frozen=True)
class Processes:
    """This process among those that fill the same model.

    Attributes:
        index: of this process, from 0.
        count: how many there are.
        broadcast: (tensor, source) fills `tensor` in place with that of process `source`; every process calls it for
            the same tensors in the same order. Tensors are contiguous and lie on the device of the model.
    """

    index: int = 0
    count: int = 1
    broadcast: Callable[[Tensor, int], None] = _alone


@dataclass(frozen=True)
class Piece:
    """A module whose values are computed together.

    Attributes:
        module: its own parameters and buffers, not those of its children, get the values.
        cost: relative work of `compute`.
        compute: value of each of those tensors by name, full and on any device, whatever part of it is kept here.
        device: where the module keeps them.
    """

    module: nn.Module
    cost: int
    compute: Callable[[], dict[str, Tensor]]
    device: torch.device


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `module` itself by name."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


@torch.no_grad()
def write(tensor: Tensor, full: Tensor) -> None:
    """Copies `full` into a parameter or buffer; into a DTensor the part of it that this process keeps.

    Args:
        tensor: plain, or a DTensor of any placements; its local part may be empty.
        full: the whole value, of the same shape, any dtype and device, equal on every process.
    """
    if not isinstance(tensor, DTensor):
        tensor.copy_(full)
        return
    full = full.to(tensor.device, tensor.dtype)
    # Every process has the whole value already, so nothing is sent.
    kept = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(kept.to_local())


def deal(costs: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(piece, owner) for every piece, in the order in which they will be ready.

    The dearest piece first, each to the process with the least work so far: the same on every process.
    """
    work = [(0, owner) for owner in range(count)]
    ready = []
    for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
        done, owner = heapq.heappop(work)
        heapq.heappush(work, (done + costs[piece], owner))
        ready.append((done + costs[piece], owner, piece))
    return [(piece, owner) for _, owner, piece in sorted(ready)]


def shared_values(
    pieces: Sequence[Piece], processes: Processes, *, is_on_cpu: bool = True
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(number of the piece, its values) for every piece, the same on every process, in the order of `deal`.

    Each piece is computed by one process; each process computes as many pieces at a time as torch has threads, while
    it receives those of the others. So at most that many pieces and one more are held.

    Args:
        pieces: equal on every process but for the memory they lie in.
        processes: those that share the work.
        is_on_cpu: whether `compute` works on the CPU, where several at a time pay.

    Raises:
        LostError: a process could not compute a piece; every process raises, with that process's words.
    """
    order = deal([piece.cost for piece in pieces], processes.count)
    own_jobs = (partial(_computed, pieces[number]) for number, owner in order if owner == processes.index)
    own: Generator = run_side_by_side(own_jobs) if is_on_cpu else (job() for job in own_jobs)
    # Whatever ends this early also ends the threads.
    with closing(own):
        for number, owner in order:
            values, error = {}, None
            if owner == processes.index:
                try:
                    values = next(own)
                # Whatever went wrong, the others wait for this piece.
                except Exception as caught:
                    error = caught
            _raise_together(error, owner, pieces[number].device, processes)
            yield number, _exchanged(pieces[number], values, owner, processes)


def _computed(piece: Piece) -> dict[str, Tensor]:
    """The values in the dtypes that the module has, in which they take less memory."""
    tensors, values = own_tensors(piece.module), piece.compute()
    assert values.keys() == tensors.keys(), f"{sorted(values)} for {sorted(tensors)}"
    return {name: values[name].to(tensor.dtype) for name, tensor in tensors.items()}


def _exchanged(piece: Piece, values: dict[str, Tensor], owner: int, processes: Processes) -> dict[str, Tensor]:
    if processes.count == 1:
        return values
    result = {}
    for name, tensor in own_tensors(piece.module).items():
        if owner == processes.index:
            full = values[name].to(piece.device).contiguous()
        else:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=piece.device)
        processes.broadcast(full, owner)
        result[name] = full
    return result


def _raise_together(error: Exception | None, owner: int, device: torch.device, processes: Processes) -> None:
    """Raises on every process if the owner has an error, so that none waits for values that will not come."""
    words = f"{type(error).__name__}: {error}".encode() if error else b""
    length = torch.tensor([len(words)], device=device)
    processes.broadcast(length, owner)
    num_bytes = int(length)
    if num_bytes == 0:
        return
    if error is None:
        sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    else:
        sent = torch.tensor(list(words), dtype=torch.uint8, device=device)
    processes.broadcast(sent, owner)
    if error is not None:
        raise error
    raise LostError(f"process {owner} could not compute initial values: {bytes(sent.tolist()).decode()}")
