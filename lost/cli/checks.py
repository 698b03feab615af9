"""Rules that need the shapes of the layers, which `lost.config` does not know."""

from lost.accounting.shapes import linear_shapes
from lost.accounting.targets import lost_shapes
from lost.config.schema import LostConfig, ModelConfig, ParameterizationConfig
from lost.utils.errors import ConfigError


def layer_problems(model: ModelConfig, parameterization: ParameterizationConfig) -> list[str]:
    """Patterns that match no layer, and the first layer whose rank is too high with the number of the others."""
    if not isinstance(parameterization, LostConfig):
        return []
    try:
        lost_shapes(parameterization, linear_shapes(model))
    except ConfigError as error:
        ranks = [problem for problem in error.problems if problem.startswith("lost_rank")]
        others = [problem for problem in error.problems if problem not in ranks]
        more = f" ({len(ranks) - 1} more layers alike)" if len(ranks) > 1 else ""
        return [f"parameterization.{problem}" for problem in [*others, *(f"{first}{more}" for first in ranks[:1])]]
    return []
