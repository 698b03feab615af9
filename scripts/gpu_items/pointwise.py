"""S2: what lies between the products of a LOST group: our kernels, plain torch, Inductor. Sweeps our tile sizes."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import lost_kernels.lost_linear as layers
import torch

from gpu_items.correctness import Group, group, size_errors
from gpu_items.plan import SIZES
from gpu_items.timing import device_seconds, times
from gpu_items.worker import Place

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul")
NUM_CALLS = 10
NUM_NAMED = 6


def compared(place: Place, size: str) -> Iterator[dict[str, Any]]:
    """Forward and backward of q, k, v: the whole group, and the device's time outside matrix products."""
    right = size_errors(place, size)
    yield right
    if right["status"] == "failed":
        return
    given = lost_group_of(place, size)
    auto = layers.kernels_for(place.device.type)
    ways = {f"operators, {auto}": group_call(given, auto)}
    if auto != "grouped":
        ways["operators, grouped"] = group_call(given, "grouped")
    ways["definition, eager"] = group_call(given, "reference")
    ways["definition, compiled"] = group_call(given, "reference", is_compiled=True, is_tiny=place.is_tiny)
    for name, call in ways.items():
        whole = device_seconds(call, place)
        between, by_name = outside_products(call, place)
        row = {"what": f"q, k, v of {size}, {name}", **times(whole), "between_products_ms": between}
        if place.machine:
            row["least_between_ms"] = float(f"{1e3 * least_bytes(given) / place.machine[1]:.4g}")
        yield row | {"longest_ms": by_name}


def lost_group_of(place: Place, size: str, num_tokens: int = 4096) -> Group:
    hidden, rank = SIZES[size]["hidden_size"], SIZES[size]["lineage_rank"]
    members = [(hidden, rank, max(1, hidden // 100))] * 3
    return group(64 if place.is_tiny else num_tokens, hidden, members, place, "bfloat16", is_learned=False)


def group_call(given: Group, kernels: str, *, is_compiled: bool = False, is_tiny: bool = False) -> Callable[[], Any]:
    """Forward and backward of the group by one backend, or of the definition of every member."""
    x, members, dys = given

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        if kernels == "reference":
            return [layers.reference_lost_linear(x, *member[:5], "silu", member.bias) for member in members]
        return layers.lost_group(x, members, "silu", kernels=kernels)

    run = torch.compile(forward, backend="aot_eager" if is_tiny else "inductor") if is_compiled else forward
    inputs = [x, *[value for member in members for value in member[:3]]]
    return lambda: torch.autograd.grad(run(x), inputs, dys)


def outside_products(call: Callable[[], Any], place: Place) -> tuple[float, dict[str, float]]:
    """Milliseconds of one call that the device spends outside matrix products, and its longest kernels by name."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if place.is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    num_calls = 2 if place.is_tiny else NUM_CALLS
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(num_calls):
            call()
        if place.is_cuda:
            torch.cuda.synchronize(place.device)
    events = profile.key_averages()
    if place.is_cuda:
        # A kernel is there twice: by its own name, and under the operator that launched it.
        on_device = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
        seconds = {event.key: event.self_device_time_total for event in on_device if not event.is_user_annotation}
        products = sum(event.self_device_time_total for event in events if event.key in PRODUCTS)
        outside = sum(seconds.values()) - products
    else:
        seconds = {event.key: event.self_cpu_time_total for event in events if event.key not in PRODUCTS}
        outside = sum(seconds.values())
    longest = sorted(seconds, key=lambda name: -seconds[name])[:NUM_NAMED]
    # The profiler counts in microseconds.
    return float(f"{outside / num_calls / 1e3:.4g}"), {
        name[:60]: float(f"{seconds[name] / num_calls / 1e3:.4g}") for name in longest
    }


def least_bytes(given: Group) -> float:
    """z from h and the kept columns; in the backward pass z again, and their gradients from that of z."""
    x, members, _ = given
    widths = [member.low_rank_down.shape[0] + member.sparse_weight.shape[1] for member in members]
    return 6.0 * x.element_size() * x.shape[0] * sum(widths)


def tiles(place: Place, size: str) -> Iterator[dict[str, Any]]:
    """The group with one kernel's tile changed at a time; a tile that makes it wrong is not timed."""
    if layers.kernels_for(place.device.type) != "triton":
        yield {"what": f"no Triton kernels on {place.device.type}"}
        return
    from lost_kernels.lost_linear.triton_impl import TILES, Tile

    given = lost_group_of(place, size, 16384)
    call = group_call(given, "triton")
    yield {"what": "tiles as they are", **times(device_seconds(call, place))}
    for kernel, (rows, columns) in itertools.product(("z_forward", "z_backward", "add_kept"), tile_sizes()):
        usual = TILES[kernel]
        if (rows, columns) == (usual.rows, usual.columns):
            continue
        if place.seconds_left() < 3:
            yield {"what": "tiles left out for lack of time", "from": f"{kernel} {rows}x{columns}"}
            return
        TILES[kernel] = Tile(rows, columns)
        try:
            what = f"{kernel} {rows}x{columns}"
            right = size_errors(place, size)
            if right["status"] == "failed":
                yield right | {"what": what}
            else:
                yield {"what": what, **times(device_seconds(call, place))}
        finally:
            TILES[kernel] = usual


def tile_sizes() -> list[tuple[int, int]]:
    """Rows and columns; the widest of many rows would spill registers."""
    return [(4, 128), (8, 64), (8, 128), (8, 256), (16, 64), (16, 128), (32, 64)]
