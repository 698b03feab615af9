"""S3: one block, forward and backward, in every form, in turns."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpu_items.models import compile_blocks, lost_config, model_config, padded_config, random_model, with_arm
from gpu_items.timing import spread, times
from gpu_items.worker import Place
from lost.bench.limits import Machine, block_works
from lost.bench.timing import time_interleaved
from lost.config.model import DenseConfig, ModelConfig

# Of the same weights, operators against definition in bfloat16: y of a block.
LARGEST_ERROR = 3e-2
# Kept of an item's time for the timed rounds.
TIMED_SECONDS = 6.0
NUM_ROUNDS = 15
# Forward and backward passes of one timed call: the host runs ahead, as in training.
NUM_PASSES = 4


class Arm(NamedTuple):
    form: str
    kernels: str
    is_compiled: bool
    is_padded: bool = True


# Most decisive first: an arm that is not compiled in time is left out.
ARMS = {
    "LOST op, eager": Arm("lost", "auto", is_compiled=False),
    "dense, compiled": Arm("dense", "", is_compiled=True),
    "LOST op, compiled": Arm("lost", "auto", is_compiled=True),
    "LOST plain, compiled": Arm("lost", "reference", is_compiled=True),
    "LOST plain, eager": Arm("lost", "reference", is_compiled=False),
    "CoLA, compiled": Arm("cola", "", is_compiled=True),
    "SLTrain, eager": Arm("sltrain", "", is_compiled=False),
    "dense unpadded, compiled": Arm("dense", "", is_compiled=True, is_padded=False),
}
BASE = "dense, compiled"


def block_times(place: Place, size: str, rows: int, seq_len: int) -> Iterator[dict[str, Any]]:
    """Times of every arm over those of the compiled dense block; a LOST arm that is wrong is not timed."""
    model = model_config(size, num_hidden_layers=1, vocab_size=2)
    x = torch.randn(rows, seq_len, model.hidden_size, device=place.device, dtype=torch.bfloat16, requires_grad=True)
    d_y = torch.randn_like(x)
    calls: dict[str, Callable[[], Any]] = {}
    right = None
    for name, arm in ARMS.items():
        sizes = padded_config(model) if arm.is_padded and arm.form != "lost" else model
        if not arm.is_padded and padded_config(model) == model:
            continue
        if place.seconds_left() < TIMED_SECONDS:
            yield {"what": f"{name}: left out for lack of time"}
            continue
        block = block_of(arm, sizes, place, x)
        call = pass_of(block, x, d_y)
        y = call()
        if arm.form == "lost":
            # The same seed, so the same weights; the definition of the first one is what all must give.
            right = definition_of(arm, sizes, place, x) if right is None else right
            error = ((y.float() - right.float()).norm() / right.float().norm()).item()
            if not error <= LARGEST_ERROR:
                yield {"what": name, "status": "failed", "error": error, "limit": LARGEST_ERROR}
                continue
        calls[name] = call
    yield from timed(place, calls, model, rows * seq_len, seq_len)


def timed(
    place: Place, calls: dict[str, Callable[[], Any]], model: ModelConfig, num_tokens: int, seq_len: int
) -> Iterator[dict[str, Any]]:
    def several(call: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [call() for _ in range(NUM_PASSES)].clear()

    num_rounds = 3 if place.is_tiny else NUM_ROUNDS
    found = time_interleaved({name: several(call) for name, call in calls.items()}, num_rounds, place.device)
    base = found.get(BASE)
    for name, timing in found.items():
        seconds = [value / NUM_PASSES for value in timing.seconds]
        median, low, high = spread(seconds)
        row = {"what": name, **times((median, low, high)), "tokens_per_second": round(num_tokens / median)}
        if base:
            row["over_dense"] = float(f"{spread(list(base.ratios_to(timing)))[0]:.4g}")
        if place.machine:
            arm = ARMS[name]
            config = lost_config(model) if arm.form == "lost" else DenseConfig()
            sizes = padded_config(model) if arm.is_padded and arm.form != "lost" else model
            factor_rank = model.lineage_rank if arm.form == "cola" else 0
            least = Machine(*place.machine).least_seconds(
                block_works(sizes, config, num_tokens, seq_len, 2, factor_rank)
            )
            row["of_limit"] = round(least / median, 3)
        yield row


def block_of(arm: Arm, sizes: ModelConfig, place: Place, x: Tensor) -> nn.Module:
    net = random_model(arm.form, sizes, place)
    if arm.kernels:
        with_arm(net, arm.kernels, "none")
    if arm.is_compiled:
        compile_blocks(net, place)
    block = net.model.layers[0]
    block.angles = net.model.rotary_emb(x, torch.arange(x.shape[1], device=place.device)[None])
    return block


def definition_of(arm: Arm, sizes: ModelConfig, place: Place, x: Tensor) -> Tensor:
    block = block_of(arm._replace(kernels="reference", is_compiled=False), sizes, place, x)
    with torch.no_grad():
        return block(x, position_embeddings=block.angles, attention_mask=None)


def pass_of(block: Any, x: Tensor, d_y: Tensor) -> Callable[[], Tensor]:
    inputs = [x, *block.parameters()]

    def forward_and_backward() -> Tensor:
        y = block(x, position_embeddings=block.angles, attention_mask=None)
        torch.autograd.grad(y, inputs, d_y)
        return y.detach()

    return forward_and_backward
