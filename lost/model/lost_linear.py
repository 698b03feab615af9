"""LostLinear: a linear layer as low-rank factors with an activation, plus a block of kept channels.

Shapes: N out_features, K in_features, R lost_rank, S kept channels.
"""

from collections.abc import Callable
from typing import Self

import torch
from lost_kernels.lost_linear import LostWeights, lost_linear
from torch import Tensor, nn

from lost.accounting.targets import kept_count, rank_count
from lost.config.model import Activation, LostConfig
from lost.config.section import CountOrFraction
from lost.model.drawn_init import draw_factors
from lost.model.lost_init import FreshWeight, factorise
from lost.utils.errors import ConfigError, ShapeError

INITIAL_STD = 0.02


def rank_of(lost_rank: CountOrFraction, in_features: int, out_features: int) -> int:
    """R as a count: a float is a fraction of min(in_features, out_features), rounded down, at least 1.

    Raises:
        ShapeError: the rank is above min(in_features, out_features) or below 1.
    """
    largest = min(in_features, out_features)
    rank = rank_count(lost_rank, largest)
    if not 1 <= rank <= largest or (isinstance(lost_rank, float) and not 0 < lost_rank <= 1):
        raise ShapeError(
            f"lost_rank = {lost_rank} for a linear {in_features} -> {out_features}: choose a rank from 1 to"
            f" min(in_features, out_features) = {largest}, or a fraction above 0 and at most 1"
        )
    return rank


class LostLinear(nn.Module):
    """y = gamma * act(x A^T) B^T + (1 - gamma) * x[..., I] W_s^T + bias.

    Built directly it holds usable weights: W0 ~ N(0, 0.02^2) from torch's global generator, factorised.
    On the meta device nothing is drawn. Parameters and buffers:

        low_rank_down: A, [R, K].
        low_rank_up: B, [N, R].
        sparse_weight: W_s, [N, S] (selection_axis = rows: [S, K]); None where density is 0.
        sparse_index: I, the kept channels, sorted, int64 [S], a persistent buffer; None where density is 0.
        gamma: a Python float (fixed), a parameter [1] of at least float32 (learnable) or None (folded).
        bias: [N] or None.

    Args:
        lost_rank: R as a count, or as a fraction of min(in_features, out_features).
        density: fraction of the channels kept by the sparse block, 0 to 1.
        gamma: weight of the low-rank part, 0 to 1.
        activation: silu, identity, gelu or relu, between the factors.
        gamma_mode: fixed, learnable or folded (multiplied into the initial weights, then gone).
        selection_axis: columns (the block reads S input channels) or rows (it writes S output channels).

    Raises:
        ShapeError: the rank is above min(in_features, out_features).
        ConfigError: density or gamma outside [0, 1], or an unknown word.
    """

    low_rank_down: nn.Parameter
    low_rank_up: nn.Parameter
    sparse_weight: nn.Parameter | None
    sparse_index: Tensor | None
    bias: nn.Parameter | None
    gamma: float | nn.Parameter | None
    # How the map is computed (`lost_kernels.lost_linear`): set by the training runtime (runtime.kernels).
    kernels: str = "auto"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lost_rank: CountOrFraction,
        density: float = 0.01,
        gamma: float = 0.7,
        activation: Activation = "silu",
        bias: bool = False,
        gamma_mode: str = "fixed",
        selection_axis: str = "columns",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        # A LostConfig checks every value, with the messages that the command line shows.
        self._config = LostConfig(
            lost_rank=lost_rank,
            density=density,
            gamma=gamma,
            activation=activation,
            gamma_mode=gamma_mode,  # pyright: ignore[reportArgumentType]
            selection_axis=selection_axis,  # pyright: ignore[reportArgumentType]
        )
        self.in_features, self.out_features = in_features, out_features
        self.lost_rank = rank_of(lost_rank, in_features, out_features)
        self.selection_axis = selection_axis
        self.num_kept = kept_count(density, in_features if selection_axis == "columns" else out_features)
        self.activation = activation
        self.gamma_mode = gamma_mode
        self.initial_gamma = float(gamma)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.low_rank_down = parameter(self.lost_rank, in_features)
        self.low_rank_up = parameter(out_features, self.lost_rank)
        sparse_shape = (out_features, self.num_kept) if selection_axis == "columns" else (self.num_kept, in_features)
        self.register_parameter("sparse_weight", parameter(*sparse_shape) if self.num_kept else None)
        index = torch.arange(self.num_kept, device=device, dtype=torch.int64) if self.num_kept else None
        self.register_buffer("sparse_index", index)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        if gamma_mode == "learnable":
            self.gamma = nn.Parameter(torch.full((1,), self.initial_gamma, device=device, dtype=torch.float32))
        else:
            self.gamma = self.initial_gamma if gamma_mode == "fixed" else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """New weights from W0 ~ N(0, 0.02^2), bias zero; nothing on the meta device."""
        if self.low_rank_down.is_meta:
            return
        weight = FreshWeight((self.out_features, self.in_features), INITIAL_STD, generator)
        self.initialise(weight, self._config, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def initialise(
        self, dense_weight: Tensor | FreshWeight, config: LostConfig, generator: torch.Generator | None = None
    ) -> None:
        """Sets every weight but the bias to `initial_values`."""
        for name, value in self.initial_values(dense_weight, config, generator).items():
            getattr(self, name).copy_(value)

    @torch.no_grad()
    def initial_values(
        self, dense_weight: Tensor | FreshWeight, config: LostConfig, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Parameters and buffers but the bias, by name, from the dense weight W0, [N, K], by the rules of `config`.

        Args:
            dense_weight: W0, not changed; or what it would be drawn from.
            config: how the factors and the sparse block start (complement_span, score, factor_init, ...).
            generator: random numbers of the options that draw any.

        Returns:
            Full tensors in float64 on the device of W0; nothing of the layer itself is read but its sizes.

        Raises:
            ShapeError: W0 is not [N, K].
            ConfigError: the options of `config` do not fit this W0 (`factorise`, `draw_factors`).
        """
        if tuple(dense_weight.shape) != (self.out_features, self.in_features):
            raise ShapeError(
                f"dense weight {list(dense_weight.shape)}: this layer takes [out_features, in_features]"
                f" = [{self.out_features}, {self.in_features}]"
            )
        if config.init == "draw":
            factors = draw_factors(dense_weight, config, self.lost_rank, self.num_kept, generator)
        else:
            weight = dense_weight.draw() if isinstance(dense_weight, FreshWeight) else dense_weight
            factors = factorise(weight, config, self.lost_rank, self.num_kept, generator)
        up_scale = sparse_scale = 1.0
        if self.gamma_mode == "folded":
            up_scale, sparse_scale = self.initial_gamma, 1 - self.initial_gamma
        values = {"low_rank_down": factors.low_rank_down, "low_rank_up": factors.low_rank_up * up_scale}
        if factors.sparse_weight is not None and factors.sparse_index is not None:
            values["sparse_weight"] = factors.sparse_weight * sparse_scale
            values["sparse_index"] = factors.sparse_index
        if isinstance(self.gamma, nn.Parameter):
            values["gamma"] = torch.full((1,), self.initial_gamma, dtype=torch.float64)
        return values

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: LostConfig, *, generator: torch.Generator | None = None) -> Self:
        """The LOST layer of `linear`: its weight factorised, its bias copied; dtype, device and flags kept.

        Args:
            linear: on the meta device the result is there too, without values.
            config: the settings of this one layer.
            generator: random numbers of the options that draw any; torch's global ones by default.

        Raises:
            ConfigError: `config` has settings that need module names (overrides, activation_modules).
            ShapeError: the rank is above min(in_features, out_features).
        """
        layer = cls.like(linear, config)
        if not linear.weight.is_meta:
            layer.take(layer.values_of(linear, config, generator), linear.weight.device)
        return layer

    @classmethod
    def like(cls, linear: nn.Linear, config: LostConfig) -> Self:
        """`from_linear` on the meta device: sizes, dtype and flags without values."""
        named = [key for key in ("rank_overrides", "density_overrides", "target_modules") if getattr(config, key)]
        named += [] if config.activation_modules == "all" else ["activation_modules"]
        if named:
            raise ConfigError(
                f"{', '.join(named)} choose by module name, and a single layer has none: use lost.inject on the"
                " model, or give the layer's own lost_rank, density and activation"
            )
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            lost_rank=config.lost_rank,
            density=config.density,
            gamma=config.gamma,
            activation=config.activation,
            bias=linear.bias is not None,
            gamma_mode=config.gamma_mode,
            selection_axis=config.selection_axis,
            device="meta",
            dtype=weight.dtype,
        )
        layer._config = config
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(linear.bias.requires_grad if name == "bias" else weight.requires_grad)
        return layer.train(linear.training)

    def values_of(
        self, linear: nn.Linear, config: LostConfig, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`initial_values` from the weight of `linear`, and its bias."""
        bias = {} if linear.bias is None else {"bias": linear.bias.detach()}
        return self.initial_values(linear.weight.detach(), config, generator) | bias

    @torch.no_grad()
    def take(self, values: dict[str, Tensor], device: torch.device) -> None:
        """Memory on `device` for a layer on the meta device, and the values of all its parameters and buffers."""
        self.to_empty(device=device)
        for name, value in values.items():
            getattr(self, name).copy_(value)

    @property
    def weights(self) -> LostWeights:
        return LostWeights(
            self.low_rank_down, self.low_rank_up, self.sparse_weight, self.sparse_index, self.gamma, self.bias
        )

    @property
    def uses_operators(self) -> bool:
        """Whether it is computed otherwise than by autograd of the definition, which the rows form has only."""
        return self.kernels != "reference" and self.selection_axis == "columns"

    def forward(self, x: Tensor) -> Tensor:
        return lost_linear(
            x,
            self.low_rank_down,
            self.low_rank_up,
            self.sparse_weight,
            self.sparse_index,
            self.gamma,
            self.activation,
            self.bias,
            selection_axis=self.selection_axis,
            kernels=self.kernels,
        )

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix W, [N, K], for which this layer is x W^T + bias, summed in float64 and rounded once to `dtype`.

        Args:
            dtype: of W; None: the layer's.

        Raises:
            ConfigError: the activation is not identity, so that no such matrix exists.
        """
        if self.activation != "identity":
            raise ConfigError(
                f"activation = {self.activation}: a layer with an activation between its factors is no single"
                " matrix; only activation = identity has a dense weight"
            )
        up_scale, sparse_scale = (1.0, 1.0) if self.gamma is None else (self.gamma, 1 - self.gamma)
        weight = up_scale * (self.low_rank_up.double() @ self.low_rank_down.double())
        if self.sparse_weight is not None and self.sparse_index is not None:
            axis = 1 if self.selection_axis == "columns" else 0
            weight.index_add_(axis, self.sparse_index, sparse_scale * self.sparse_weight.double())
        return weight.to(dtype or self.low_rank_up.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts like any module, but a learnable gamma keeps at least float32.

        In bfloat16 the steps between neighbours of 0.7 are 0.4 %: small updates would round away.
        """
        gamma = self.gamma.data if isinstance(self.gamma, nn.Parameter) else None
        super()._apply(fn, recurse)
        if gamma is not None and isinstance(self.gamma, nn.Parameter) and self.gamma.dtype.itemsize < 4:
            self.gamma.data = gamma.to(self.gamma.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, lost_rank={self.lost_rank},"
            f" num_kept={self.num_kept}, selection_axis={self.selection_axis}, activation={self.activation},"
            f" gamma={self.initial_gamma} ({self.gamma_mode}), bias={self.bias is not None}"
        )
