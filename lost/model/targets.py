"""Which linears of a model are attention and MLP projections, by family, and which names a pattern resembles."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lost.accounting.targets import is_match


@dataclass(frozen=True)
class Projections:
    """Patterns of the projections of one family."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]

    def role(self, name: str) -> str | None:
        """attention, mlp or None for a dotted module name."""
        if matches_any(name, self.attention):
            return "attention"
        return "mlp" if matches_any(name, self.mlp) else None


_LLAMA = Projections(
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_FAMILIES = {
    **dict.fromkeys(("llama", "lost_llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2"), _LLAMA),
    "smollm3": _LLAMA,
    "gpt_neox": Projections(
        attention=("attention.query_key_value", "attention.dense"),
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "phi": Projections(
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        mlp=("mlp.fc1", "mlp.fc2"),
    ),
    "phi3": Projections(
        attention=("self_attn.qkv_proj", "self_attn.o_proj"), mlp=("mlp.gate_up_proj", "mlp.down_proj")
    ),
    "opt": Projections(
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        mlp=("layers.*.fc1", "layers.*.fc2"),
    ),
}


def projections_of(module: nn.Module) -> Projections | None:
    """The projections of a transformers model by its config.model_type; None for any other module."""
    return _FAMILIES.get(str(getattr(getattr(module, "config", None), "model_type", "")).removeprefix("lost_"))


def family_names() -> list[str]:
    return sorted(_FAMILIES)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(is_match(name, pattern) for pattern in patterns)


def nearest_names(pattern: str, names: Iterable[str], count: int = 3) -> str:
    """The dotted names most like `pattern`, compared over as many of their last parts as it has, as a phrase."""
    num_parts = pattern.count(".") + 1
    first_with_end: dict[str, str] = {}
    for name in names:
        first_with_end.setdefault(".".join(name.split(".")[-num_parts:]), name)
    found = difflib.get_close_matches(pattern, first_with_end, n=count, cutoff=0.0)
    return ", ".join(first_with_end[end] for end in found)
