"""What preparing found and made: nothing is dropped without a count."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# Files with invalid UTF-8 that a report names; their number is counted whole.
_FILES_NAMED = 10


@dataclass
class SetReport:
    """Counts of one row set."""

    documents: int = 0
    empty_documents: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    invalid_documents: int = 0
    invalid_sequences: int = 0
    invalid_files: list[str] = field(default_factory=list)
    text_bytes: int = 0
    tokens: int = 0
    rows: int = 0
    max_token_id: int = -1

    def add_invalid_file(self, file: str) -> None:
        if file not in self.invalid_files and len(self.invalid_files) < _FILES_NAMED:
            self.invalid_files.append(file)

    @classmethod
    def from_dict(cls, values: dict) -> "SetReport":
        return cls(**{item.name: values[item.name] for item in fields(cls)})

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class PrepareReport:
    """Counts of all row sets of one preparation.

    Args:
        sets: by set name: "train", or "train/<name>" for each part of a mixture, and the validation sets.
        folders: the row set folders, by the same names.
        seconds: time that preparing took.
        is_cached: everything was there already.
        tokenizer: where the tokenizer is or what it is called.
        tokenizer_sample_bytes: text that it was trained on; 0 where it was not trained now.
        tokenizer_seconds, row_seconds: parts of `seconds`: training the tokenizer, tokenising and writing rows.
        encoded_bytes, encoded_tokens: text and tokens of the rows made now, without shards that were there already.
        num_processes: processes that tokenised.
        verified_bytes: bytes of rows whose checksums were compared.
    """

    sets: dict[str, SetReport] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0
    is_cached: bool = True
    tokenizer: str = ""
    tokenizer_sample_bytes: int = 0
    tokenizer_seconds: float = 0.0
    row_seconds: float = 0.0
    encoded_bytes: int = 0
    encoded_tokens: int = 0
    num_processes: int = 1
    verified_bytes: int = 0

    def total(self, count: str) -> int:
        """Sum of a count of SetReport over all sets."""
        return sum(getattr(report, count) for report in self.sets.values())

    @property
    def documents(self) -> int:
        return self.total("documents")

    @property
    def tokens(self) -> int:
        return self.total("tokens")

    @property
    def rows(self) -> int:
        return self.total("rows")

    @property
    def text_bytes(self) -> int:
        return self.total("text_bytes")


@dataclass(frozen=True)
class Progress:
    """How far preparing has come, given to the progress callable after every batch.

    Args:
        stage: "tokenizer" (reading its training text) or "rows".
        corpus: what is being read.
        documents, tokens, text_bytes: done so far in this stage of this corpus.
        position_bytes, size_bytes: place in what has to be read; size 0 where it is not known.
    """

    stage: str
    corpus: str
    documents: int
    tokens: int
    text_bytes: int
    position_bytes: int
    size_bytes: int


ProgressCallable = Callable[[Progress], None]
