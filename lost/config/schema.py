"""Every setting of every command: typed, documented, with units and rules.

A base section with subclasses (parameterization, data, optimizer, ...) is a choice: one YAML folder in configs/,
one subclass a choice, so that a key which the chosen one does not have is an error and never silently ignored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lost.config.section import Section, setting

# An int is a count; a float above 0 and up to 1 is a fraction of what the key's doc names.
CountOrFraction = int | float
# The field to blame and the rule: see Section.cross_rules.
CrossRule = tuple[str, Callable[[], list[str]]]
SMALLER_WIDTH = "min(in_features, out_features)"


def count_or_fraction_problem(key: str, value: CountOrFraction, of: str, minimum: int = 1) -> list[str]:
    """The problem of an int below `minimum` or a float outside (0, 1], as a list of at most one."""
    if isinstance(value, int):
        return [] if value >= minimum else [f"{key} = {value}: a count must be at least {minimum}"]
    return [] if 0 < value <= 1 else [f"{key} = {value}: a fraction of {of} must be above 0 and at most 1"]


# ---------------------------------------------------------------------------------------------------- model


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


# ------------------------------------------------------------------------------------------ parameterization

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


# ----------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """A source of documents and how they become rows of tokens."""

    tokenizer: str = setting(
        "train: trained on this data, or the own one of `source` where that is set; or a folder; or a hub id",
        "train",
        is_fixed_on_resume=True,
    )
    row_maker: Literal["packed", "padded"] = setting(
        "packed: documents joined with EOS between; padded: one a row, truncated to seq_len",
        "packed",
        is_fixed_on_resume=True,
    )
    isolate_documents: bool = setting(
        "packed rows: attention and positions restart at every document", False, is_fixed_on_resume=True
    )
    validation_fraction: float = setting(
        "fraction of the documents held out, by a hash of their id, where the source has no validation set",
        0.02,
        above=0,
        below=1,
        is_fixed_on_resume=True,
    )
    cache_dir: str = setting("folder of prepared rows and tokenizers; empty: the user's cache folder", "")
    num_processes: int = setting(
        "processes that tokenise while rows are made; 0: one a core, 16 at most", 0, at_least=0
    )
    num_workers: int = setting("processes that read rows ahead of the training loop", 0, at_least=0)

    def cross_rules(self) -> list[CrossRule]:
        return [("isolate_documents", self._isolation_problems)]

    def _isolation_problems(self) -> list[str]:
        if self.isolate_documents and self.row_maker == "padded":
            return ["isolate_documents = true with row_maker = padded: a padded row holds one document; leave it false"]
        return []


@dataclass(frozen=True, kw_only=True)
class StdlibDataConfig(DataConfig):
    """The .py files of the running interpreter's standard library, without tests and codec tables: always there."""

    name: Literal["stdlib"] = setting("the interpreter's standard library", "stdlib", is_fixed_on_resume=True)


@dataclass(frozen=True, kw_only=True)
class TextFilesDataConfig(DataConfig):
    """Local .txt, .jsonl, .jsonl.gz and .parquet files."""

    name: Literal["text_files"] = setting("local files", "text_files", is_fixed_on_resume=True)
    train_files: list[str] = setting("files or glob patterns to train on", [], is_fixed_on_resume=True)
    train_weights: list[float] = setting(
        "share of each entry of train_files in an epoch; empty: by its size", [], is_fixed_on_resume=True
    )
    validation_files: list[str] | dict[str, list[str]] = setting(
        "files or glob patterns to validate on, or a map of set names to them; empty: split from train_files",
        [],
        is_fixed_on_resume=True,
    )
    text_field: str = setting("field that holds the text (.jsonl, .parquet)", "text", is_fixed_on_resume=True)

    def cross_rules(self) -> list[CrossRule]:
        return [
            *super().cross_rules(),
            ("train_files", self._no_file_problems),
            ("train_weights", self._number_of_weights_problems),
            ("train_weights", self._weight_problems),
        ]

    def _no_file_problems(self) -> list[str]:
        if not self.train_files and not self.validation_files:
            return ["train_files is empty: name at least one file, data.train_files=[path]"]
        return []

    def _number_of_weights_problems(self) -> list[str]:
        if not self.train_weights or len(self.train_weights) == len(self.train_files):
            return []
        return [
            f"train_weights has {len(self.train_weights)} entries and train_files {len(self.train_files)}:"
            " give one weight an entry, or none"
        ]

    def _weight_problems(self) -> list[str]:
        if any(weight <= 0 for weight in self.train_weights):
            return [f"train_weights = {self.train_weights}: every weight must be above 0"]
        return []


@dataclass(frozen=True, kw_only=True)
class C4DataConfig(DataConfig):
    """allenai/c4 from the Hugging Face hub: the data of the papers this project compares with."""

    name: Literal["c4"] = setting("allenai/c4", "c4", is_fixed_on_resume=True)
    dataset: str = setting("hub id of the data set", "allenai/c4", is_fixed_on_resume=True)
    subset: str = setting("configuration of the data set", "en", is_fixed_on_resume=True)
    text_field: str = setting("field that holds the text", "text", is_fixed_on_resume=True)
    max_documents: int = setting(
        "documents taken from the shuffled stream; 0 = all", 0, at_least=0, unit="documents", is_fixed_on_resume=True
    )
    streaming: bool = setting(
        "train on the stream as it comes, without rows on disk; a resume loses the place in it and begins it anew, in"
        " another shuffle",
        False,
        is_fixed_on_resume=True,
    )

    def cross_rules(self) -> list[CrossRule]:
        return [*super().cross_rules(), ("streaming", self._streaming_problems)]

    def _streaming_problems(self) -> list[str]:
        if self.streaming and self.isolate_documents:
            return ["streaming = true with isolate_documents = true: only rows on disk know where documents begin"]
        return []


# ------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How long and on how much at a time."""

    seq_len: int = setting("length of a training row", 256, at_least=2, unit="tokens", is_fixed_on_resume=True)
    global_batch_size: int = setting(
        "rows per optimizer step over all devices", 16, at_least=1, unit="rows", is_fixed_on_resume=True
    )
    micro_batch_size: int = setting("rows per device per forward", 8, at_least=1, unit="rows")
    max_steps: int = setting("optimizer steps; 0: given by max_tokens", 0, at_least=0, unit="steps")
    max_tokens: int = setting(
        "tokens (rows x seq_len) to train on; 0: given by max_steps; with both the earlier ends the run",
        0,
        at_least=0,
        unit="tokens",
    )
    max_grad_norm: float = setting("global gradient norm is clipped to this; 0 = off", 1.0, at_least=0)
    max_hours: float = setting("wall-clock limit: save and stop after it; 0 = none", 0.0, at_least=0, unit="hours")
    max_skipped_steps: int = setting(
        "after this many skipped steps in a row the run has diverged", 10, at_least=1, unit="steps"
    )
    loss_spike_factor: float = setting(
        "a loss above so many times the median of the last 50 good ones is skipped, as one that is not finite always"
        " is; 0 = off",
        0.0,
        at_least=0,
    )
    on_divergence: Literal["stop", "rollback"] = setting(
        "stop with a diagnosis, or go back to the last checkpoint before and leave the rows of the skipped steps out",
        "stop",
    )
    max_rollbacks: int = setting("a run that has gone back so often stops", 3, at_least=1)

    def cross_rules(self) -> list[CrossRule]:
        # A micro-batch can be changed more freely than a batch, so that it is the one to blame.
        return [
            ("max_steps", self._length_problems),
            ("micro_batch_size", self._batch_problems),
            ("loss_spike_factor", self._spike_problems),
        ]

    def _spike_problems(self) -> list[str]:
        if self.loss_spike_factor == 0 or self.loss_spike_factor > 1:
            return []
        return [
            f"loss_spike_factor = {self.loss_spike_factor:g} would skip losses below the median of the last ones: give"
            " a number above 1, for instance train.loss_spike_factor=2, or 0 for off"
        ]

    def _length_problems(self) -> list[str]:
        if self.max_steps or self.max_tokens:
            return []
        return ["max_steps = 0 and max_tokens = 0: set one of them, for instance train.max_steps=200"]

    def _batch_problems(self) -> list[str]:
        if self.global_batch_size % self.micro_batch_size == 0:
            return []
        return [
            f"global_batch_size = {self.global_batch_size} is not divisible by"
            f" micro_batch_size = {self.micro_batch_size}: choose a divisor"
        ]

    @property
    def global_batch_tokens(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, from max_steps and max_tokens."""
        by_tokens = -(-self.max_tokens // self.global_batch_tokens) if self.max_tokens else 0
        return min(limit for limit in (self.max_steps, by_tokens) if limit > 0)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """What turns gradients into updates."""

    learning_rate: float = setting("peak learning rate", 3e-3, at_least=0)
    weight_decay: float = setting("decoupled decay of the matrices (norms and biases have none)", 0.01, at_least=0)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """torch.optim.AdamW, fused where the device has it."""

    name: Literal["adamw"] = setting("AdamW", "adamw", is_fixed_on_resume=True)
    beta1: float = setting("decay of the first moment", 0.9, at_least=0, below=1)
    beta2: float = setting("decay of the second moment", 0.999, at_least=0, below=1)
    epsilon: float = setting("added to the root of the second moment", 1e-8, above=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up from step 1, then what `name` says."""

    warmup_steps: CountOrFraction = setting("linear warm-up; a fraction is of the whole run", 0.1, unit="steps")

    def cross_rules(self) -> list[CrossRule]:
        return [("warmup_steps", self._warmup_problems)]

    def _warmup_problems(self) -> list[str]:
        if isinstance(self.warmup_steps, float) and self.warmup_steps == 0:
            return []
        return count_or_fraction_problem("warmup_steps", self.warmup_steps, "the run's steps", minimum=0)


@dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig(ScheduleConfig):
    """Half a cosine from the peak to final_fraction of it, reached at the last step."""

    name: Literal["cosine"] = setting("half a cosine", "cosine")
    final_fraction: float = setting("learning rate at the last step over the peak", 0.1, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class LinearScheduleConfig(ScheduleConfig):
    """A straight line from the peak to final_fraction of it, reached at the last step."""

    name: Literal["linear"] = setting("a straight line", "linear")
    final_fraction: float = setting("learning rate at the last step over the peak", 0.1, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class WsdScheduleConfig(ScheduleConfig):
    """Warm-up, stable at the peak, then a straight line down over the last decay_steps."""

    name: Literal["wsd"] = setting("warm-up, stable, decay", "wsd")
    decay_steps: CountOrFraction = setting("length of the decay; a fraction is of the whole run", 0.2, unit="steps")
    final_fraction: float = setting("learning rate at the last step over the peak", 0.0, at_least=0, at_most=1)

    def cross_rules(self) -> list[CrossRule]:
        def decay_problems() -> list[str]:
            return count_or_fraction_problem("decay_steps", self.decay_steps, "the run's steps")

        return [*super().cross_rules(), ("decay_steps", decay_problems)]


@dataclass(frozen=True, kw_only=True)
class ConstantScheduleConfig(ScheduleConfig):
    """The peak for ever after the warm-up."""

    name: Literal["constant"] = setting("the peak for ever", "constant")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """Where tensors live and in what precision they are multiplied."""

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto: cuda, then mps, then cpu", "auto")
    precision: Literal["auto", "fp32", "bf16", "pure_bf16"] = setting(
        "bf16: autocast over fp32 weights; pure_bf16: weights, gradients and optimizer in bf16;"
        " auto: bf16 on a GPU that has it, else fp32",
        "auto",
    )
    num_threads: int = setting("CPU threads a process; 0: torch's choice", 0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(DeviceConfig):
    """Processes, device, precision and how the model is wrapped for training."""

    name: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = setting(
        "auto: ddp when several processes were launched, else single; fsdp2: parameters, gradients and optimizer state"
        " in shards over the processes; with DeepSpeed, zero1: optimizer state in shards, zero2: gradients too, zero3:"
        " parameters too",
        "auto",
    )
    replicas: int = setting("fsdp2: groups of processes that each hold all shards (hybrid sharding)", 1, at_least=1)
    timeout_seconds: int = setting(
        "how long processes wait for each other before they stop with an error", 1800, at_least=1, unit="s"
    )
    compile: bool = setting("torch.compile every block", False)
    kernels: Literal["auto", "reference", "grouped", "triton"] = setting(
        "how LOST layers are computed: reference: autograd of the definition; grouped: operators with a hand-written"
        " backward pass, layers that read one input together; triton: the same with Triton kernels, on CUDA;"
        " auto: triton on CUDA, else grouped (selection_axis = rows: always the reference)",
        "auto",
    )
    recompute: Literal["none", "p0", "p1", "p2", "p3", "block"] = setting(
        "what the backward pass makes again to save memory, from the least to the most: none; p0: inside of norms and"
        " SwiGLU; p1: everything between the matrix products; p2: also gate and up; p3: also q, k, v and attention, so"
        " that low-rank activations and residuals are kept; block: whole blocks",
        "p1",
    )
    profile_steps: int = setting(
        "steps traced with torch's profiler into run_dir/profile, after three steps; 0 = none",
        0,
        at_least=0,
        unit="steps",
    )
    peak_tflops: float = setting(
        "the device's peak for MFU; 0: from a table of GPUs, else measured by one matrix product",
        0.0,
        at_least=0,
        unit="TFLOP/s",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When to save, what to keep, where to go on."""

    every_steps: int = setting("save every so many steps (and at the end); 0: only at the end", 100, at_least=0)
    keep: int = setting("newest checkpoints kept", 2, at_least=1)
    background: bool = setting(
        "training goes on while a checkpoint is written; needs memory for a copy of weights and optimizer state", True
    )
    resume: str = setting(
        "auto: from the newest complete checkpoint of run_dir if there is one; never; must; or a checkpoint's path",
        "auto",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Validation loss and perplexity."""

    max_tokens: int = setting("tokens of each validation set; 0: the whole set", 0, at_least=0, unit="tokens")
    micro_batch_size: int = setting("rows per device per forward", 16, at_least=1, unit="rows")


@dataclass(frozen=True, kw_only=True)
class TrainEvaluationConfig(EvaluationConfig):
    """Validation during training."""

    every_steps: int = setting(
        "evaluate every so many steps, and before and after; 0: only before and after", 100, at_least=0, unit="steps"
    )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """metrics.jsonl is always written; wandb as `name` says."""

    name: Literal["offline", "wandb", "none"] = setting(
        "offline: wandb files in run_dir, no network; wandb: online; none: no wandb", "offline"
    )
    every_steps: int = setting("steps between training lines", 1, at_least=1, unit="steps")
    project: str = setting("wandb project", "lost")
    group_norms_every_steps: int = setting(
        "steps between weight and gradient norms per parameter group; 0 = never", 50, at_least=0, unit="steps"
    )


# ------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Section):
    """Everything of `lost pretrain`; also read by `lost prepare`."""

    experiment: str = setting("name of the experiment, used in run_dir", "custom")
    model: ModelConfig = setting("architecture")
    parameterization: ParameterizationConfig = setting("form of the linear layers")
    data: DataConfig = setting("documents and rows")
    train: TrainConfig = setting("length and batch")
    optimizer: OptimizerConfig = setting("optimizer")
    schedule: ScheduleConfig = setting("learning rate over the steps")
    runtime: RuntimeConfig = setting("processes, device, precision")
    checkpoint: CheckpointConfig = setting("saving and resuming")
    evaluation: TrainEvaluationConfig = setting("validation")
    logging: LoggingConfig = setting("wandb and metrics")
    seed: int = setting("seed of initial weights and row order", 0, at_least=0, is_fixed_on_resume=True)
    source: str = setting(
        "go on from the weights of an export, a run directory or a hub id, with a fresh optimizer; empty: from init",
        "",
        is_fixed_on_resume=True,
    )
    run_dir: str = setting("folder of everything this run writes")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """Everything of `lost plan`: a run of `lost pretrain`, and the device that it should fit on."""

    device_memory_gib: float = setting(
        "memory of one device; with it the table says which sizes fit; 0 = unknown", 0.0, at_least=0, unit="GiB"
    )
    num_devices: int = setting("devices of the run; above 1 the plan compares the runtimes on them", 1, at_least=1)

    def cross_rules(self) -> list[CrossRule]:
        return [*super().cross_rules(), ("num_devices", self._device_problems)]

    def _device_problems(self) -> list[str]:
        if self.num_devices == 1 or self.num_devices % self.runtime.replicas == 0:
            return []
        return [
            f"num_devices = {self.num_devices} is not divisible by runtime.replicas = {self.runtime.replicas}:"
            " choose a divisor"
        ]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Everything of `lost evaluate`."""

    source: str = setting("run directory, checkpoint, export or hub id")
    data: DataConfig = setting("documents and rows; unless said, those of the run that `source` is or is of")
    seq_len: int = setting("length of an evaluation row; unless said, the run's", 256, at_least=2, unit="tokens")
    evaluation: EvaluationConfig = setting("how much")
    runtime: DeviceConfig = setting("device and precision")
    to: str = setting("JSON file of the result; empty: print only", "")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Everything of `lost generate`; the sampling keys are those of transformers."""

    source: str = setting("run directory, checkpoint, export or hub id")
    prompt: str = setting("text to continue", "")
    max_new_tokens: int = setting("tokens to add", 64, at_least=1, unit="tokens")
    do_sample: bool = setting("sample; false: always the likeliest token", True)
    temperature: float = setting("divides the logits", 0.8, above=0)
    top_k: int = setting("sample from this many likeliest tokens; 0 = all", 50, at_least=0)
    top_p: float = setting("sample from the likeliest tokens of this total probability", 1.0, above=0, at_most=1)
    use_cache: bool = setting("keep keys and values between tokens", True)
    seed: int = setting("seed of the sampling", 0, at_least=0)
    runtime: DeviceConfig = setting("device and precision")

    def cross_rules(self) -> list[CrossRule]:
        return [(name, partial(self._sampling_problems, name)) for name in ("temperature", "top_k", "top_p")]

    def _sampling_problems(self, name: str) -> list[str]:
        value = getattr(self, name)
        if self.do_sample or value == type(self).__dataclass_fields__[name].default:
            return []
        return [f"{name} = {value} with do_sample = false: only sampling uses it; leave it out or sample"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """Everything of `lost export`."""

    source: str = setting("run directory, checkpoint, export or hub id")
    to: str = setting("folder to write")
    dtype: Literal["source", "fp32", "bf16"] = setting("dtype of the weights written", "source")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Section):
    """Everything of `lost bench`: times and memory, all arms interleaved in one run."""

    model: ModelConfig = setting("architecture; what=layer has its own sizes")
    parameterization: LostConfig = setting("the LOST arm")
    runtime: DeviceConfig = setting("device and precision")
    what: Literal["layer", "block", "step", "memory", "loop", "checkpoint"] = setting(
        "layer: one linear layer; block: one block of a model; step: forward, backward and update of a model; memory:"
        " the peak of a step at every level of recomputation; loop: what the training loop adds; checkpoint: saving and"
        " resuming",
        "layer",
    )
    arms: list[str] = setting("arms of layer, block, step and memory, besides the first; empty: the usual ones", [])
    compiled: bool = setting("layer, block, step: every arm also through torch.compile", False)
    recompute: Literal["none", "p0", "p1", "p2", "p3", "block"] = setting(
        "what=step: what dense and LOST make again in the backward pass", "p1"
    )
    in_features: int = setting("input width of what=layer", 1024, at_least=1)
    out_features: int = setting("output width of what=layer", 1024, at_least=1)
    lost_rank: CountOrFraction = setting("rank of what=layer; what=step takes parameterization.lost_rank", 256)
    num_tokens: int = setting("tokens of one call", 2048, at_least=1, unit="tokens")
    seq_len: int = setting("row length of what=block, step, memory and loop", 256, at_least=2, unit="tokens")
    repeats: int = setting("timed rounds; every round runs each arm once", 15, at_least=3)
    to: str = setting("folder of the JSON result; empty: print only", "")
