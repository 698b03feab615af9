"""Documents to rows of tokens that training reads: what every run starts with."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lost.config.data import DataConfig
from lost.data.cache import key_of
from lost.data.hub import C4Corpus
from lost.data.report import PrepareReport, ProgressCallable
from lost.data.row_sets import RowSets, is_streamed
from lost.data.rows import Mixture, TokenRows
from lost.data.stream import TokenStream
from lost.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """Rows to train and validate on.

    Args:
        train: the rows to train on, or with data.streaming the stream that they come from.
        validation: row sets by name.
        tokenizer: a transformers tokenizer with EOS and padding.
        fingerprint: hash of the rows and weights; a resumed run must have the same.
        report: what was found and made.
    """

    train: Mixture | TokenStream
    validation: dict[str, TokenRows]
    tokenizer: Any
    fingerprint: str
    report: PrepareReport


def prepare(
    data: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    tokenizer: Any = None,
    progress: ProgressCallable | None = None,
) -> Prepared:
    """Rows and tokenizer of a data set, from the cache where they are there.

    Several processes may call this at once: one works (with processes of its own), the others wait. Memory is bounded
    whatever the size. What a killed call has finished is used by the next one.

    Args:
        vocab_size: the model's; ids of the rows are below it.
        seq_len: tokens of a row.
        tokenizer: used instead of data.tokenizer=train.
        progress: called after every batch of documents.
    Raises:
        DataError: names what cannot be read, is damaged or too small, and the fix.
    """
    sets = RowSets(data, vocab_size, seq_len, progress)
    tokenizer = sets.choose_tokenizer(tokenizer, lambda folder: load_tokenizer(str(folder)))
    if is_streamed(data):
        validation = _opened(sets.validation_folders(), data)
        stream = _stream(sets)
        return Prepared(stream, validation, tokenizer, _stream_fingerprint(stream, validation), sets.finished_report())
    train_folders, held_out = sets.train_folders()
    validation = _opened(held_out | sets.validation_folders(), data)
    train = [TokenRows(folder, isolate_documents=data.isolate_documents) for folder in train_folders]
    mixture = Mixture(train, sets.sources.weights)
    return Prepared(mixture, validation, tokenizer, _fingerprint(mixture, validation), sets.finished_report())


def prepare_validation(
    data: DataConfig, *, vocab_size: int, seq_len: int, tokenizer: Any, progress: ProgressCallable | None = None
) -> tuple[dict[str, TokenRows], PrepareReport]:
    """Only the validation rows, by set name, for a model that has its tokenizer.

    Training documents are read only where the validation set is held out from them.

    Raises:
        DataError: as `prepare`.
    """
    sets = RowSets(data, vocab_size, seq_len, progress)
    sets.use(tokenizer)
    folders = sets.validation_folders() or sets.train_folders()[1]
    return _opened(folders, data), sets.finished_report()


def _opened(folders: dict[str, Path], data: DataConfig) -> dict[str, TokenRows]:
    return {name: TokenRows(folder, isolate_documents=data.isolate_documents) for name, folder in folders.items()}


def _stream(sets: RowSets) -> TokenStream:
    """The training corpus as it comes."""
    (corpus,) = sets.sources.train
    assert isinstance(corpus, C4Corpus), corpus
    return TokenStream(corpus, sets.encoder, sets.data.row_maker, sets.seq_len, sets.vocab_size)


def _fingerprint(train: Mixture, validation: dict[str, TokenRows]) -> str:
    facts = [
        [rows.meta["sha256"] for rows in train.sets],
        train.weights,
        {name: rows.meta["sha256"] for name, rows in validation.items()},
        [train.seq_len, train.sets[0].isolate_documents],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _stream_fingerprint(train: TokenStream, validation: dict[str, TokenRows]) -> str:
    """Of what decides the rows of a stream: they themselves are not known."""
    facts = {name: rows.meta["sha256"] for name, rows in validation.items()}
    return key_of(
        corpus=train.corpus.content_hash,
        tokenizer=train.encoder.fingerprint,
        rows=[train.row_maker, train.seq_len],
        validation=facts,
    )
