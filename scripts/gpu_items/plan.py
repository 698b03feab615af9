"""The items of scripts/gpu_check.py in their order: most decisive first, correctness before speed.

No torch here: the process that keeps the time must not wait for it.
"""

from dataclasses import dataclass, field
from typing import Any

# An item of this stage that does not pass ends the run: no speed of something wrong is worth reading.
DECISIVE_STAGE = "S0"


@dataclass(frozen=True)
class Item:
    """`function` of `module` yields rows; budget_seconds is what the item may take if no earlier one left time over."""

    stage: str
    name: str
    budget_seconds: float
    module: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def size(hidden: int, intermediate: int, layers: int, heads: int, rank: int, vocab: int = 32000) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "lineage_rank": rank,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }


SIZES = {
    "llama_60m": size(512, 1376, 8, 8, 128),
    "llama_350m": size(1024, 2736, 24, 16, 256),
    "llama_1b": size(2048, 5461, 24, 32, 512),
    "llama_7b": size(4096, 11008, 32, 32, 1024),
    # A width that is padded, as that of llama_1b.
    "tiny": size(64, 170, 2, 4, 16, vocab=256),
}


def plan(*, is_tiny: bool) -> list[Item]:
    """Budgets of the stages in seconds: 50, 70, 50, 90, 208 and 40; the rest to the deadline is for starting."""
    return [
        *correctness(),
        *products(is_tiny),
        *pointwise(is_tiny),
        *blocks(is_tiny),
        *steps(is_tiny),
        Item("S5", "20 steps, operators against the definition", 40, "gpu_items.traces", "trace_differences"),
    ]


def correctness() -> list[Item]:
    # Half of it would do; but one of these cut off while it compiles would end the run.
    items = [Item("S0", "machine", 10, "gpu_items.correctness", "machine")]
    for dtype in ("float32", "bfloat16"):
        items.append(Item("S0", f"layers {dtype}", 15, "gpu_items.correctness", "layer_errors", {"dtype": dtype}))
        items.append(Item("S0", f"loss {dtype}", 5, "gpu_items.correctness", "loss_errors", {"dtype": dtype}))
    return items


def products(is_tiny: bool) -> list[Item]:
    widest = "tiny" if is_tiny else "llama_1b"
    tokens = [64] if is_tiny else [4096, 16384]
    intermediates = [170, 176] if is_tiny else [5461, 5472, 5504]
    widths = [16, 17, 32] if is_tiny else [512, 533, 536, 544, 576]
    given = {"size": widest, "tokens": tokens}
    grouped = ["tiny"] if is_tiny else ["llama_1b", "llama_350m", "llama_7b"]
    return [
        Item("S1", "intermediate sizes", 15, "gpu_items.products", "dense_widths", {**given, "widths": intermediates}),
        Item("S1", "widths of z", 19, "gpu_items.products", "z_widths", {**given, "widths": widths}),
        *[
            Item("S1", f"groups {name}", 12, "gpu_items.products", "groups", {"size": name, "tokens": tokens})
            for name in grouped
        ],
    ]


def pointwise(is_tiny: bool) -> list[Item]:
    sizes = ["tiny"] if is_tiny else ["llama_1b", "llama_350m", "llama_7b"]
    compared = [
        Item("S2", f"between products {name}", 10, "gpu_items.pointwise", "compared", {"size": name}) for name in sizes
    ]
    return [*compared, Item("S2", "tiles", 20, "gpu_items.pointwise", "tiles", {"size": sizes[0]})]


def blocks(is_tiny: bool) -> list[Item]:
    cases = {"tiny": (2, 32)} if is_tiny else {"llama_1b": (16, 256), "llama_350m": (128, 256), "llama_7b": (16, 256)}
    return [
        Item(
            "S3",
            f"block {name}",
            30,
            "gpu_items.blocks",
            "block_times",
            {"size": name, "rows": rows, "seq_len": seq_len},
        )
        for name, (rows, seq_len) in cases.items()
    ]


# Arms of whole steps: form, backend of LOST (empty: auto), level of recomputation, compiled or eager.
DENSE = "dense none compiled"
OPERATORS, PLAIN = "lost none compiled", "lost reference none compiled"
P1, P2, P1_EAGER = "lost p1 compiled", "lost p2 compiled", "lost p1 eager"


def steps(is_tiny: bool) -> list[Item]:
    if is_tiny:
        cases = [("tiny", 2, 32, [DENSE, OPERATORS, PLAIN, P1_EAGER], 20)]
    else:
        cases = [
            ("llama_1b", 16, 256, [DENSE, OPERATORS, PLAIN, P1, P2, P1_EAGER], 14),
            ("llama_1b", 8, 2048, [DENSE, P1, P2], 14),
            ("llama_350m", 128, 256, [DENSE, P1], 14),
            ("llama_7b", 16, 256, [DENSE, P1], 17),
            ("llama_60m", 128, 256, [DENSE, P1], 10),
        ]
    return [
        Item(
            "S4",
            f"step {name} {rows}x{seq_len} {arm}",
            seconds,
            "gpu_items.steps",
            "step_time",
            {"size": name, "rows": rows, "seq_len": seq_len, "arm": arm},
        )
        for name, rows, seq_len, arms, seconds in cases
        for arm in arms
    ]
