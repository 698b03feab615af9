"""Bytes on one of several devices: what each runtime splits over them, from the config alone."""

from typing import Literal

from lost.accounting.memory import WIDTHS, Memory, Precision
from lost.config.model import ModelConfig

SplitRuntime = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]

# From the least communication to the least memory. fsdp2 splits the same as zero3.
SPLIT_PARTS: dict[SplitRuntime, tuple[str, ...]] = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}
# The block that computes and the next one, which is fetched meanwhile.
NUM_WHOLE_BLOCKS = 2


def memory_over_devices(
    memory: Memory, model: ModelConfig, runtime: SplitRuntime, num_devices: int, precision: Precision
) -> float:
    """Bytes on each device at the peak of a step.

    Args:
        memory: of one device that holds everything.
        model: the architecture.
        runtime: what is split.
        num_devices: devices that share one copy of what is split, at least 1; with hybrid sharding those of one group.
        precision: of the run.
    Returns:
        Bytes; left out: buckets of gradients on their way, which the engines' own settings decide.
    """
    split = sum(getattr(memory.state, part) for part in SPLIT_PARTS[runtime])
    kept = memory.total - split * (1 - 1 / num_devices)
    if "weights" not in SPLIT_PARTS[runtime] or num_devices == 1:
        return kept
    return kept + whole_weights_bytes(memory.state.weights, model, precision)


def whole_weights_bytes(weights: int, model: ModelConfig, precision: Precision) -> float:
    """Split weights that are whole at one moment: embedding and head, and two blocks, in the dtype of the products."""
    width = WIDTHS[precision]
    root = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2) + model.hidden_size
    block = (weights / width.weight - root) / model.num_hidden_layers
    return (root + min(NUM_WHOLE_BLOCKS, model.num_hidden_layers) * block) * width.compute
