"""S0: what the machine reaches, and layers and loss against their definition in float64."""

import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lost_kernels.lost_linear as layers
import torch
from lost_kernels import cross_entropy
from torch import Tensor

from gpu_items.plan import SIZES
from gpu_items.worker import Place
from lost.bench.machine import measure_machine

# Relative RMS error: above what rounding alone gives (2e-6 and 5e-3 on a CPU), below what a slip gives.
LARGEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# What is wrong where a value is: y comes out of the forward kernel and so on.
KERNEL_OF = {"y": "K1", "d low_rank_down": "K2", "d gamma": "K2", "d x": "K2 or K3"}


def machine(place: Place) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {"what": "versions", "python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            row[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            row[name] = "not installed"
    if place.is_cuda:
        properties = torch.cuda.get_device_properties(place.device)
        row |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    yield row | {"kernels": layers.kernels_for(place.device.type)}
    flops, copied = measure_machine(place.device, torch.bfloat16)
    is_right = math.isfinite(flops) and math.isfinite(copied)
    yield {
        "what": "large product in bfloat16, large copy",
        "status": "passed" if is_right else "failed",
        "tflops": float(f"{flops / 1e12:.4g}"),
        "gb_per_second": float(f"{copied / 1e9:.4g}"),
        "machine": (flops, copied),
    }


# ---------------------------------------------------------------------------------------------------- layers


def layer_errors(place: Place, dtype: str) -> Iterator[dict[str, Any]]:
    """Groups of layers: odd sizes, unequal members, biases and learned gammas; and a real shape.

    Few of them, for every rank is another kernel to compile; other sizes are checked where they are timed.
    """
    tokens, inputs = (63, 60) if place.is_tiny else (2049, 1000)
    wide, narrow = ((101, 16, 3), (37, 9, 5)) if place.is_tiny else ((1376, 250, 21), (999, 127, 9))
    given = group(tokens, inputs, [wide, wide, narrow], place, dtype, is_learned=True)
    yield compare("silu, learned gammas, biases, unequal members", given, "silu")
    if dtype == "float32":
        yield compare("identity", group(tokens, inputs, [narrow], place, dtype, is_learned=False), "identity")
    elif not place.is_tiny:
        yield size_errors(place, "llama_1b")


def size_errors(place: Place, size: str) -> dict[str, Any]:
    """q, k and v of one of SIZES in bfloat16."""
    hidden, rank = SIZES[size]["hidden_size"], SIZES[size]["lineage_rank"]
    members = [(hidden, rank, max(1, hidden // 100))] * 3
    num_tokens = 64 if place.is_tiny else 1024
    given = group(num_tokens, hidden, members, place, "bfloat16", is_learned=False)
    return compare(f"q, k, v of {size}", given, "silu")


Group = tuple[Tensor, list[layers.LostWeights], list[Tensor]]


def group(
    tokens: int, inputs: int, sizes: Sequence[tuple[int, int, int]], place: Place, dtype: str, *, is_learned: bool
) -> Group:
    """x, members of (out_features, rank, kept channels) and the outputs' gradients: weights of an ordinary scale."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])
        return values.to(place.device, getattr(torch, dtype)).requires_grad_()

    members = []
    for outputs, rank, kept in sizes:
        index = torch.randperm(inputs, generator=generator)[:kept].sort().values.to(place.device)
        gamma = torch.tensor([0.6], device=place.device).requires_grad_() if is_learned else 0.7
        bias = random(outputs) if is_learned else None
        members.append(
            layers.LostWeights(random(rank, inputs), random(outputs, rank), random(outputs, kept), index, gamma, bias)
        )
    x = (math.sqrt(inputs) * random(tokens, inputs)).detach().requires_grad_()
    return x, members, [random(tokens, outputs).detach() for outputs, _, _ in sizes]


def compare(what: str, given: Group, activation: str) -> dict[str, Any]:
    """Errors of outputs and all gradients of what `auto` chooses, each over all members."""
    x, members, dys = given
    kernels = layers.kernels_for(x.device.type)
    found = values(lambda x, members: layers.lost_group(x, members, activation, kernels=kernels), x, members, dys)
    exact_members = [layers.LostWeights(*[exactly(value) for value in member]) for member in members]
    exact = values(
        lambda x, members: [
            layers.reference_lost_linear(x, *member[:5], activation, member.bias) for member in members
        ],
        exactly(x),
        exact_members,
        [dy.double() for dy in dys],
    )
    errors = {name: relative_error(found[name], value) for name, value in exact.items()}
    return judged(what, errors, x.dtype) | {"kernels": kernels}


def exactly(value: Any) -> Any:
    """The same number in float64; an index and a float stay what they are."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_()
    return value


def values(function: Callable, x: Tensor, members: list, dys: list[Tensor]) -> dict[str, list[Tensor]]:
    ys = function(x, members)
    named = [("x", x)]
    for member in members:
        named += [(name, value) for name, value in member._asdict().items() if isinstance(value, Tensor)]
    named = [(name, value) for name, value in named if value.requires_grad]
    gradients = torch.autograd.grad(ys, [value for _, value in named], dys)
    found: dict[str, list[Tensor]] = {"y": [y.detach() for y in ys]}
    for (name, _), gradient in zip(named, gradients, strict=True):
        found.setdefault(f"d {name}", []).append(gradient)
    return found


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """RMS(found - exact) / RMS(exact) of all together; nan where anything is."""
    distance = sum((value.double() - right).square().sum().item() for value, right in zip(found, exact, strict=True))
    return math.sqrt(distance / sum(right.square().sum().item() for right in exact))


def judged(what: str, errors: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    limit = LARGEST_ERROR[dtype]
    # Written so that nan is wrong too.
    wrong = [name for name, error in errors.items() if not error <= limit]
    row: dict[str, Any] = {
        "what": what,
        "status": "failed" if wrong else "passed",
        "error": float(f"{max(errors.values()):.3g}"),
        "limit": limit,
        "errors": {name: float(f"{error:.3g}") for name, error in errors.items()},
    }
    return row | ({"wrong": {name: KERNEL_OF.get(name, "") for name in wrong}} if wrong else {})


# ---------------------------------------------------------------------------------------------------- loss


def loss_errors(place: Place, dtype: str) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary = (63, 60, 101) if place.is_tiny else (8191, 1000, 31999)
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, width, generator=generator).to(place.device, kind)
    weight = (torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)).to(place.device, kind)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::7] = -100
    targets = targets.to(place.device)
    found = loss_values(cross_entropy.linear_cross_entropy, hidden, weight, targets)
    exact = loss_values(cross_entropy.reference_linear_cross_entropy, hidden.double(), weight.double(), targets)
    errors = {name: relative_error([found[name]], [value]) for name, value in exact.items()}
    yield judged("chunked cross-entropy", errors, kind)


def loss_values(function: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    inputs = [value.detach().requires_grad_() for value in (hidden, weight)]
    loss = function(*inputs, targets)
    d_hidden, d_weight = torch.autograd.grad(loss, inputs)
    return {"loss": loss.detach(), "d hidden": d_hidden, "d weight": d_weight}
