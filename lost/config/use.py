"""Settings of the commands that use a model which is there: evaluate, generate, export."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lost.config.data import DataConfig
from lost.config.runtime import DeviceConfig, EvaluationConfig
from lost.config.section import CrossRule, Section, setting

# What transformers takes as max_shard_size.
_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def default_of(section: Section, name: str) -> Any:
    return type(section).__dataclass_fields__[name].default


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(Section):
    """Labelled texts for classifiers."""

    files: list[str] = setting(
        "labelled .jsonl, .jsonl.gz or .parquet files or glob patterns that classifiers are measured on, in place of"
        " perplexity and tasks; unless said, the test (else validation) files of the run that `source` is or is of",
        [],
    )
    text_field: str = setting("field that holds the text; unless said, the run's", "text")
    pair_field: str = setting("field of a second text; empty: there is none; unless said, the run's", "")
    label_field: str = setting("field of the label; unless said, the run's", "label")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Section):
    """Everything of `lost evaluate`."""

    source: str = setting("run directory, checkpoint, export or hub id")
    compare_with: list[str] = setting("more models, each with its difference from `source`", [])
    data: DataConfig = setting("documents and rows; unless said, those of the run that `source` is or is of")
    seq_len: int = setting("length of an evaluation row; unless said, the run's", 256, at_least=2, unit="tokens")
    stride: int = setting(
        "0: rows; else windows of seq_len tokens that move on by so many, in which only the tokens that no earlier"
        " window had are scored",
        0,
        at_least=0,
        unit="tokens",
    )
    perplexity: bool = setting("measure perplexity on `data`; false: tasks only", True)
    tasks: list[str] = setting("tasks of lm-eval: names, or YAML files of your own", [])
    task_folders: list[str] = setting("folders whose task files `tasks` names too", [])
    num_fewshot: int = setting("examples in front of every question of a task; -1: as the task says", -1, at_least=-1)
    limit: int = setting("questions of each task; 0: all", 0, at_least=0)
    apply_chat_template: bool = setting("put the questions of tasks into the tokenizer's chat template", False)
    labelled: LabelledConfig = setting("what classifiers are measured on")
    evaluation: EvaluationConfig = setting("how much")
    runtime: DeviceConfig = setting("device and precision")
    to: str = setting("JSON file of the result; empty: print only", "")

    def cross_rules(self) -> list[CrossRule]:
        task_keys = ("task_folders", "num_fewshot", "limit", "apply_chat_template")
        return [
            ("stride", self._stride_problems),
            ("stride", self._row_maker_problems),
            ("perplexity", self._nothing_problems),
            ("tasks", self._labelled_problems),
            *[(name, partial(self._task_problems, name)) for name in task_keys],
        ]

    def _stride_problems(self) -> list[str]:
        if self.stride < self.seq_len:
            return []
        return [f"stride = {self.stride}: must be below seq_len = {self.seq_len}, so that windows overlap"]

    def _row_maker_problems(self) -> list[str]:
        if not self.stride:
            return []
        if self.data.row_maker == "padded":
            return ["stride with data.row_maker = padded: windows move over packed text; use row_maker=packed"]
        if self.data.isolate_documents:
            return ["stride with data.isolate_documents = true: windows read across documents; leave one of them out"]
        return []

    def _nothing_problems(self) -> list[str]:
        if self.perplexity or self.tasks or self.labelled.files:
            return []
        return ["perplexity = false without tasks: nothing to do; name tasks, or for classifiers labelled.files"]

    def _labelled_problems(self) -> list[str]:
        labelled, problems = self.labelled, []
        if labelled.files and self.tasks:
            problems = ["tasks with labelled.files: language models answer tasks, classifiers label texts; name one"]
        unused = {"stride": self.stride, "evaluation.max_tokens": self.evaluation.max_tokens} if labelled.files else {}
        problems += [
            f"{key} = {value} with labelled.files: only perplexity uses it; leave it out"
            for key, value in unused.items()
            if value
        ]
        keys = ["text_field", "pair_field", "label_field"]
        given = [key for key in keys if getattr(labelled, key) != default_of(labelled, key)]
        if given and not labelled.files:
            value = f"labelled.{given[0]} = {getattr(labelled, given[0])}"
            problems.append(f"{value}, and labelled.files is empty: name labelled texts to measure the classifier on")
        return problems

    def _task_problems(self, name: str) -> list[str]:
        value = getattr(self, name)
        if self.tasks or value == ([] if isinstance(value, list) else default_of(self, name)):
            return []
        return [f"{name} = {value} without tasks: only tasks use it; name tasks or leave it out"]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Everything of `lost generate`; the keys of generation are those of transformers."""

    source: str = setting("run directory, checkpoint, export or hub id")
    prompt: str = setting("text to continue", "")
    prompt_file: str = setting(
        "a text file, which is one prompt, or .jsonl with `prompt` or `messages` in each line; empty: `prompt`", ""
    )
    chat: bool = setting(
        "prompts are what a user says, put into the tokenizer's chat template; without a prompt: a conversation", False
    )
    system: str = setting("what the chat template's system message says; empty: none", "")
    micro_batch_size: int = setting("prompts of prompt_file that are continued together", 1, at_least=1)
    to: str = setting("JSON lines file of the texts; empty: print only", "")
    max_new_tokens: int = setting("tokens to add", 64, at_least=1, unit="tokens")
    min_new_tokens: int = setting("tokens before the end of the text may come", 0, at_least=0, unit="tokens")
    do_sample: bool = setting("sample; false: always the likeliest token", True)
    temperature: float = setting("divides the logits", 0.8, above=0)
    top_k: int = setting("sample from this many likeliest tokens; 0 = all", 50, at_least=0)
    top_p: float = setting("sample from the likeliest tokens of this total probability", 1.0, above=0, at_most=1)
    min_p: float = setting("sample from tokens at least so likely against the likeliest", 0.0, at_least=0, at_most=1)
    typical_p: float = setting(
        "sample from the locally most typical tokens of this total probability", 1.0, above=0, at_most=1
    )
    repetition_penalty: float = setting("above 1: makes tokens that were there before less likely", 1.0, above=0)
    no_repeat_ngram_size: int = setting("no so many tokens in a row come twice; 0: they may", 0, at_least=0)
    num_beams: int = setting("beams of the search for the likeliest text; 1: no search", 1, at_least=1)
    num_return_sequences: int = setting("texts for each prompt", 1, at_least=1)
    stop_strings: list[str] = setting("texts that end the generation", [])
    use_cache: bool = setting("keep keys and values between tokens", True)
    seed: int = setting("seed of the sampling", 0, at_least=0)
    runtime: DeviceConfig = setting("device and precision")

    def cross_rules(self) -> list[CrossRule]:
        sampling = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        return [
            *[(name, partial(self._sampling_problems, name)) for name in sampling],
            ("prompt_file", self._two_prompt_problems),
            ("system", self._system_problems),
            ("micro_batch_size", self._batch_problems),
            ("to", self._conversation_problems),
            ("min_new_tokens", self._length_problems),
            ("num_return_sequences", self._sequence_problems),
        ]

    @property
    def is_conversation(self) -> bool:
        """Whether what the user says comes from standard input."""
        return self.chat and not self.prompt and not self.prompt_file

    def _sampling_problems(self, name: str) -> list[str]:
        value = getattr(self, name)
        if self.do_sample or value == default_of(self, name):
            return []
        return [f"{name} = {value} with do_sample = false: only sampling uses it; leave it out or sample"]

    def _two_prompt_problems(self) -> list[str]:
        return ["prompt_file with prompt: give one of them"] if self.prompt_file and self.prompt else []

    def _system_problems(self) -> list[str]:
        if not self.system or self.chat:
            return []
        return ["system without chat = true: only a chat template has a system message; leave it out or set chat=true"]

    def _batch_problems(self) -> list[str]:
        if self.micro_batch_size == 1 or self.prompt_file:
            return []
        return [f"micro_batch_size = {self.micro_batch_size} without prompt_file: there is one prompt; leave it out"]

    def _conversation_problems(self) -> list[str]:
        if not self.is_conversation:
            return []
        problems = ["to with a conversation: it is only printed; give prompt or prompt_file"] if self.to else []
        if self.num_return_sequences > 1:
            problems.append("num_return_sequences with a conversation: it has one answer; leave it out")
        return problems

    def _length_problems(self) -> list[str]:
        if self.min_new_tokens <= self.max_new_tokens:
            return []
        return [f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}: lower it"]

    def _sequence_problems(self) -> list[str]:
        count = self.num_return_sequences
        if count == 1 or self.do_sample or count <= self.num_beams:
            return []
        return [
            f"num_return_sequences = {count} with do_sample = false and num_beams = {self.num_beams}: they would be"
            f" the same text; sample, or raise num_beams to {count}"
        ]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """Everything of `lost export`."""

    source: str = setting("run directory, checkpoint, export or hub id")
    to: str = setting("folder to write")
    form: Literal["auto", "lost", "dense", "self_contained"] = setting(
        "auto: as the model is; lost: the same, and an error where it is dense; dense: every LOST layer as one matrix"
        " (identity activation only), for programs that know no LOST; self_contained: LOST layers with the code that"
        " runs them, loaded with trust_remote_code=True",
        "auto",
    )
    dtype: Literal["source", "fp32", "bf16"] = setting("dtype of the weights written", "source")
    max_shard_size: str = setting("largest safetensors file, for instance 500MB", "5GB")
    license: str = setting("licence that the model card names, for instance apache-2.0; empty: the source's", "")
    evaluations: list[str] = setting("JSON files of `lost evaluate` on this model, for the model card", [])
    push: str = setting("hub id <owner>/<name> to send the folder to; empty: nowhere", "")
    dry_run: bool = setting("with push: only print what would be sent", True)
    private: bool = setting("with push: make a new repository private", True)

    def cross_rules(self) -> list[CrossRule]:
        return [
            ("max_shard_size", self._size_problems),
            ("push", self._push_problems),
            ("dry_run", partial(self._without_push_problems, "dry_run")),
            ("private", partial(self._without_push_problems, "private")),
        ]

    def _size_problems(self) -> list[str]:
        # str, because a pattern would not notice the mark of a value of the wrong type.
        if _SIZE.fullmatch(str(self.max_shard_size)):
            return []
        return [f"max_shard_size = {self.max_shard_size}: must be a whole number and KB, MB or GB, such as 5GB"]

    def _push_problems(self) -> list[str]:
        if not self.push or _HUB_ID.fullmatch(self.push):
            return []
        return [f"push = {self.push}: must be <owner>/<name>, the id of a model on the hub"]

    def _without_push_problems(self, name: str) -> list[str]:
        if self.push or getattr(self, name):
            return []
        return [f"{name} = false without push: only push uses it; name a hub id or leave it out"]
