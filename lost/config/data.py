"""Settings of documents and rows."""

from dataclasses import dataclass
from typing import Literal

from lost.config.section import CrossRule, Section, setting


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
