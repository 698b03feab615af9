"""Replaces chosen nn.Linear modules of any module with LostLinear."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from lost.accounting.targets import ALL_LINEAR
from lost.config.model import LostConfig
from lost.model.lost_init import factorisation_cost, layer_generator
from lost.model.lost_linear import LostLinear, rank_of
from lost.model.split import Piece, Processes, shared_values
from lost.model.targets import Projections, family_names, matches_any, nearest_names, projections_of
from lost.utils.errors import ConfigError, LostError


@dataclass(frozen=True)
class InjectedLayer:
    """One replaced linear; counts are in parameters (values), shared modules named once."""

    name: str
    in_features: int
    out_features: int
    lost_rank: int
    num_kept: int
    activation: str
    num_parameters_before: int
    num_parameters_after: int


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` replaced, in the order of the module, and the parameters of the whole module."""

    layers: tuple[InjectedLayer, ...]
    num_parameters_before: int
    num_parameters_after: int

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def __str__(self) -> str:
        rows = [
            f"{layer.name}: {layer.in_features} -> {layer.out_features}, rank {layer.lost_rank}, kept"
            f" {layer.num_kept}, {layer.activation}, {layer.num_parameters_before:,} -> "
            f"{layer.num_parameters_after:,} parameters"
            for layer in self.layers
        ]
        total = f"{self.num_parameters_before:,} -> {self.num_parameters_after:,} parameters"
        return "\n".join([*rows, f"{len(rows)} linears replaced; the module has {total}"])


@dataclass(frozen=True)
class _Planned:
    """One linear to replace: every dotted name that reaches it, and its own settings."""

    names: tuple[str, ...]
    linear: nn.Linear
    config: LostConfig


def inject(
    module: nn.Module,
    config: LostConfig,
    *,
    family_targets: Projections | None = None,
    seed: int = 0,
    processes: Processes = Processes(),  # noqa: B008
) -> InjectionReport:
    """Replaces the chosen nn.Linear modules inside `module` in place, each by the LOST layer of its weight.

    Dtype, device, training flag, requires_grad and biases are kept; a linear that is used at several places stays
    shared. On the meta device the modules are swapped and nothing is computed. A mistake changes nothing.

    Args:
        module: any module; a transformers model whose family is known needs no target_modules.
        config: the settings; its target_modules, rank_overrides and density_overrides name modules by patterns.
        family_targets: attention and MLP projections of a family that this project does not know.
        seed: random numbers of the options that draw any come from (seed, module name).
        processes: those that call this together for equal modules and share the factorisations; by default this one
            works alone.

    Raises:
        ConfigError: no linear matched, a pattern names nothing, the family is unknown, or a weight is tied.
        ShapeError: a rank is above min(in_features, out_features).
    """
    projections = family_targets or projections_of(module)
    linears = _linears_by_names(module)
    chosen = _chosen(module, config, projections, linears)
    plan = _planned(config, projections, chosen)
    problems = _tie_problems(module, plan) + _shape_problems(plan)
    if problems:
        raise ConfigError(problems)
    before = _num_parameters(module)
    layers = _filled_layers(plan, seed, processes)
    replaced = tuple(_replace(module, planned, layer) for planned, layer in zip(plan, layers, strict=True))
    return InjectionReport(replaced, before, _num_parameters(module))


def _linears_by_names(module: nn.Module) -> dict[tuple[str, ...], nn.Linear]:
    """Every plain nn.Linear under all its dotted names. Subclasses are left out: their owners read .weight."""
    names: dict[int, list[str]] = {}
    linears: dict[int, nn.Linear] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if type(child) is nn.Linear and name:
            names.setdefault(id(child), []).append(name)
            linears[id(child)] = child
    return {tuple(names[key]): linear for key, linear in linears.items()}


def _chosen(
    module: nn.Module,
    config: LostConfig,
    projections: Projections | None,
    linears: dict[tuple[str, ...], nn.Linear],
) -> dict[tuple[str, ...], nn.Linear]:
    """The linears that target_modules, or the family, name."""
    if not linears:
        hint = ": for the layer itself use LostLinear.from_linear" if isinstance(module, nn.Linear) else ""
        raise ConfigError(f"no nn.Linear inside this {type(module).__name__}, so there is nothing to replace{hint}")
    patterns: Sequence[str] = config.target_modules
    if not patterns:
        if projections is None:
            raise ConfigError(
                f"the attention and MLP projections of {_family_words(module)} are not known (known:"
                f" {', '.join(family_names())}): set target_modules to patterns of module names, or to [{ALL_LINEAR}];"
                f" its linears are {_some(names[0] for names in linears)}"
            )
        patterns = (*projections.attention, *projections.mlp)
        chosen = {names: linear for names, linear in linears.items() if _any_matches(names, patterns)}
    elif ALL_LINEAR in patterns:
        head = _output_head(module)
        chosen = {names: linear for names, linear in linears.items() if linear is not head}
    else:
        _require_matches("target_modules", patterns, linears)
        chosen = {names: linear for names, linear in linears.items() if _any_matches(names, patterns)}
    if not chosen:
        raise ConfigError(
            f"no nn.Linear matched {list(patterns)}; this module's linears are {_some(names[0] for names in linears)}"
        )
    return chosen


def _planned(
    config: LostConfig, projections: Projections | None, chosen: dict[tuple[str, ...], nn.Linear]
) -> list[_Planned]:
    """The settings of each chosen linear: overrides by name (the last match wins), activation by role."""
    _require_matches("rank_overrides", config.rank_overrides, chosen)
    _require_matches("density_overrides", config.density_overrides, chosen)
    roles = {names: projections.role(names[0]) if projections else None for names in chosen}
    if config.activation_modules != "all" and config.activation_modules not in roles.values():
        raise ConfigError(
            f"activation_modules = {config.activation_modules}: none of the chosen linears is known to be such a"
            " projection; use activation_modules=all, or a family whose projections are known"
        )
    return [_Planned(names, linear, _settings_of(config, names, roles[names])) for names, linear in chosen.items()]


def _settings_of(config: LostConfig, names: tuple[str, ...], role: str | None) -> LostConfig:
    """`config` for one linear: nothing in it names modules any more."""
    ranks = [rank for pattern, rank in config.rank_overrides.items() if _any_matches(names, [pattern])]
    densities = [density for pattern, density in config.density_overrides.items() if _any_matches(names, [pattern])]
    has_activation = config.activation_modules in ("all", role)
    return replace(
        config,
        lost_rank=([config.lost_rank] + ranks)[-1],
        density=([config.density] + densities)[-1],
        activation=config.activation if has_activation else "identity",
        activation_modules="all",
        target_modules=[],
        rank_overrides={},
        density_overrides={},
    )


def _require_matches(key: str, patterns: Sequence[str] | dict, linears: dict[tuple[str, ...], nn.Linear]) -> None:
    """Raises ConfigError for every pattern that names none of the linears."""
    all_names = [name for names in linears for name in names]
    problems = [
        f"{key}: {pattern} names no linear that is replaced; nearest: {nearest_names(pattern, all_names)}"
        for pattern in patterns
        if not _any_matches(all_names, [pattern])
    ]
    if problems:
        raise ConfigError(problems)


def _any_matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(matches_any(name, patterns) for name in names)


def _output_head(module: nn.Module) -> object:
    """The output embedding of a transformers model, which stays dense; None for any other module."""
    get_head = getattr(module, "get_output_embeddings", None)
    return get_head() if callable(get_head) else None


def _tie_problems(module: nn.Module, plan: list[_Planned]) -> list[str]:
    """A problem for every planned linear whose weight or bias another module also holds."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    is_tied_head = bool(getattr(getattr(module, "config", None), "tie_word_embeddings", False))
    head = _output_head(module)
    problems = []
    for planned in plan:
        own = {f"{name}.weight" for name in planned.names}
        others = [name for name in names_of[id(planned.linear.weight)] if name not in own]
        if planned.linear is head and is_tied_head and not others:
            others = ["the input embedding"]
        if others:
            problems.append(
                f"{planned.names[0]}.weight is tied with {', '.join(others)}: it cannot be replaced on one side only;"
                " leave it out of target_modules, or untie the weights"
            )
    return problems


def _shape_problems(plan: list[_Planned]) -> list[str]:
    problems = []
    for planned in plan:
        try:
            rank_of(planned.config.lost_rank, planned.linear.in_features, planned.linear.out_features)
        except LostError as error:
            problems.append(f"{planned.names[0]}: {error}; rank_overrides sets the rank of single modules")
    return problems


def _filled_layers(plan: list[_Planned], seed: int, processes: Processes) -> list[LostLinear]:
    """The LOST layer of every planned linear; those on the meta device are left without values."""
    layers = [LostLinear.like(planned.linear, planned.config) for planned in plan]
    pieces, places = [], []
    for place, (planned, layer) in enumerate(zip(plan, layers, strict=True)):
        weight = planned.linear.weight
        if not weight.is_meta:
            cost = factorisation_cost(layer.out_features, layer.in_features)
            compute = partial(layer.values_of, planned.linear, planned.config, layer_generator(seed, planned.names[0]))
            pieces.append(Piece(layer, cost, compute, weight.device))
            places.append(place)
    # A GPU's work gains nothing from several threads.
    is_on_cpu = all(piece.device.type == "cpu" for piece in pieces)
    for number, values in shared_values(pieces, processes, is_on_cpu=is_on_cpu):
        layers[places[number]].take(values, pieces[number].device)
    return layers


def _replace(module: nn.Module, planned: _Planned, layer: LostLinear) -> InjectedLayer:
    linear = planned.linear
    for name in planned.names:
        parent_name, _, child_name = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        setattr(parent, child_name, layer)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fast path in evaluation reads linear1.weight; 0 means an activation that the fast path has not.
            parent.activation_relu_or_gelu = 0
    return InjectedLayer(
        name=planned.names[0],
        in_features=layer.in_features,
        out_features=layer.out_features,
        lost_rank=layer.lost_rank,
        num_kept=layer.num_kept,
        activation=layer.activation,
        num_parameters_before=_num_parameters(linear),
        num_parameters_after=_num_parameters(layer),
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _family_words(module: nn.Module) -> str:
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return f"model type {model_type}" if model_type else f"a plain {type(module).__name__}"


def _some(names) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
