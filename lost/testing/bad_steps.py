"""Runs that meet bad steps, and the same runs whose row order never held them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lost.assemble.pretrain
import lost.train.trainer
from lost.config.schema import PretrainConfig
from lost.data import Prepared, train_batches
from lost.testing.group_runs import start_anew
from lost.testing.runs import lost_here
from lost.train.runtime import Runtime


def batches_without(bad: set[int]) -> Any:
    """In the place of `batches_of`: the batches of an undisturbed run, some of whose steps are never read."""

    def batches(config: PretrainConfig, prepared: Prepared, runtime: Runtime, _: object) -> Iterator:
        every = train_batches(
            prepared.train,
            seed=config.seed,
            first_step=1,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            process_index=runtime.process_index,
            num_processes=runtime.num_processes,
        )
        yield from (batch for step, batch in enumerate(every, start=1) if step not in bad)

    return batches


def carry_out_both(index: int, commands: list[tuple[list[str], list[str]]], bad: set[int]) -> list[int]:
    """Exit statuses of pairs of commands on every process of a group: of the first the last process gets a NaN in the
    `bad` steps, the second never reads their rows."""
    statuses = []
    for with_bad, without in commands:
        start_anew(index)
        with _poisoned(bad if index else set()):
            statuses.append(lost_here(*with_bad))
        start_anew(index)
        with patch.object(lost.assemble.pretrain, "batches_of", batches_without(bad)):
            statuses.append(lost_here(*without))
    return statuses


@contextmanager
def _poisoned(bad: set[int]) -> Iterator[None]:
    """Makes NaN of the first micro-batch of the training steps `bad`, each counted as it comes."""
    forward, train_step = lost.train.trainer.forward_loss_sum, lost.train.trainer.train_step
    num_steps, is_first = 0, True

    def counted_step(*arguments: Any) -> Any:
        nonlocal num_steps, is_first
        num_steps, is_first = num_steps + 1, True
        return train_step(*arguments)

    def poisoned_forward(*arguments: Any) -> Any:
        nonlocal is_first
        factor = math.nan if is_first and num_steps in bad else 1.0
        is_first = False
        return forward(*arguments) * factor

    with (
        patch.object(lost.train.trainer, "train_step", counted_step),
        patch.object(lost.train.trainer, "forward_loss_sum", poisoned_forward),
    ):
        yield
