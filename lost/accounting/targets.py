"""Which linear layers a LostConfig replaces, at what rank and with how many kept channels: pure arithmetic on names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from lost.accounting.shapes import ATTENTION_PROJECTIONS, HEAD, MLP_PROJECTIONS, LinearShape
from lost.config.model import LostConfig
from lost.config.section import CountOrFraction, nearest
from lost.utils.errors import ConfigError

FAMILY_PROJECTIONS = (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS)
ALL_LINEAR = "all_linear"
# Products such as 0.29 * 100 fall just below the whole number that is meant.
ROUNDING = 1e-9

Value = TypeVar("Value")


@dataclass(frozen=True)
class LostShape:
    """One replaced linear layer: its widths, the rank R and the number S of kept channels."""

    linear: LinearShape
    lost_rank: int
    num_kept: int


def is_match(name: str, pattern: str) -> bool:
    """Whether the dotted `name`, or an end of it that starts after a dot, is what `pattern` describes ('*' = any)."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def is_target(name: str, config: LostConfig) -> bool:
    """Whether the linear layer called `name` is replaced; all_linear leaves lm_head dense."""
    patterns = config.target_modules or list(FAMILY_PROJECTIONS)
    if ALL_LINEAR in patterns:
        return name != HEAD
    return any(is_match(name, pattern) for pattern in patterns)


def rank_of(config: LostConfig, linear: LinearShape) -> int:
    """R of one layer.

    Raises:
        ConfigError: R is above min(in_features, out_features).
    """
    smaller = min(linear.in_features, linear.out_features)
    wanted = _last_match(linear.name, config.rank_overrides, config.lost_rank)
    rank = rank_count(wanted, smaller)
    if rank > smaller:
        raise ConfigError(
            f"lost_rank = {rank} for {linear.name}: must be at most min(in_features, out_features) = {smaller};"
            " lower parameterization.lost_rank or set parameterization.rank_overrides for this layer"
        )
    return rank


def num_kept_of(config: LostConfig, linear: LinearShape) -> int:
    """S of one layer: 0 where its density is 0, else at least 1."""
    density = _last_match(linear.name, config.density_overrides, config.density)
    channels = linear.in_features if config.selection_axis == "columns" else linear.out_features
    return kept_count(density, channels)


def rank_count(lost_rank: CountOrFraction, smaller: int) -> int:
    """R as a count: a float is a fraction of `smaller` = min(in_features, out_features), rounded down, at least 1."""
    return lost_rank if isinstance(lost_rank, int) else max(1, int(lost_rank * smaller + ROUNDING))


def kept_count(density: float, num_channels: int) -> int:
    """S = max(1, int(density * num_channels)), and 0 where density is 0."""
    return max(1, int(density * num_channels + ROUNDING)) if density > 0 else 0


def lost_shapes(config: LostConfig, linears: Iterable[LinearShape]) -> list[LostShape]:
    """The layers among `linears` that are replaced.

    Raises:
        ConfigError: a pattern of target_modules or of an override matches no layer, or a rank is too high.
    """
    linears = list(linears)
    targets = targets_of(config, linears)
    problems = [
        *unmatched_targets(config, linears),
        *unmatched_overrides("rank_overrides", config.rank_overrides, targets),
        *unmatched_overrides("density_overrides", config.density_overrides, targets),
        *rank_problems(config, targets),
    ]
    if problems:
        raise ConfigError(problems)
    return [LostShape(linear, rank_of(config, linear), num_kept_of(config, linear)) for linear in targets]


def targets_of(config: LostConfig, linears: Iterable[LinearShape]) -> list[LinearShape]:
    """The layers that are replaced."""
    return [linear for linear in linears if is_target(linear.name, config)]


def unmatched_targets(config: LostConfig, linears: Sequence[LinearShape]) -> list[str]:
    """A problem for every pattern of target_modules that matches no layer."""
    return unmatched("target_modules", [name for name in config.target_modules if name != ALL_LINEAR], linears)


def unmatched_overrides(key: str, patterns: Iterable[str], targets: Sequence[LinearShape]) -> list[str]:
    """A problem for every pattern of an override that matches no replaced layer; if none is, that is the mistake."""
    return unmatched(key, patterns, targets) if targets else []


def rank_problems(config: LostConfig, targets: Iterable[LinearShape]) -> list[str]:
    """A problem for every replaced layer whose rank is too high."""
    problems = []
    for linear in targets:
        try:
            rank_of(config, linear)
        except ConfigError as error:
            problems += error.problems
    return problems


def _last_match(name: str, overrides: Mapping[str, Value], default: Value) -> Value:
    """The value of the last pattern that matches, so that a later override refines an earlier one."""
    values = [value for pattern, value in overrides.items() if is_match(name, pattern)]
    return values[-1] if values else default


def unmatched(key: str, patterns: Iterable[str], linears: Sequence[LinearShape]) -> list[str]:
    """A problem for every pattern that matches none of the layers."""
    ends = sorted({linear.name.rsplit(".", 1)[-1] for linear in linears})
    return [
        f"{key}: the pattern {pattern} matches no linear layer{nearest(pattern, ends)}; there are {', '.join(ends)}"
        for pattern in patterns
        if not any(is_match(linear.name, pattern) for linear in linears)
    ]
