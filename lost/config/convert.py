"""Settings of `lost convert`."""

from dataclasses import dataclass
from typing import Literal

from lost.config.data import DataConfig
from lost.config.model import SMALLER_WIDTH, Activation
from lost.config.runtime import DeviceConfig, EvaluationConfig
from lost.config.section import CountOrFraction, CrossRule, Section, count_or_fraction_problem, setting


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Section):
    """Everything of `lost convert`: a dense model in, the same model with LOST layers out."""

    source: str = setting("dense model: an exported or released folder, a finished run, or a hub id")
    to: str = setting("folder to write")
    lost_rank: CountOrFraction = setting(
        f"rank of every layer: a count, or a fraction of {SMALLER_WIDTH}; 0: given by energy or parameters", 0
    )
    energy: float = setting(
        "share of each layer's energy (its squared singular values) that its rank keeps; a layer whose rank would save"
        " nothing stays dense; 0: given by lost_rank or parameters",
        0.0,
        at_least=0,
        at_most=1,
    )
    parameters: CountOrFraction = setting(
        "most parameters of the whole converted model: a count, or a fraction of the dense model's; the layers' spectra"
        " decide who gets which rank; 0: given by lost_rank or energy",
        0,
    )
    rank_overrides: dict[str, CountOrFraction] = setting("pattern of module names to lost_rank, before all else", {})
    density: float = setting(
        "fraction of input channels kept by the sparse block; 0 = none", 0.01, at_least=0, at_most=1
    )
    density_overrides: dict[str, float] = setting("pattern of module names to density", {})
    gamma: float = setting("weight of the low-rank part; the factors absorb 1 / gamma", 0.7, above=0, below=1)
    gamma_mode: Literal["fixed", "learnable", "folded"] = setting(
        "fixed; learnable: one trained scalar a layer; folded: none, the weights are as they are multiplied", "fixed"
    )
    activation: Activation = setting(
        "function between the factors; anything but identity changes what the trained weights compute", "identity"
    )
    target_modules: list[str] = setting(
        "patterns of module names to replace; empty: the attention and MLP projections of the family", []
    )
    require_saving: bool = setting("a layer that gets no smaller is an error; false: convert it all the same", True)
    calibration_tokens: int = setting(
        "tokens of data's training documents; the error of an input channel then counts by its RMS on them; 0: all"
        " channels count alike",
        0,
        at_least=0,
        unit="tokens",
    )
    dtype: Literal["source", "fp32", "bf16", "fp16"] = setting("dtype of the weights written", "source")
    max_shard_gib: float = setting(
        "largest file of weights; conversion holds about two of them", 1.0, above=0, unit="GiB"
    )
    perplexity: bool = setting("measure perplexity on data's validation set before and after", True)
    data: DataConfig = setting("documents of perplexity and calibration; unless said, those of the run `source` is of")
    seq_len: int = setting("length of a row of them; unless said, the run's", 256, at_least=2, unit="tokens")
    evaluation: EvaluationConfig = setting("how much of the validation set")
    runtime: DeviceConfig = setting("device and precision")

    def cross_rules(self) -> list[CrossRule]:
        return [
            ("lost_rank", self._one_rank_problems),
            ("lost_rank", self._rank_problems),
            ("parameters", self._parameter_problems),
            ("rank_overrides", self._override_problems),
            ("density_overrides", self._density_problems),
        ]

    def _one_rank_problems(self) -> list[str]:
        given = [key for key in ("lost_rank", "energy", "parameters") if getattr(self, key) != 0]
        if len(given) == 1:
            return []
        what = " and ".join(given) + " each say it" if given else "nothing says it"
        return [
            f"how large should the converted model be? {what}: give one of lost_rank (a count or a fraction),"
            " energy (such as 0.9) and parameters (such as 0.5)"
        ]

    def _rank_problems(self) -> list[str]:
        return [] if self.lost_rank == 0 else count_or_fraction_problem("lost_rank", self.lost_rank, SMALLER_WIDTH)

    def _parameter_problems(self) -> list[str]:
        if self.parameters == 0:
            return []
        return count_or_fraction_problem("parameters", self.parameters, "the dense model's parameters")

    def _override_problems(self) -> list[str]:
        return [
            problem
            for pattern, rank in self.rank_overrides.items()
            for problem in count_or_fraction_problem(f"rank_overrides.{pattern}", rank, SMALLER_WIDTH)
        ]

    def _density_problems(self) -> list[str]:
        return [
            f"density_overrides.{pattern} = {density}: must be from 0 to 1"
            for pattern, density in self.density_overrides.items()
            if not 0 <= density <= 1
        ]
