"""One block of a model, forward and backward, in the form of every arm."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lost.bench.arms import bytes_of, chosen, dense_sizes, lost_names, model_of, with_compiled, works_of_block
from lost.bench.live_memory import LiveBytes
from lost.bench.machine import measure_machine
from lost.bench.peers import PEERS
from lost.bench.result import Arm, BenchResult
from lost.bench.timing import time_interleaved
from lost.bench.verify import autocast_of, verify_blocks
from lost.config.schema import BenchConfig
from lost.train.runtime import pick_device, pick_precision, set_up_process


def bench_block(config: BenchConfig) -> BenchResult:
    """Times of one block of `model` on num_tokens // seq_len rows; the gradient of its input is computed too.

    Raises:
        TrainingError: the operators of a LOST layer are wrong here.
    """
    set_up_process(config.runtime)
    device = pick_device(config.runtime.device)
    precision = pick_precision(config.runtime.precision, device)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    # The smallest vocabulary: neither embedding nor head is run.
    model = replace(config.model, num_hidden_layers=1, vocab_size=2)
    autocast = autocast_of(precision, device)
    num_rows = max(1, config.num_tokens // config.seq_len)
    x = torch.randn(num_rows, config.seq_len, model.hidden_size, device=device, dtype=dtype, requires_grad=True)
    d_y = torch.randn_like(x)

    def make(name: str, is_compiled: bool) -> nn.Module:
        net = model_of(config, name, model, device, dtype, is_compiled=is_compiled)
        block = net.model.layers[0]
        block.angles = net.model.rotary_emb(x, torch.arange(config.seq_len, device=device)[None])
        if is_compiled:
            block.compile()
        return block

    names = ["dense", *PEERS, *lost_names(device), "lost p1", "lost p3"]
    blocks = with_compiled(config, make, chosen(config, names, device, has_levels=True))
    verify_blocks(blocks.values(), precision)

    def forward(block: nn.Module) -> Tensor:
        with autocast:
            return block(x, position_embeddings=block.angles, attention_mask=None)

    def call(block: nn.Module) -> Callable[[], None]:
        inputs = [x, *block.parameters()]
        return lambda: discard(torch.autograd.grad(forward(block), inputs, d_y))

    timings = time_interleaved({name: call(block) for name, block in blocks.items()}, config.repeats, device)
    num_tokens = num_rows * config.seq_len
    value_bytes, _ = bytes_of(precision)
    arms = {}
    for name, block in blocks.items():
        kind = name.partition(",")[0]
        num_weights = sum(p.numel() for p in block.parameters())
        kept = 0 if name != kind else kept_bytes(lambda block=block: forward(block))
        arms[name] = Arm(
            timings[name], num_weights, kept, works=works_of_block(config, kind, model, num_tokens, value_bytes)
        )
    machine = measure_machine(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    sizes = dense_sizes(model)
    title = f"block of {config.model.name}: {num_rows} rows of {config.seq_len} tokens, forward + backward"
    if sizes != model:
        title += f"; dense with intermediate_size {sizes.intermediate_size}"
    num_threads = torch.get_num_threads()
    return BenchResult(config, title, num_tokens, device, precision, num_threads, arms, machine=machine)


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass leaves alive besides its output; its input is not counted."""
    with LiveBytes() as live:
        y = forward()
        return live.live_bytes - y.nbytes


def discard(_: object) -> None:
    """Frees what a call returns before its time is taken."""
