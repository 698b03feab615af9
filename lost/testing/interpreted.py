"""The Triton kernels in Triton's interpreter, on a CPU: prints the error of every case as JSON.

    TRITON_INTERPRET=1 python -m lost.testing.interpreted

The variable must be set before triton is imported. Memory that nobody has written is NaN.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lost_kernels.lost_linear import lost_group, triton_impl
from torch import Tensor

from lost.config.model import LostConfig
from lost.model import build_model
from lost.testing.lost_groups import SMALL, Case, case
from lost.testing.numerics import relative_rms_error
from lost.train.wrap import set_kernels, set_recompute

# (R, S, N) of the members: the kernels' blocks are 128 columns wide, so 131 ends in the second of them.
GROUPS = {
    "equal": ((5, 3, 4), (5, 3, 6), (5, 3, 2)),
    "different": ((5, 3, 4), (4, 0, 7), (3, 6, 2)),
    "wide": ((131, 37, 3),),
    "no sparse block": ((16, 0, 3), (16, 0, 3)),
}


def errors() -> dict[str, float]:
    """The largest relative RMS error over values and gradients, by case; and of deliberate mistakes, as 'wrong: ..'."""
    found = {}
    for name, sizes in GROUPS.items():
        for kind in ("fixed", "learnable", "folded"):
            found |= errors_of(f"{name}, {kind}", case(sizes, kind, shape=(19,), in_features=71))
    for activation in ("identity", "gelu", "relu"):
        found |= errors_of(activation, case(kind="learnable", shape=(7,), activation=activation))
    found |= errors_of("one row", case(shape=(1,)))
    empty = case(shape=(0,)).cast(torch.float32)
    assert [y.shape[0] for y in lost_group(empty.x, empty.members, "silu", kernels="triton")] == [0, 0, 0]
    found |= errors_of_models()
    given = case(kind="learnable", shape=(7,))
    for name, wrong in MISTAKES.items():
        original = getattr(triton_impl, name)
        setattr(triton_impl, name, partial(wrong, original))
        found |= errors_of(f"wrong: {name}", given)
        setattr(triton_impl, name, original)
    return found


def errors_of(name: str, given: Case) -> dict[str, float]:
    """The largest error, and that of the gradients of gamma, which are sums of both signs, by itself."""
    narrow = given.cast(torch.float32)
    ours = narrow.outputs(partial(lost_group, kernels="triton"))
    expected = narrow.cast(torch.float64).outputs()
    found: dict[str, float] = {}
    for key, value in ours.items():
        place = f"{name}, d_gamma" if key.startswith("gamma") else name
        found[place] = max(found.get(place, 0.0), relative_rms_error(value, expected[key]))
    return found


def errors_of_models() -> dict[str, float]:
    """Loss and gradients of a small model whose every operator of ours runs its kernel, at some levels, in float32."""
    expected = model_values("reference", "none", torch.float64)
    found = {}
    for level in ("none", "p0", "p1", "p3"):
        for is_traced in (False, True):
            ours = model_values("triton", level, torch.float32, is_traced=is_traced)
            errors = [relative_rms_error(value, expected[name]) for name, value in ours.items()]
            found[f"model, {level}, {is_traced=}"] = max(errors)
    return found


def model_values(kernels: str, level: str, dtype: torch.dtype, *, is_traced: bool = False) -> dict[str, Tensor]:
    net: Any = build_model(SMALL, LostConfig(lost_rank=5, density=0.1), seed=0, dtype=torch.float32)
    net.to(dtype).train()
    set_kernels(net, kernels)
    set_recompute(net, level, is_traced=is_traced)
    ids = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(3))
    loss = net(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def _shifted(inverse_maps: Callable, *arguments: object) -> Tensor:
    return inverse_maps(*arguments).roll(1, 1)


def _other_scales(scales: Callable, *arguments: object) -> Tensor:
    return 1 - scales(*arguments)


def _without_the_last(runs: Callable, *arguments: object) -> list:
    return runs(*arguments)[:-1]


MISTAKES = {"inverse_maps": _shifted, "_scales": _other_scales, "_runs": _without_the_last}


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    # Fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True)
    print(json.dumps(errors()))
