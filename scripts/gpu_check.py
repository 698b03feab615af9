"""Checks LOST on a GPU in one run: exactness of the layer, then speed and memory of whole training steps.

    python scripts/gpu_check.py            on a CUDA device; ends by itself within 9 minutes
    python scripts/gpu_check.py --device cpu --tiny      the same items, small: a test of this script

Prints one JSON line after each item; an item that fails is reported and the next one runs. Needs torch, triton and
transformers only, nothing installed: `lost` and `lost_kernels` come from this repository.
Exit status: 0 all items passed, 1 some failed or were left out for lack of time, 2 no CUDA device.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

import torch  # noqa: E402
from lost_kernels.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy  # noqa: E402
from lost_kernels.lost_linear import kernels_for  # noqa: E402
from torch import nn  # noqa: E402

from lost.accounting import flops_per_token  # noqa: E402
from lost.config.model import DenseConfig, LostConfig, ModelConfig, ParameterizationConfig  # noqa: E402
from lost.model import LostLinear, build_model  # noqa: E402
from lost.model.head import head_gives  # noqa: E402
from lost.utils.labels import next_token_labels  # noqa: E402

# An item is begun only if this much of the time is left; one that then hangs is cut off at the deadline.
DEADLINE_SECONDS = 530.0
RESERVE_SECONDS = 60.0
NUM_STEPS = 50
WARMUP_STEPS = 10
# Relative RMS error against float64: twice what the dtype's own rounding gives in a product of this width.
LARGEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

SIZES: dict[str, dict[str, Any]] = {
    "llama_60m": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "lineage_rank": 128,
        "vocab_size": 32000,
    },
    "llama_350m": {
        "hidden_size": 1024,
        "intermediate_size": 2736,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "lineage_rank": 256,
        "vocab_size": 32000,
    },
}
TINY_SIZES: dict[str, dict[str, Any]] = {
    "llama_tiny": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "lineage_rank": 16,
        "vocab_size": 256,
    },
}

Item = tuple[str, Callable[[], dict[str, Any]]]


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: no CUDA device here, nothing to check; `--device cpu --tiny` tries the script itself",
            file=sys.stderr,
        )
        return 2
    started = time.monotonic()
    watchdog = threading.Timer(arguments.deadline_seconds, cut_off, [started])
    watchdog.daemon = True
    watchdog.start()
    num_failed = 0
    for name, item in items(device, arguments.tiny):
        if time.monotonic() - started > arguments.deadline_seconds - RESERVE_SECONDS:
            report(name, {"status": "left out", "reason": "not enough time"}, started)
            num_failed += 1
            continue
        try:
            result = item()
        except Exception as error:
            # One broken item must not hide the others: the whole traceback is in its line.
            result = {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        num_failed += result["status"] != "passed"
        report(name, result, started)
        release(device)
    watchdog.cancel()
    report("end", {"status": "passed" if not num_failed else "failed", "num_failed": num_failed}, started)
    return 1 if num_failed else 0


def cut_off(started: float) -> None:
    """Ends the process from a thread of its own: the main one may wait for a compiler or for the device."""
    report("end", {"status": "failed", "reason": "the last item was still running at the deadline"}, started)
    os._exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few steps: tries the script")
    parser.add_argument("--deadline-seconds", type=float, default=DEADLINE_SECONDS, help="the whole run ends by then")
    return parser.parse_args()


def items(device: torch.device, is_tiny: bool) -> Iterator[Item]:
    """Exactness first, so that no speed of a wrong layer is read."""
    yield "versions", lambda: versions(device)
    for dtype in (torch.float32, torch.bfloat16):
        for activation in ("silu", "identity"):
            yield (
                f"layer {activation} {str(dtype)[6:]}",
                lambda dtype=dtype, activation=activation: layer_errors(device, dtype, activation, is_tiny),
            )
    for dtype in (torch.float32, torch.bfloat16):
        yield f"cross-entropy {str(dtype)[6:]}", lambda dtype=dtype: loss_errors(device, dtype, is_tiny)
    sizes = TINY_SIZES if is_tiny else SIZES
    for name, size in sizes.items():
        model = ModelConfig(name=name, **size)
        forms = {"dense": DenseConfig(), "lost": LostConfig(lost_rank=model.lineage_rank)}
        for is_compiled in (False, True):
            for form_name, form in forms.items():
                yield (
                    f"steps {name} {form_name} {'compiled' if is_compiled else 'eager'}",
                    lambda model=model, form=form, is_compiled=is_compiled: training_steps(
                        model, form, device, is_compiled=is_compiled, is_tiny=is_tiny
                    ),
                )


def report(name: str, result: dict[str, Any], started: float) -> None:
    line = {"item": name, **result, "seconds_since_start": round(time.monotonic() - started, 1)}
    print(json.dumps(line), flush=True)


def release(device: torch.device) -> None:
    """Frees what an item left, so that the next one's peak is its own."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def versions(device: torch.device) -> dict[str, Any]:
    packages = {}
    for name in ("torch", "triton", "transformers"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    result: dict[str, Any] = {"status": "passed", "python": platform.python_version(), **packages}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return result


# ---------------------------------------------------------------------------------------------------- the layer


def layer_errors(device: torch.device, dtype: torch.dtype, activation: str, is_tiny: bool) -> dict[str, Any]:
    """Relative RMS errors of the output and of every gradient against float64 on the CPU from the same numbers."""
    torch.manual_seed(0)
    in_features, out_features, rank, num_tokens = (60, 101, 16, 63) if is_tiny else (1000, 1376, 250, 2049)
    layer = LostLinear(in_features, out_features, lost_rank=rank, density=0.02, activation=activation, bias=True)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        # Weights of an ordinary scale: those of the initialisation hide the sparse part behind the factors.
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    layer.to(dtype)
    x = torch.randn(num_tokens, in_features).to(dtype)
    dy = torch.randn(num_tokens, out_features).to(dtype)
    exact = forward_and_gradients(layer.to(torch.float64), x.double(), dy.double())
    on_device = forward_and_gradients(layer.to(device, dtype), x.to(device), dy.to(device))
    errors = {name: relative_error(on_device[name], value) for name, value in exact.items()}
    is_right = all(error <= LARGEST_ERROR[dtype] for error in errors.values())
    return {
        "status": "passed" if is_right else "failed",
        "errors": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "limit": LARGEST_ERROR[dtype],
    }


def forward_and_gradients(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    gradients = {f"d {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "d x": x.grad, **gradients}  # pyright: ignore[reportReturnType]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS(value - exact) / RMS(exact); nan where anything is."""
    difference = value.detach().double().cpu() - exact
    return (difference.norm() / exact.norm()).item()


def loss_errors(device: torch.device, dtype: torch.dtype, is_tiny: bool) -> dict[str, Any]:
    """Relative errors of the chunked loss and its gradients against the definition in float64 on the CPU."""
    torch.manual_seed(0)
    num_tokens, hidden_size, vocab_size = (63, 60, 101) if is_tiny else (8191, 1000, 31999)
    hidden = torch.randn(num_tokens, hidden_size).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size) / math.sqrt(hidden_size)).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,))
    targets[::7] = -100
    exact = loss_and_gradients(reference_linear_cross_entropy, hidden.double(), weight.double(), targets)
    found = loss_and_gradients(linear_cross_entropy, hidden.to(device), weight.to(device), targets.to(device))
    errors = {name: relative_error(found[name], value) for name, value in exact.items()}
    is_right = all(error <= LARGEST_ERROR[dtype] for error in errors.values())
    return {"status": "passed" if is_right else "failed", "errors": errors, "limit": LARGEST_ERROR[dtype]}


def loss_and_gradients(
    function: Callable[..., torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = function(*inputs, targets)
    d_hidden, d_weight = torch.autograd.grad(loss, inputs)
    return {"loss": loss.detach(), "d hidden": d_hidden, "d weight": d_weight}


# ---------------------------------------------------------------------------------------------------- whole steps


def training_steps(
    model: ModelConfig, form: ParameterizationConfig, device: torch.device, *, is_compiled: bool, is_tiny: bool
) -> dict[str, Any]:
    """Fifty steps of AdamW on the same random tokens: finite, falling loss, tokens/s and peak memory."""
    num_rows, seq_len, num_steps, num_warmup = (2, 32, 6, 2) if is_tiny else (32, 256, NUM_STEPS, WARMUP_STEPS)
    # The real initialisation, except that a random draw replaces the factorisation of every layer's W0: it is faster.
    net = build_model(model, quick(form), seed=0, device=device)
    net.train()
    if is_compiled:
        # Inductor's C++ takes minutes on a small CPU: the trial run stops before its code generation.
        backend = "aot_eager" if is_tiny else "inductor"
        for block in net.model.layers:
            block.compile(backend=backend)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (num_rows, seq_len), generator=generator).to(device)
    losses = []
    began = 0.0
    for step in range(num_steps):
        if step == num_warmup:
            synchronise(device)
            began = time.perf_counter()
        losses.append(train_step(net, optimizer, ids, device))
    synchronise(device)
    seconds = (time.perf_counter() - began) / (num_steps - num_warmup)
    values = [loss.item() for loss in losses]
    is_right = all(math.isfinite(value) for value in values) and values[-1] < values[0]
    tokens_per_second = num_rows * seq_len / seconds
    result = {
        "status": "passed" if is_right else "failed",
        "first_loss": round(values[0], 4),
        "last_loss": round(values[-1], 4),
        "num_steps": num_steps,
        "tokens_per_step": num_rows * seq_len,
        "tokens_per_second": round(tokens_per_second, 1),
        "model_tflops": float(f"{tokens_per_second * flops_per_token(model, form, seq_len) / 1e12:.4g}"),
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "kernels": kernels_for(device.type) if isinstance(form, LostConfig) else "none",
    }
    if device.type == "cuda":
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return result


def quick(form: ParameterizationConfig) -> ParameterizationConfig:
    """The same layers from drawn factors: their speed and memory do not depend on the values."""
    if not isinstance(form, LostConfig):
        return form
    return LostConfig(lost_rank=form.lost_rank, density=form.density, factor_init="cola", score="random")


def train_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """One step under bfloat16 autocast, with the chunked loss; returns the loss without waiting for the device."""
    targets = next_token_labels(ids).flatten()
    with (
        torch.autocast(device.type, dtype=torch.bfloat16),
        head_gives(net.lm_head, lambda hidden, weight: linear_cross_entropy(hidden.flatten(0, 1), weight, targets)),
    ):
        loss = net(input_ids=ids, use_cache=False).logits / ids[:, 1:].numel()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
