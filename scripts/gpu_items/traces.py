"""S5: twenty training steps by the operators and by the definition, from the same weights on the same tokens."""

import copy
from collections.abc import Iterator
from typing import Any

import torch

from gpu_items.models import lost_config, model_config, with_arm
from gpu_items.steps import loss_of
from gpu_items.worker import Place
from lost.model import build_model

NUM_STEPS = 20
# Of the losses in float32, which begin near 10; on a CPU the two are 1e-5 apart.
LARGEST_DIFFERENCE = 1e-3


def trace_differences(place: Place) -> Iterator[dict[str, Any]]:
    """Largest differences of the losses from those of the definition in float32.

    In bfloat16 the operators may be twice as far off as the definition in bfloat16 is.
    """
    model = model_config("tiny" if place.is_tiny else "llama_60m")
    start = build_model(model, lost_config(model), seed=0, device=place.device).train()
    found = {
        (kernels, precision): losses(copy.deepcopy(start), kernels, precision, place)
        for precision in ("fp32", "bf16")
        for kernels in ("reference", "auto")
    }
    exact = found["reference", "fp32"]
    errors = {key: max(abs(a - b) for a, b in zip(exact, values, strict=True)) for key, values in found.items()}
    limits = {"fp32": LARGEST_DIFFERENCE, "bf16": LARGEST_DIFFERENCE + 2 * errors["reference", "bf16"]}
    for precision, limit in limits.items():
        error = errors["auto", precision]
        yield {
            "what": f"{model.name}, {precision}: largest difference of {NUM_STEPS} losses",
            "status": "passed" if error <= limit else "failed",
            "error": float(f"{error:.3g}"),
            "limit": float(f"{limit:.3g}"),
            "of_definition": float(f"{errors['reference', precision]:.3g}"),
            "losses": [round(exact[0], 4), round(exact[-1], 4)],
        }


def losses(net: Any, kernels: str, precision: str, place: Place) -> list[float]:
    """Of steps on other tokens each, p1."""
    with_arm(net, kernels, "p1")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 32) if place.is_tiny else (16, 256)
    found = []
    for _ in range(NUM_STEPS):
        ids = torch.randint(net.config.vocab_size, shape, generator=generator).to(place.device)
        with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(net, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    return [loss.item() for loss in found]
