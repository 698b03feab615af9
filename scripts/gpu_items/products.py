"""S1: matrix products of our shapes in bfloat16, by the library that torch calls.

Shapes: D hidden_size, F intermediate_size, R lost_rank, W columns of z: R and the kept channels, padded or not.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gpu_items.plan import SIZES
from gpu_items.timing import device_seconds, times
from gpu_items.worker import Place


def dense_widths(place: Place, size: str, tokens: list[int], widths: list[int]) -> Iterator[dict[str, Any]]:
    """One dense layer D -> F, forward and both gradients, at each F."""
    hidden = SIZES[size]["hidden_size"]
    for num_tokens in tokens:
        for width in widths:
            yield three_products(place, f"{hidden} -> {width}", num_tokens, hidden, width)


def z_widths(place: Place, size: str, tokens: list[int], widths: list[int]) -> Iterator[dict[str, Any]]:
    """The product of z with [B | W_s] for D outputs, forward and both gradients, at each W."""
    hidden = SIZES[size]["hidden_size"]
    for num_tokens in tokens:
        for width in widths:
            yield three_products(place, f"z {width} -> {hidden}", num_tokens, width, hidden)


def three_products(place: Place, what: str, num_tokens: int, inputs: int, outputs: int) -> dict[str, Any]:
    x, y = random(place, num_tokens, inputs), random(place, num_tokens, outputs)
    weight = random(place, outputs, inputs)
    parts = {"forward": lambda: x @ weight.T, "d x": lambda: y @ weight, "d weight": lambda: y.T @ x}
    found = {name: device_seconds(call, place) for name, call in parts.items()}
    flops = 2.0 * num_tokens * inputs * outputs
    total = sum(median for median, _, _ in found.values())
    return {
        "what": f"{what}, {num_tokens} tokens",
        "ms": float(f"{1e3 * total:.4g}"),
        **rate(place, 3 * flops, total),
        "parts_ms": {name: times(seconds)["ms"] for name, seconds in found.items()},
    }


def groups(place: Place, size: str, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """q, k and v of LOST: one batched product or three; one down product with 3 R columns or three with R."""
    hidden, rank = SIZES[size]["hidden_size"], SIZES[size]["lineage_rank"]
    width = rank + hidden // 100
    width += -width % 16
    for num_tokens in tokens:
        z, weights = random(place, num_tokens, 3 * width), random(place, 3, hidden, width)
        blocks = z.view(num_tokens, 3, width).transpose(0, 1)
        x, downs = random(place, num_tokens, hidden), random(place, 3 * rank, hidden)
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "up, one bmm": (lambda b=blocks, w=weights: torch.bmm(b, w.mT), 3.0 * width),
            "up, three mm": (lambda b=blocks, w=weights: [p @ q.T for p, q in zip(b, w, strict=True)], 3.0 * width),
            "down, one mm": (lambda x=x, d=downs: x @ d.T, 3.0 * rank),
            "down, three mm": (lambda x=x, d=downs: [x @ part.T for part in d.chunk(3)], 3.0 * rank),
        }
        for name, (call, columns) in calls.items():
            seconds = device_seconds(call, place)
            what = f"q, k, v of {size} {name}, {num_tokens} tokens"
            yield {"what": what, **times(seconds), **rate(place, 2 * num_tokens * hidden * columns, seconds[0])}


def rate(place: Place, flops: float, seconds: float) -> dict[str, Any]:
    """TFLOP/s, and over those of the large product of S0."""
    found = {"tflops": float(f"{flops / seconds / 1e12:.4g}")}
    if place.machine:
        found["of_large_product"] = round(flops / seconds / place.machine[0], 3)
    return found


def random(place: Place, *shape: int) -> Tensor:
    return torch.randn(*shape, device=place.device, dtype=torch.bfloat16)
