"""Adapters in LOST form beside frozen layers: base(x) + (alpha / r) * LOST(x). N out_features, K in_features."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lost.config.finetune import LostAdapterMethodConfig
from lost.config.model import LostConfig
from lost.model.lost_init import layer_generator
from lost.model.lost_linear import LostLinear
from lost.model.targets import matches_any, nearest_names
from lost.utils.errors import ConfigError, LostError

# Before the names of what the trained tensors were at the start, among the buffers of an adapter that began by SVD.
INITIAL = "initial_"


class LostAdapter(nn.Module):
    """A frozen layer and a trained LOST layer of the same widths beside it.

    Args:
        base: an nn.Linear or a LostLinear, frozen here.
        delta: what is trained.
        scale: alpha / r.
    """

    def __init__(self, base: nn.Module, delta: LostLinear, scale: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.delta = delta
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.delta(x)

    @property
    def is_linear(self) -> bool:
        """Whether the sum is a single matrix product that a plain nn.Linear can take over."""
        return isinstance(self.base, nn.Linear) and self.delta.activation == "identity"

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base with the adapter added to its weight, summed in float64."""
        assert isinstance(self.base, nn.Linear), self.base
        weight = self.base.weight
        added = self.scale * dense_weight(self.delta)
        weight.copy_((weight.double() + added).to(weight.dtype))
        return self.base


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and LostLinear of the repeated blocks (the longest ModuleList) by its dotted name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of blocks: name its layers by method.target_modules")
    name, repeated = max(lists.items(), key=lambda entry: len(entry[1]))
    found = {f"{name}.{inner}": module for inner, module in repeated.named_modules()}
    return {key: module for key, module in found.items() if is_adaptable(module)}


def is_adaptable(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, LostLinear)


def adapter_targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that get an adapter, by name.

    Raises:
        ConfigError: a pattern names no linear layer (says the nearest names), or one whose weight is another module's
            too. Or there is none in the blocks.
    """
    if not patterns:
        found = block_linears(model)
        if not found:
            raise ConfigError(
                f"the blocks of {type(model).__name__} have no linear layer that an adapter goes beside (nn.Linear or"
                " LOST): use method=full, or name layers by method.target_modules"
            )
        return found
    linears = {name: module for name, module in model.named_modules() if is_adaptable(module)}
    problems = [
        f"method.target_modules: {pattern} names no linear layer; nearest: {nearest_names(pattern, linears)}"
        for pattern in patterns
        if not any(matches_any(name, [pattern]) for name in linears)
    ]
    chosen = {name: module for name, module in linears.items() if matches_any(name, patterns)}
    problems += [
        f"method.target_modules: the weight of {name} is that of {other} too, which an adapter would change with it:"
        f" leave {name} out, or untie them (tie_word_embeddings=false)"
        for name, other in owners_of_shared_weights(model, chosen).items()
    ]
    if problems:
        raise ConfigError(problems)
    return chosen


def owners_of_shared_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each of the layers that has a parameter in common with another module: that module's name."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    shared = {}
    for name, layer in layers.items():
        others = {other for parameter in layer.parameters() for other in owners[id(parameter)]} - {name}
        if others:
            shared[name] = min(others)
    return shared


@torch.no_grad()
def add_lost_adapters(
    model: nn.Module, method: LostAdapterMethodConfig, seed: int, stored: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Puts an adapter in the place of every chosen layer; the names of those layers.

    The function of the model stays what it was (but for rounding with init = svd), or with `stored` becomes what it was
    when those tensors were saved.

    Args:
        seed: random numbers come from (seed, layer name).
        stored: trained tensors and buffers of the adapted model by name, from a checkpoint or an adapter folder.
    Raises:
        ConfigError: a pattern names no layer, or init = svd on a layer that is no dense matrix.
        LostError: a rank above a layer's width, or `stored` lacks a tensor.
    """
    targets = adapter_targets(model, method.target_modules)
    for name, base in targets.items():
        values = initial_values(name, base, method, seed) if stored is None else stored_values(name, stored)
        adapter = LostAdapter(base, delta_of(name, base, method), method.alpha / method.rank)
        own = {key: value for key, value in values.items() if not key.startswith(INITIAL)}
        missing = sorted(set(adapter.delta.state_dict()) - set(own))
        if missing:
            raise LostError(f"the adapter of {name} lacks {', '.join(missing)}: it is not complete")
        adapter.delta.take(own, next(base.parameters()).device)
        if method.init == "svd":
            keep_start(adapter, values)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter)
    return list(targets)


def delta_of(name: str, base: nn.Module, method: LostAdapterMethodConfig) -> LostLinear:
    """The LOST layer for a base, without values."""
    out_features, in_features = widths(base)
    if method.rank > min(in_features, out_features):
        raise LostError(
            f"method.rank = {method.rank} is above the smaller width of {name}, {min(in_features, out_features)}: lower"
            " it, or leave the layer out of method.target_modules"
        )
    return LostLinear(
        in_features,
        out_features,
        lost_rank=method.rank,
        density=method.density,
        gamma=method.gamma,
        activation=method.activation,
        device="meta",
        dtype=next(base.parameters()).dtype,
    )


def widths(base: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    assert isinstance(base, nn.Linear | LostLinear), base
    return base.out_features, base.in_features


def initial_values(name: str, base: nn.Module, method: LostAdapterMethodConfig, seed: int) -> dict[str, Tensor]:
    """What the adapter of a layer starts from, in float64: the factors of W's SVD and columns of W, or B = W_s = 0.

    With init = zero the kept channels are those that the layer weighs most (of a LOST layer with an activation between
    its factors, as if it had none).
    """
    is_svd = method.init == "svd"
    if is_svd and not isinstance(base, nn.Linear):
        raise ConfigError(f"method.init = svd: {name} is no dense layer (it is LOST already); use method.init=zero")
    config = LostConfig(
        lost_rank=method.rank,
        density=method.density,
        gamma=method.gamma,
        factor_init="svd" if is_svd else "kaiming_a_zero_b",
        sparse_values="original" if is_svd else "zero",
        complement_span="all" if is_svd else "whole",
    )
    weight = base.weight if isinstance(base, nn.Linear) else dense_weight(base)
    return delta_of(name, base, method).initial_values(weight.detach(), config, layer_generator(seed, name))


def dense_weight(layer: nn.Module) -> Tensor:
    """The matrix of a LOST layer as if nothing stood between its factors, float64 [N, K]."""
    assert isinstance(layer, LostLinear), layer
    up, down = layer.low_rank_up.double(), layer.low_rank_down.double()
    gamma = None if layer.gamma is None else float(layer.gamma)
    weight = (1.0 if gamma is None else gamma) * (up @ down)
    if layer.sparse_weight is not None and layer.sparse_index is not None:
        axis = 1 if layer.selection_axis == "columns" else 0
        scale = 1.0 if gamma is None else 1 - gamma
        weight.index_add_(axis, layer.sparse_index, scale * layer.sparse_weight.double())
    return weight


def stored_values(name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one adapter.

    Raises:
        LostError: there are none: the adapter is of another model.
    """
    prefix = f"{name}.delta."
    found = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    if not found:
        raise LostError(f"the adapter has nothing for the layer {name}: it was made for another model")
    return found


def keep_start(adapter: LostAdapter, values: Mapping[str, Tensor]) -> None:
    """Takes what the adapter makes at the start off the base, and keeps it among the buffers."""
    delta, base = adapter.delta, adapter.base
    assert isinstance(base, nn.Linear), base
    names = [name for name, _ in delta.named_parameters()]
    trained = {name: getattr(delta, name).clone() for name in names}
    for name in names:
        start = values.get(f"{INITIAL}{name}", values[name]).to(trained[name])
        delta.register_buffer(f"{INITIAL}{name}", start)
        getattr(delta, name).copy_(start)
    # From the rounded start, so that both together are the model's own function.
    base.weight.copy_((base.weight.double() - adapter.scale * dense_weight(delta)).to(base.weight.dtype))
    for name in names:
        getattr(delta, name).copy_(trained[name])


def merge_lost_adapters(model: nn.Module) -> list[str]:
    """Adds every adapter to its layer; names of those that stay because the sum is no single matrix."""
    left = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, LostAdapter):
            continue
        if not module.is_linear:
            left.append(name)
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.merged())
    return left
