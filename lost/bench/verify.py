"""No wrong kernel is timed: operators against their definition in float64, on random inputs, before a clock runs."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lost_kernels.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from lost_kernels.lost_linear import reference_lost_linear
from torch import Tensor, nn

from lost.model.blocks import outputs_of
from lost.model.lost_linear import LostLinear
from lost.utils.errors import TrainingError

# Relative RMS error against the definition, by precision; the tests are stricter (lost.testing.numerics).
LARGEST_ERROR = {"fp32": 2e-5, "bf16": 3e-2, "pure_bf16": 3e-2}
NUM_TOKENS = 65


def verify_blocks(blocks: Iterable[Any], precision: str) -> None:
    """The LOST layers of one block of every backend, those that read one input together.

    Raises:
        TrainingError: an output or a gradient is not what the definition gives.
    """
    by_kernels = {}
    for block in blocks:
        attention, mlp = block.self_attn, block.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        groups = [group for group in groups if all(isinstance(layer, LostLinear) for layer in group)]
        if groups:
            by_kernels.setdefault(groups[0][0].kernels, groups)
    for groups in by_kernels.values():
        for group in groups:
            verify_layers(group, precision)


def verify_layers(layers: Sequence[LostLinear], precision: str) -> None:
    """Layers that read one input, with random weights of an ordinary scale: fresh ones hide the kept channels.

    Raises:
        TrainingError: as `verify_blocks`.
    """
    ours = [with_random_weights(layer) for layer in layers]
    theirs = [copy.deepcopy(layer).double() for layer in ours]
    weight = ours[0].low_rank_down
    x = torch.randn(NUM_TOKENS, ours[0].in_features, device=weight.device, dtype=weight.dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    with autocast_of(precision, weight.device):
        ys = outputs_of(ours, x)
    exact_ys = [
        reference_lost_linear(
            exact_x, *layer.weights[:5], layer.activation, layer.bias, selection_axis=layer.selection_axis
        )
        for layer in theirs
    ]
    dys = [torch.randn_like(y) for y in ys]
    found = torch.autograd.grad(ys, [x, *parameters_of(ours)], dys)
    exact = torch.autograd.grad(exact_ys, [exact_x, *parameters_of(theirs)], [dy.double() for dy in dys])
    what = f"the operators of a LOST layer, kernels = {layers[0].kernels},"
    refuse_errors(what, [*ys, *found], [*exact_ys, *exact], precision)


def verify_loss(head: nn.Linear, precision: str) -> None:
    """The chunked loss with a head of these sizes, in more than one chunk.

    Raises:
        TrainingError: as `verify_blocks`.
    """
    sizes: dict[str, Any] = {"device": head.weight.device, "dtype": head.weight.dtype}
    weight = (torch.randn(head.weight.shape, **sizes) / math.sqrt(head.in_features)).requires_grad_()
    hidden = torch.randn(NUM_TOKENS, head.in_features, **sizes, requires_grad=True)
    targets = torch.randint(head.out_features, (NUM_TOKENS,)).to(weight.device)
    targets[::7] = -100
    with autocast_of(precision, weight.device):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=NUM_TOKENS // 2)
    inputs = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    exact_loss = reference_linear_cross_entropy(inputs[0], inputs[1], targets)
    found = [loss, *torch.autograd.grad(loss, [hidden, weight])]
    exact = [exact_loss, *torch.autograd.grad(exact_loss, inputs)]
    refuse_errors("the operators of the loss", found, exact, precision)


def autocast_of(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def with_random_weights(layer: LostLinear) -> LostLinear:
    layer = copy.deepcopy(layer)
    for name, parameter in layer.named_parameters():
        if name != "gamma":
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    return layer


def parameters_of(layers: Sequence[LostLinear]) -> list[Tensor]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def refuse_errors(what: str, found: Sequence[Tensor], exact: Sequence[Tensor], precision: str) -> None:
    for value, right in zip(found, exact, strict=True):
        error = ((value.double() - right).norm() / right.norm()).item()
        # Written so that nan is refused too.
        if not error <= LARGEST_ERROR[precision]:
            raise TrainingError(
                f"{what} are off by {error:.1e} of the definition's values (limit {LARGEST_ERROR[precision]:.0e}):"
                " nothing was timed; run the tests, tests/numerics"
            )
