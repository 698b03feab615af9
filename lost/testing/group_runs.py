"""What forked processes of one group do for tests of ZeRO: `lost` commands, and steps of an engine."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor

from lost.config.model import LostConfig, ModelConfig
from lost.config.runtime import RuntimeConfig
from lost.config.training import AdamWConfig
from lost.model.build import build_meta_model, initialise, materialise
from lost.model.split import Processes, write
from lost.testing.runs import lost_here
from lost.testing.split_models import group
from lost.train import zero_setup
from lost.train.engine import Engine, build_engine
from lost.train.runtime import start_runtime
from lost.utils.tensors import whole_of

# A few layers whose sizes two processes do not divide.
MODEL = ModelConfig(
    name="tiny",
    vocab_size=67,
    hidden_size=24,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    lineage_rank=8,
)
FORM = LostConfig(lost_rank=5, density=0.1)


def carry_out(index: int, commands: list[list[str]]) -> list[int]:
    """Exit status of each command, which every process of the group calls as under a launcher."""
    statuses = []
    for command in commands:
        start_anew(index)
        statuses.append(lost_here(*command))
    return statuses


def start_anew(index: int) -> None:
    """What a launcher says, for a process that has no memory of an Accelerator before."""
    count = dist.get_world_size()
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    # FORK_LAUNCHED keeps accelerate from ending the group, which the next command needs, after a run.
    os.environ |= {name: str(value) for name, value in names.items()} | {"FORK_LAUNCHED": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    # Else zero3 would keep every parameter of so small a model whole.
    zero_setup.WHOLE_BELOW = 0


def make_engine(name: Any, precision: Any, processes: Processes) -> Engine:
    """An engine of the tiny model, whose first weights are the same everywhere."""

    def fill(net: Any) -> None:
        materialise(net, FORM, "cpu")
        initialise(net, FORM, 5, processes=processes)

    config = RuntimeConfig(name=name, device="cpu", precision=precision)
    runtime = start_runtime(config)
    net = build_meta_model(MODEL, FORM, dtype=runtime.param_dtype)
    return build_engine(net, config, AdamWConfig(learning_rate=0.01, weight_decay=0.1), runtime, fill)


def tokens(step: int, process: int, micro_step: int) -> Tensor:
    """Token ids [2, 9] of a micro-batch."""
    generator = torch.Generator().manual_seed(100 * step + 10 * process + micro_step)
    return torch.randint(MODEL.vocab_size, (2, 9), generator=generator)


def loss_of(engine: Engine, ids: Tensor) -> Tensor:
    with engine.runtime.autocast():
        return engine.wrapped(input_ids=ids, use_cache=False).logits.float().square().mean()


def steps_of_each(index: int, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """`steps_of` for pairs of runtime and precision."""
    return [steps_of(index, *case) for case in cases]


def steps_of(index: int, name: str, precision: str) -> dict[str, Any]:
    """Two updates with two steps between them that are not done: one process has a NaN; the loop does not want it.

    Then the first weights are put back. Returned: the first weights; norms before clipping; weights and moments after
    each step; how many elements of parameters are whole then; the first loss, and the same after all.
    """
    start_anew(index)
    engine = make_engine(name, precision, group(index))
    first = {key: whole_of(value).clone() for key, value in engine.model_tensors().items()}
    first_loss = loss_of(engine, tokens(9, 0, 0)).detach()
    norms, states, sizes = [], [], []
    for step, is_poisoned, is_wanted in ((1, False, True), (2, True, True), (3, False, False), (4, False, True)):
        for micro_step in range(2):
            with engine.accumulating(is_last=micro_step == 1):
                factor = float("nan") if is_poisoned and index == 1 else 1.0
                engine.backward(loss_of(engine, tokens(step, index, micro_step)) * factor)
        norms.append(engine.clip_gradients(0.01))
        if is_wanted and not is_poisoned:
            engine.step()
        engine.zero_grad()
        sizes.append(sum(parameter.numel() for parameter in engine.model.parameters()))
        states.append(state_of(engine))
    engine.load_model(lambda tensors: put_in(tensors, first))
    return {
        "first": first,
        "norms": norms,
        "states": states,
        "whole_sizes": sizes,
        "losses": [first_loss, loss_of(engine, tokens(9, 0, 0)).detach()],
    }


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Weights and moments, gathered, with memory of their own."""
    named = {"model": engine.model_tensors(), "optimizer": engine.optimizer_tensors()}
    return {f"{kind}/{key}": whole_of(value).clone() for kind, part in named.items() for key, value in part.items()}


def put_in(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        write(tensor, values[name])
