"""Random groups of LOST layers for tests with what the definition says of them; gradients in several processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lost_kernels.lost_linear import LostWeights, reference_lost_linear
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lost.config.model import LostConfig, ModelConfig
from lost.model import build_model
from lost.testing.numerics import assert_close
from lost.train.wrap import set_kernels
from lost.utils.tensors import whole_of

IN_FEATURES = 13
# (R, S, N) of each member: odd, all different, the second without a sparse block.
SIZES = ((5, 3, 11), (4, 0, 7), (3, 6, 2))
KINDS = ("fixed", "learnable", "folded")


@dataclass
class Case:
    """Random arguments of `lost_group`; everything that is trained has a gradient."""

    x: Tensor
    members: list[LostWeights]
    activation: str = "silu"

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {
            f"{name} {number}": value
            for number, member in enumerate(self.members)
            for name, value in member._asdict().items()
        }
        tensors = {"x": self.x, **named}
        return {name: v for name, v in tensors.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def outputs(self, function: Callable | None = None) -> dict[str, Tensor]:
        """y_g and the gradients of a fixed random weighting of all y, by name; by default those of the definition."""
        if function is None:
            ys = [reference_lost_linear(self.x, *m[:5], self.activation, m.bias) for m in self.members]
        else:
            ys = function(self.x, self.members, self.activation)
        generator = torch.Generator().manual_seed(9)
        weighted = [(y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in ys]
        total = torch.stack(weighted).sum()
        gradients = torch.autograd.grad(total, list(self.leaves.values()))
        named = {f"y {number}": y for number, y in enumerate(ys)}
        return named | dict(zip(self.leaves, gradients, strict=True))

    def cast(self, dtype: torch.dtype) -> "Case":
        """Leaves of that dtype with these values; gammas at least float32."""

        def leaf(value, own=dtype):
            is_leaf = isinstance(value, Tensor) and value.is_floating_point()
            return value.detach().to(own).requires_grad_() if is_leaf else value

        wide = torch.promote_types(dtype, torch.float32)
        members = [LostWeights(*map(leaf, m))._replace(gamma=leaf(m.gamma, wide)) for m in self.members]
        return Case(leaf(self.x), members, self.activation)


def case(
    sizes: tuple = SIZES,
    kind: str = "fixed",
    *,
    has_bias: bool = True,
    activation: str = "silu",
    shape: tuple = (2, 3),
    in_features: int = IN_FEATURES,
    seed: int = 0,
) -> Case:
    """A group of members of the given (R, S, N), gammas of one of KINDS, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    def member(number: int, rank: int, num_kept: int, out_features: int) -> LostWeights:
        value = 0.3 + 0.2 * number
        gamma = {"fixed": value, "folded": None, "learnable": torch.tensor([value], dtype=torch.float64)}[kind]
        return LostWeights(
            normal(rank, in_features),
            normal(out_features, rank),
            normal(out_features, num_kept) if num_kept else None,
            torch.randperm(in_features, generator=generator)[:num_kept].sort().values if num_kept else None,
            gamma.requires_grad_() if isinstance(gamma, Tensor) else gamma,
            normal(out_features) if has_bias else None,
        )

    return Case(normal(*shape, in_features), [member(n, *own) for n, own in enumerate(sizes)], activation)


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], limit: str) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert_close(value, expected[name], limit, name)


SMALL = ModelConfig(
    name="small",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=63,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    lineage_rank=5,
)


def model_gradients(index: int, wrapper: str, kernels: str, is_compiled: bool) -> dict[str, Tensor]:
    """Gradients of a small model, averaged over the processes, each of which has its own rows.

    Args:
        index: of this process.
        wrapper: ddp, fsdp2, or none: one process computes the rows of both.
        kernels: as runtime.kernels.
        is_compiled: every block by itself.
    """
    net: Any = build_model(SMALL, LostConfig(lost_rank=5, density=0.1), seed=0, dtype=torch.float64).train()
    set_kernels(net, kernels)
    if is_compiled:
        for block in net.model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    if wrapper == "fsdp2":
        for block in net.model.layers:
            fully_shard(block)
        fully_shard(net)
    wrapped = DistributedDataParallel(net) if wrapper == "ddp" else net
    ids = torch.randint(97, (4, 11), generator=torch.Generator().manual_seed(3))
    own = ids if wrapper == "none" else ids[index::2]
    wrapped(own, labels=own, use_cache=False).loss.backward()
    return {name: whole_of(parameter.grad) for name, parameter in net.named_parameters()}
