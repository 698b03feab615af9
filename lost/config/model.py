"""Settings of the architecture and of the form of its linear layers."""

from dataclasses import dataclass
from typing import Literal

from lost.config.section import CountOrFraction, CrossRule, Section, count_or_fraction_problem, setting

SMALLER_WIDTH = "min(in_features, out_features)"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A LLaMA architecture; the keys are those of Hugging Face's LlamaConfig."""

    name: str = setting("name of the size, used in run_dir")
    vocab_size: int = setting("rows of the embedding", above=0, unit="tokens", is_fixed_on_resume=True)
    hidden_size: int = setting("width of the residual stream", above=0, is_fixed_on_resume=True)
    intermediate_size: int = setting("width inside the MLP", above=0, is_fixed_on_resume=True)
    num_hidden_layers: int = setting("number of blocks", above=0, is_fixed_on_resume=True)
    num_attention_heads: int = setting("number of query heads", above=0, is_fixed_on_resume=True)
    num_key_value_heads: int = setting("number of key and value heads", above=0, is_fixed_on_resume=True)
    max_position_embeddings: int = setting("longest sequence", 1024, above=0, unit="tokens", is_fixed_on_resume=True)
    rms_norm_eps: float = setting("epsilon of RMSNorm", 1e-6, above=0, is_fixed_on_resume=True)
    rope_theta: float = setting("base of the rotary embedding", 10000.0, above=0, is_fixed_on_resume=True)
    initializer_range: float = setting("std of the dense initial weights", 0.02, above=0, is_fixed_on_resume=True)
    tie_word_embeddings: bool = setting("share embedding and lm_head", False, is_fixed_on_resume=True)
    lineage_rank: int = setting(
        "rank that the papers use at this size; the default of parameterization.lost_rank", above=0
    )

    def cross_rules(self) -> list[CrossRule]:
        return [
            ("num_attention_heads", self._head_problems),
            ("num_key_value_heads", self._key_value_head_problems),
        ]

    def _head_problems(self) -> list[str]:
        size, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest:
            return [
                f"num_attention_heads = {self.num_attention_heads} does not divide hidden_size = {self.hidden_size}:"
                " choose a divisor"
            ]
        if size % 2:
            return [f"hidden_size / num_attention_heads = {size} is odd: the rotary embedding needs an even head size"]
        return []

    def _key_value_head_problems(self) -> list[str]:
        if self.num_attention_heads % self.num_key_value_heads == 0:
            return []
        return [
            f"num_key_value_heads = {self.num_key_value_heads} does not divide"
            f" num_attention_heads = {self.num_attention_heads}: choose a divisor"
        ]


Activation = Literal["silu", "identity", "gelu", "relu"]


@dataclass(frozen=True, kw_only=True)
class ParameterizationConfig(Section):
    """How each linear layer of attention and MLP is parameterised."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig(ParameterizationConfig):
    """Plain nn.Linear: transformers' own LLaMA."""

    name: Literal["dense"] = setting("plain nn.Linear", "dense", is_fixed_on_resume=True)


@dataclass(frozen=True, kw_only=True)
class LostConfig(ParameterizationConfig):
    """LOST: y = gamma * act(x A^T) B^T + (1 - gamma) * x[:, I] W_s^T (arXiv 2508.02668)."""

    name: Literal["lost"] = setting("low-rank factors plus kept channels", "lost", is_fixed_on_resume=True)
    lost_rank: CountOrFraction = setting(
        "rank R of the factors; a fraction is of min(in_features, out_features)", 0.25, is_fixed_on_resume=True
    )
    density: float = setting(
        "fraction of input channels kept by the sparse block; 0 = none",
        0.01,
        at_least=0,
        at_most=1,
        is_fixed_on_resume=True,
    )
    gamma: float = setting(
        "weight of the low-rank part, 1 - gamma that of the sparse part",
        0.7,
        at_least=0,
        at_most=1,
        is_fixed_on_resume=True,
    )
    gamma_mode: Literal["fixed", "learnable", "folded"] = setting(
        "fixed; learnable: one trained scalar a layer; folded: multiplied into the initial weights, then gone",
        "fixed",
        is_fixed_on_resume=True,
    )
    activation: Activation = setting("function between the factors", "silu", is_fixed_on_resume=True)
    activation_modules: Literal["all", "attention", "mlp"] = setting(
        "projections that have the activation; the others use identity", "all", is_fixed_on_resume=True
    )
    complement_span: Literal["all", "next", "smallest", "whole"] = setting(
        "triplets that score the channels: all after the first R, the next or the smallest span_triplets, or all of W0",
        "all",
        is_fixed_on_resume=True,
    )
    span_triplets: int = setting(
        "triplets of complement_span next and smallest", 256, at_least=1, is_fixed_on_resume=True
    )
    score: Literal["l2", "l1", "random"] = setting("norm of a channel that ranks it", "l2", is_fixed_on_resume=True)
    selection_axis: Literal["columns", "rows"] = setting(
        "keep input channels (columns of W0) or output channels (rows)", "columns", is_fixed_on_resume=True
    )
    sparse_values: Literal["original", "complement", "kaiming", "zero"] = setting(
        "initial values of the sparse block", "original", is_fixed_on_resume=True
    )
    factor_init: Literal["svd", "cola", "xavier", "kaiming_a_zero_b"] = setting(
        "initial values of the factors", "svd", is_fixed_on_resume=True
    )
    dense_init: Literal["model", "kaiming", "xavier", "orthogonal"] = setting(
        "initial dense weight W0 that is factorised", "model", is_fixed_on_resume=True
    )
    init: Literal["auto", "svd", "gram", "draw"] = setting(
        "how W0 is factorised; gram: eigenvectors of W0^T W0 in float64; auto: gram where it is exact, else svd;"
        " draw: not at all, factors are drawn as a Gaussian W0 would give them, the sparse block approximately",
        "auto",
        is_fixed_on_resume=True,
    )
    target_modules: list[str] = setting(
        "patterns of module names to replace ('*' wildcards match the end of the dotted name);"
        " empty: the attention and MLP projections of the family; all_linear: every nn.Linear",
        [],
        is_fixed_on_resume=True,
    )
    rank_overrides: dict[str, CountOrFraction] = setting(
        "pattern of module names to lost_rank", {}, is_fixed_on_resume=True
    )
    density_overrides: dict[str, float] = setting("pattern of module names to density", {}, is_fixed_on_resume=True)

    def cross_rules(self) -> list[CrossRule]:
        return [
            ("lost_rank", lambda: count_or_fraction_problem("lost_rank", self.lost_rank, SMALLER_WIDTH)),
            ("rank_overrides", self._rank_override_problems),
            ("density_overrides", self._density_override_problems),
            ("gamma", self._zero_problems),
            ("init", self._draw_problems),
        ]

    def _rank_override_problems(self) -> list[str]:
        return [
            problem
            for pattern, rank in self.rank_overrides.items()
            for problem in count_or_fraction_problem(f"rank_overrides.{pattern}", rank, SMALLER_WIDTH)
        ]

    def _density_override_problems(self) -> list[str]:
        return [
            f"density_overrides.{pattern} = {density}: must be from 0 to 1"
            for pattern, density in self.density_overrides.items()
            if not 0 <= density <= 1
        ]

    def _zero_problems(self) -> list[str]:
        if self.gamma == 0 and self.density == 0 and not self.density_overrides:
            return ["gamma = 0 with density = 0: the layer would be zero; raise one of them"]
        return []

    def _draw_problems(self) -> list[str]:
        allowed = {
            "dense_init": ("model", "xavier"),
            "factor_init": ("svd",),
            "complement_span": ("all",),
            "score": ("l2", "random"),
            "sparse_values": ("original", "complement", "zero"),
        }
        if self.init != "draw":
            return []
        return [
            f"{key} = {getattr(self, key)} with init = draw: draw stands for the factorisation of a Gaussian W0 and"
            f" knows {key} = {' or '.join(words)} only; choose that, or init=auto"
            for key, words in allowed.items()
            if getattr(self, key) not in words
        ]
