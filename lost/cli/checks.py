"""Rules that need the shapes of the layers, which `lost.config` does not know."""

from types import SimpleNamespace
from typing import Any

from lost.accounting.shapes import LinearShape, linear_shapes
from lost.accounting.targets import rank_problems, targets_of, unmatched_overrides, unmatched_targets
from lost.config.model import LostConfig, ModelConfig, ParameterizationConfig
from lost.config.section import WrongValue

# A width that is not known limits no rank, and a number of layers that is not known no pattern.
UNLIMITED = 2**62
MANY_LAYERS = 1000


def target_problems(model: ModelConfig, parameterization: ParameterizationConfig) -> list[str]:
    """Patterns of target_modules that match no layer."""
    if not isinstance(parameterization, LostConfig):
        return []
    return prefixed(unmatched_targets(parameterization, known_linears(model)))


def rank_override_problems(model: ModelConfig, parameterization: ParameterizationConfig) -> list[str]:
    """Patterns of rank_overrides that match no replaced layer."""
    if not isinstance(parameterization, LostConfig):
        return []
    targets = targets_of(parameterization, known_linears(model))
    return prefixed(unmatched_overrides("rank_overrides", parameterization.rank_overrides, targets))


def density_override_problems(model: ModelConfig, parameterization: ParameterizationConfig) -> list[str]:
    """Patterns of density_overrides that match no replaced layer."""
    if not isinstance(parameterization, LostConfig):
        return []
    targets = targets_of(parameterization, known_linears(model))
    return prefixed(unmatched_overrides("density_overrides", parameterization.density_overrides, targets))


def layer_rank_problems(model: ModelConfig, parameterization: ParameterizationConfig) -> list[str]:
    """The first layer whose rank is too high, with the number of the others where that is known."""
    if not isinstance(parameterization, LostConfig):
        return []
    found = rank_problems(parameterization, targets_of(parameterization, known_linears(model)))
    is_counted = known(model, "num_hidden_layers", 0) > 0
    more = f" ({len(found) - 1} more layers alike)" if len(found) > 1 and is_counted else ""
    return prefixed([f"{found[0]}{more}"]) if found else []


LAYER_RULES = (target_problems, rank_override_problems, density_override_problems, layer_rank_problems)


def prefixed(problems: list[str]) -> list[str]:
    return [f"parameterization.{problem}" for problem in problems]


def known_linears(model: ModelConfig) -> list[LinearShape]:
    """Every linear layer; what has a problem of its own sets no limit."""
    widths: Any = SimpleNamespace(
        num_hidden_layers=known(model, "num_hidden_layers", MANY_LAYERS),
        hidden_size=known(model, "hidden_size", UNLIMITED),
        intermediate_size=known(model, "intermediate_size", UNLIMITED),
        vocab_size=known(model, "vocab_size", UNLIMITED),
        num_attention_heads=known(model, "num_attention_heads", 1),
        num_key_value_heads=known(model, "num_key_value_heads", UNLIMITED),
    )
    return linear_shapes(widths)


def known(model: ModelConfig, key: str, otherwise: int) -> int:
    try:
        return int(getattr(model, key))
    except WrongValue:
        return otherwise
