"""Rules between sections. Pure Python: every problem is known before torch is imported.

A rule is a function that returns its problems as sentences. Its parameters name the top-level keys that it needs; what
it finds counts if the very values that it reads are right on their own, whatever else is wrong beside them.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lost.config.data import DataConfig, TextFilesDataConfig
from lost.config.finetune import FinetuneDataConfig
from lost.config.model import LostConfig, ModelConfig
from lost.config.runtime import CheckpointConfig, EvaluationConfig, RuntimeConfig
from lost.config.section import CountOrFraction, Section, assessed, hints_of, nearest, problems_of
from lost.config.training import ScheduleConfig, TrainConfig, WsdScheduleConfig

Rule = Callable[..., list[str]]
# The profiler lets this many steps pass before it records.
PROFILER_LEAD_STEPS = 3
# A byte-level tokenizer holds every byte, the end of a document and padding.
MIN_TRAINED_VOCAB = 258


def all_problems(
    command: str, section: type[Section], values: dict[str, Any], more_rules: Sequence[Rule] = ()
) -> list[str]:
    """Every problem of nested plain values: each section's own, then those between sections."""
    problems, config = assessed(section, values)
    for rule in (*RULES[command], *more_rules):
        needs = list(inspect.signature(rule).parameters)
        if all(name in hints_of(section) for name in needs):
            problems += problems_of(rule, *(getattr(config, name) for name in needs))
    return problems


def num_processes() -> int:
    """Processes of this launch, as torchrun says."""
    text = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdigit() else 1


# ---------------------------------------------------------------------------------------------------- rules


def row_length_problems(model: ModelConfig, train: TrainConfig) -> list[str]:
    return _row_length_problems("train.seq_len", train.seq_len, model)


def _row_length_problems(key: str, seq_len: int, model: ModelConfig) -> list[str]:
    if seq_len <= model.max_position_embeddings:
        return []
    return [
        f"{key} = {seq_len} tokens is above model.max_position_embeddings = {model.max_position_embeddings}:"
        " shorten the rows or raise model.max_position_embeddings"
    ]


def batch_problems(train: TrainConfig) -> list[str]:
    processes = num_processes()
    if train.global_batch_size % (train.micro_batch_size * processes) == 0:
        return []
    return [
        f"train.global_batch_size = {train.global_batch_size} rows is not divisible by train.micro_batch_size ="
        f" {train.micro_batch_size} x {processes} processes = {train.micro_batch_size * processes}:"
        " change one of them or the number of processes"
    ]


def warmup_problems(train: TrainConfig, schedule: ScheduleConfig) -> list[str]:
    return _span_problems("warmup_steps", schedule.warmup_steps, train.num_steps)


def decay_problems(train: TrainConfig, schedule: ScheduleConfig) -> list[str]:
    if not isinstance(schedule, WsdScheduleConfig):
        return []
    return _span_problems("decay_steps", schedule.decay_steps, train.num_steps)


def warmup_and_decay_problems(train: TrainConfig, schedule: ScheduleConfig) -> list[str]:
    if not isinstance(schedule, WsdScheduleConfig):
        return []
    total = train.num_steps
    warmup, decay = _steps(schedule.warmup_steps, total), _steps(schedule.decay_steps, total)
    if max(warmup, decay) > total or warmup + decay <= total:
        return []
    return [
        f"schedule.warmup_steps = {warmup:g} + schedule.decay_steps = {decay:g} is above the {total} steps of the run:"
        " lower one of them"
    ]


def _steps(span: CountOrFraction, total: int) -> float:
    return span if isinstance(span, int) else span * total


def _span_problems(key: str, span: CountOrFraction, total: int) -> list[str]:
    steps = _steps(span, total)
    if steps <= total:
        return []
    return [
        f"schedule.{key} = {steps:g} steps is above the {total} steps of the run: lower it, or give a fraction"
        f" such as schedule.{key}=0.1"
    ]


def process_problems(runtime: RuntimeConfig) -> list[str]:
    if runtime.name == "single" and num_processes() > 1:
        return [f"runtime=single with {num_processes()} processes: use runtime=ddp or start one process"]
    if runtime.name == "ddp" and "WORLD_SIZE" not in os.environ:
        return [
            "runtime=ddp, but no launcher started this process: use"
            " `torchrun --standalone --nproc-per-node N -m lost pretrain ...`, or runtime=auto"
        ]
    return []


def zero_problems(runtime: RuntimeConfig) -> list[str]:
    if not runtime.name.startswith("zero"):
        return []
    problems = []
    if runtime.precision == "pure_bf16":
        problems.append(
            f"runtime.precision = pure_bf16 with runtime={runtime.name}: DeepSpeed keeps float32 weights beside those"
            " that it multiplies; use runtime.precision=bf16, or runtime=fsdp2 or ddp"
        )
    is_by_operators = runtime.recompute in ("p2", "p3") or (runtime.compile and runtime.recompute in ("p0", "p1"))
    if runtime.name == "zero3" and is_by_operators:
        compiled = ", runtime.compile = true" if runtime.compile else ""
        problems.append(
            f"runtime.recompute = {runtime.recompute}{compiled} with runtime=zero3: DeepSpeed gathers parameters at"
            " other moments when a block is made again in parts; use runtime.recompute=none or"
            f" {'block' if runtime.compile else 'p1 or block'}, or runtime=fsdp2"
        )
    return problems


def profile_problems(runtime: RuntimeConfig, train: TrainConfig) -> list[str]:
    needed = runtime.profile_steps + PROFILER_LEAD_STEPS
    if not runtime.profile_steps or needed <= train.num_steps:
        return []
    return [
        f"runtime.profile_steps = {runtime.profile_steps} steps begin after {PROFILER_LEAD_STEPS}, and the run has"
        f" {train.num_steps}: lower profile_steps or train longer"
    ]


def vocabulary_problems(model: ModelConfig, data: DataConfig, source: str) -> list[str]:
    if data.tokenizer != "train" or source or model.vocab_size >= MIN_TRAINED_VOCAB:
        return []
    return [
        f"model.vocab_size = {model.vocab_size}: a trained tokenizer needs at least {MIN_TRAINED_VOCAB} tokens (every"
        " byte and two special ones): raise it or name a tokenizer"
    ]


def train_file_problems(data: DataConfig) -> list[str]:
    if isinstance(data, TextFilesDataConfig) and not data.train_files:
        return ["data.train_files is empty: name what to train on, data.train_files=[path]"]
    return []


def missing_train_file_problems(data: DataConfig) -> list[str]:
    """Files that are named but not there; a pattern is left to the reader, which says what it matches."""
    if not isinstance(data, TextFilesDataConfig):
        return []
    return [problem for path in data.train_files for problem in _missing_file_problem("data.train_files", path)]


def finetune_file_problems(data: FinetuneDataConfig) -> list[str]:
    """Files of any set that are named but not there."""
    keys = ("train_files", "validation_files", "test_files")
    named = [(f"data.{key}", path) for key in keys for path in getattr(data, key)]
    return [problem for key, path in named for problem in _missing_file_problem(key, path)]


def missing_validation_file_problems(data: DataConfig) -> list[str]:
    if not isinstance(data, TextFilesDataConfig):
        return []
    files = data.validation_files
    sets = {f".{name}": paths for name, paths in files.items()} if isinstance(files, dict) else {"": files}
    named = [(f"data.validation_files{name}", path) for name, paths in sets.items() for path in paths]
    return [problem for key, path in named for problem in _missing_file_problem(key, path)]


def _missing_file_problem(key: str, text: str) -> list[str]:
    path = Path(text).expanduser()
    if any(character in text for character in "*?[") or path.exists():
        return []
    if not path.parent.is_dir():
        return [f"{key}: {text} does not exist, nor does its folder {path.parent}"]
    siblings = (entry.name for entry in path.parent.iterdir())
    return [f"{key}: {text} does not exist{nearest(path.name, siblings)}"]


def tokenizer_problems(data: DataConfig) -> list[str]:
    if data.tokenizer == "train":
        return []
    return _missing_path_problem("data.tokenizer", data.tokenizer, "train, a folder or a hub id")


def source_problems(source: str) -> list[str]:
    if not source:
        return []
    return _missing_path_problem("source", source, "a run directory, a checkpoint, an export or a hub id")


def pretrain_source_problems(source: str, run_dir: str) -> list[str]:
    """A run that goes on has all it needs in run_dir: its source may be gone."""
    return [] if (Path(run_dir).expanduser() / "config.yaml").is_file() else source_problems(source)


def needed_source_problems(source: str) -> list[str]:
    return [] if source else ["source is empty: name a run directory, a checkpoint, an export or a hub id"]


def _missing_path_problem(key: str, text: str, wanted: str) -> list[str]:
    """Only what cannot be a hub id (name or owner/name) must be on disk."""
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or text.endswith("/") or not text.strip()
    if is_path and not (text.strip() and Path(text).expanduser().exists()):
        return [f"{key} = {text!r} does not exist: must be {wanted}"]
    return []


# No run directory has these itself.
MARKS_OF_A_MODEL = ("config.json", "model.safetensors", "lost_adapter.json", "adapter_config.json", "manifest.json")


def run_dir_problems(run_dir: str) -> list[str]:
    if not run_dir.strip():
        return ["run_dir is empty: name the folder that the run writes"]
    if Path(run_dir).expanduser().is_file():
        return [f"run_dir = {run_dir} is a file: name a folder"]
    marks = [name for name in MARKS_OF_A_MODEL if (Path(run_dir).expanduser() / name).is_file()]
    if marks:
        return [f"run_dir = {run_dir} holds a model or a checkpoint ({marks[0]}), no run: name a folder of its own"]
    return []


def resume_problems(checkpoint: CheckpointConfig) -> list[str]:
    words = ("auto", "never", "must")
    if checkpoint.resume in words or Path(checkpoint.resume).expanduser().exists():
        return []
    return [
        f"checkpoint.resume = {checkpoint.resume!r}: must be {', '.join(words)} or the path of a checkpoint that"
        f" exists{nearest(checkpoint.resume, words)}"
    ]


def pretrain_evaluation_problems(evaluation: EvaluationConfig, train: TrainConfig) -> list[str]:
    return _evaluation_problems(evaluation, train.seq_len)


def evaluate_evaluation_problems(evaluation: EvaluationConfig, seq_len: int) -> list[str]:
    return _evaluation_problems(evaluation, seq_len)


def _evaluation_problems(evaluation: EvaluationConfig, seq_len: int) -> list[str]:
    if evaluation.max_tokens == 0 or evaluation.max_tokens >= seq_len:
        return []
    return [
        f"evaluation.max_tokens = {evaluation.max_tokens} is less than one row of {seq_len} tokens:"
        " raise it, or 0 for the whole set"
    ]


def export_problems(source: str, to: str) -> list[str]:
    if not to.strip():
        return ["to is empty: name the folder to write"]
    if source and Path(source).expanduser().resolve() == Path(to).expanduser().resolve():
        return [f"to = {to} is the source itself: name another folder"]
    return []


def bench_layer_problems(what: str, in_features: int, out_features: int, parameterization: LostConfig) -> list[str]:
    smaller = min(in_features, out_features)
    if what != "layer" or isinstance(parameterization.lost_rank, float) or parameterization.lost_rank <= smaller:
        return []
    return [
        f"parameterization.lost_rank = {parameterization.lost_rank} is above min(in_features, out_features) ="
        f" {smaller}: lower it or widen the layer"
    ]


def bench_row_length_problems(what: str, seq_len: int, model: ModelConfig) -> list[str]:
    return [] if what == "layer" else _row_length_problems("seq_len", seq_len, model)


PREPARE_RULES: tuple[Rule, ...] = (
    row_length_problems,
    batch_problems,
    warmup_problems,
    decay_problems,
    warmup_and_decay_problems,
    profile_problems,
    vocabulary_problems,
    train_file_problems,
    missing_train_file_problems,
    missing_validation_file_problems,
    tokenizer_problems,
    pretrain_source_problems,
    run_dir_problems,
    resume_problems,
    pretrain_evaluation_problems,
)
FINETUNE_RULES: tuple[Rule, ...] = (
    needed_source_problems,
    pretrain_source_problems,
    batch_problems,
    run_dir_problems,
    resume_problems,
    process_problems,
    zero_problems,
    finetune_file_problems,
)
RULES: dict[str, tuple[Rule, ...]] = {
    "pretrain": (*PREPARE_RULES, process_problems, zero_problems),
    "prepare": PREPARE_RULES,
    "evaluate": (
        needed_source_problems,
        source_problems,
        missing_train_file_problems,
        missing_validation_file_problems,
        tokenizer_problems,
        evaluate_evaluation_problems,
    ),
    "generate": (needed_source_problems, source_problems),
    "export": (needed_source_problems, source_problems, export_problems),
    "finetune": FINETUNE_RULES,
    "convert": (
        needed_source_problems,
        source_problems,
        export_problems,
        missing_train_file_problems,
        missing_validation_file_problems,
    ),
    "plan": PREPARE_RULES,
    "bench": (bench_layer_problems, bench_row_length_problems),
}
