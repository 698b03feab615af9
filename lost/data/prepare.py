"""Documents to token rows on disk, once: what `lost prepare` and every training run start with."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lost.config.schema import C4DataConfig, DataConfig
from lost.data.cache import key_of, made_once
from lost.data.corpus_rows import CorpusRows, is_held_out
from lost.data.encoding import processes_to_use, tokenizer_threads
from lost.data.files import hash_key
from lost.data.hub import C4Corpus
from lost.data.report import PrepareReport, Progress, ProgressCallable, SetReport
from lost.data.rows import Mixture, TokenRows
from lost.data.shards import MANIFEST_NAME, verify
from lost.data.sources import Corpus, open_sources
from lost.data.stream import TokenStream
from lost.data.tokenizer import Encoder, check_vocabulary, load_tokenizer, sample_bytes, train_tokenizer
from lost.utils.errors import DataError
from lost.utils.files import cache_folder

# Raised when the files or the making of them change: older cached rows are then left alone and made anew.
_FORMAT = 2


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
    verify_rows: bool = False,
) -> Prepared:
    """Rows and tokenizer of a data set, from the cache where they are there.

    Several processes may call this at once: one works (with processes of its own), the others wait. Memory is bounded
    whatever the size. What a killed call has finished is used by the next one.

    Args:
        vocab_size: the model's; ids of the rows are below it.
        seq_len: tokens of a row.
        tokenizer: used instead of data.tokenizer=train.
        progress: called after every batch of documents.
        verify_rows: compare rows that are there with their checksums; otherwise only sizes are.
    Raises:
        DataError: names what cannot be read, is damaged or too small, and the fix.
    """
    maker = _Maker(data, vocab_size, seq_len, progress)
    maker.is_verifying = verify_rows
    if not maker.sources.train:
        raise DataError("data.train_files is empty: name at least one file, data.train_files=[path]")
    if data.tokenizer != "train":
        tokenizer = load_tokenizer(data.tokenizer, maker.sources.hub_advice)
    elif tokenizer is None:
        tokenizer = load_tokenizer(str(maker.trained_tokenizer()))
    maker.use(tokenizer)
    if isinstance(data, C4DataConfig) and data.streaming:
        validation = maker.validation_sets()
        stream = maker.stream()
        return Prepared(stream, validation, tokenizer, _stream_fingerprint(stream, validation), maker.finished_report())
    train, validation = maker.train_sets()
    validation |= maker.validation_sets()
    mixture = Mixture(train, maker.sources.weights)
    return Prepared(mixture, validation, tokenizer, _fingerprint(mixture, validation), maker.finished_report())


def prepare_validation(
    data: DataConfig, *, vocab_size: int, seq_len: int, tokenizer: Any, progress: ProgressCallable | None = None
) -> tuple[dict[str, TokenRows], PrepareReport]:
    """Only the validation rows, by set name, for a model that has its tokenizer.

    Training documents are read only where the validation set is held out from them.

    Raises:
        DataError: as `prepare`.
    """
    maker = _Maker(data, vocab_size, seq_len, progress)
    maker.use(tokenizer)
    validation = maker.validation_sets() or maker.train_sets()[1]
    return validation, maker.finished_report()


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


class _Maker:
    """One preparation: the sources, their hashes, and what becomes of them."""

    encoder: Encoder
    is_verifying = False

    def __init__(self, data: DataConfig, vocab_size: int, seq_len: int, progress: ProgressCallable | None):
        self.started = time.monotonic()
        self.data = data
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.progress = progress or (lambda _: None)
        self.cache = cache_folder(data.cache_dir)
        self.report = PrepareReport(num_processes=processes_to_use(data.num_processes))
        self.sources = open_sources(data)
        # Fraction of the training corpora's documents held out; 0 where there are validation corpora.
        self.held_out = 0.0 if self.sources.validation else data.validation_fraction

    def use(self, tokenizer: Any) -> None:
        """Sets the tokenizer of the rows."""
        if not self.report.tokenizer:
            is_named = self.data.tokenizer != "train"
            self.report.tokenizer = self.data.tokenizer if is_named else getattr(tokenizer, "name_or_path", "given")
        self.encoder = Encoder(tokenizer, self.report.tokenizer)

    def finished_report(self) -> PrepareReport:
        self.report.seconds = time.monotonic() - self.started
        return self.report

    def trained_tokenizer(self) -> Path:
        """Folder of the tokenizer trained on the training documents."""
        key = key_of(
            format=_FORMAT,
            corpora=[corpus.content_hash for corpus in self.sources.train],
            held_out=self.held_out,
            vocab_size=self.vocab_size,
            sample=sample_bytes(self.vocab_size),
        )
        folder = self.cache / "tokenizers" / key

        def make(into: Path) -> None:
            with tokenizer_threads(self.report.num_processes):
                train_tokenizer(self._sample(), self.vocab_size, into)

        started = time.monotonic()
        if made_once(folder, lambda found: (found / "tokenizer.json").is_file(), make):
            self.report.is_cached = False
            self.report.tokenizer_seconds = time.monotonic() - started
        self.report.tokenizer = str(folder)
        return folder

    def _sample(self) -> Iterator[str]:
        """Training text for the tokenizer: all of it, or of a large corpus what a hash picks."""
        size = sum(corpus.text_size() for corpus in self.sources.train)
        # Sizes of compressed files are guesses, so the text is counted as well.
        wanted = sample_bytes(self.vocab_size)
        share, left_bytes = min(1.0, wanted / max(1, size)), 2 * wanted
        for corpus in self.sources.train:
            num_documents = num_bytes = number = 0
            for piece in corpus.pieces():
                number = 0 if piece.is_first else number + 1
                num_documents += piece.is_last
                num_bytes += piece.num_bytes
                self.progress(
                    Progress("tokenizer", corpus.name, num_documents, 0, num_bytes, piece.position, corpus.size())
                )
                # Hashed again: the key itself is below the held-out fraction or not. Each piece of a long document
                # on its own: a corpus may be one document.
                place = hash_key(f"{piece.key} {number}".encode())
                if is_held_out(piece, self.held_out) or place >= share * 2.0**64:
                    continue
                yield piece.text
                self.report.tokenizer_sample_bytes += piece.num_bytes
                left_bytes -= piece.num_bytes
                if left_bytes <= 0:
                    return

    def train_sets(self) -> tuple[list[TokenRows], dict[str, TokenRows]]:
        """The row sets to train on, and by name those held out from them."""
        train, held_out = [], {}
        is_mixture = len(self.sources.train) > 1
        for corpus in self.sources.train:
            folder = self._row_folder(corpus, self.held_out)
            train.append(self._open(folder / "train", f"train/{corpus.name}" if is_mixture else "train"))
            if self.held_out:
                name = corpus.name if is_mixture else "validation"
                held_out[name] = self._open(folder / "validation", name)
        return train, held_out

    def stream(self) -> TokenStream:
        """The training corpus as it comes."""
        (corpus,) = self.sources.train
        assert isinstance(corpus, C4Corpus), corpus
        return TokenStream(corpus, self.encoder, self.data.row_maker, self.seq_len, self.vocab_size)

    def validation_sets(self) -> dict[str, TokenRows]:
        """The row sets of the validation corpora, by name."""
        corpora = self.sources.validation.items()
        return {name: self._open(self._row_folder(corpus, 0.0) / "train", name) for name, corpus in corpora}

    def _open(self, folder: Path, name: str) -> TokenRows:
        rows = TokenRows(folder, isolate_documents=self.data.isolate_documents)
        self.report.sets[name] = SetReport.from_dict(rows.meta)
        self.report.folders[name] = folder
        check_vocabulary(rows.meta["max_token_id"], self.vocab_size, self.encoder.label)
        return rows

    def _row_folder(self, corpus: Corpus, held_out: float) -> Path:
        """Folder of the corpus's row sets, made if it is not there."""
        key = key_of(
            format=_FORMAT,
            corpus=corpus.content_hash,
            tokenizer=self.encoder.fingerprint,
            row_maker=self.data.row_maker,
            seq_len=self.seq_len,
            held_out=held_out,
        )
        folder = self.cache / "rows" / key
        splits = ["train", "validation"] if held_out else ["train"]

        def is_whole(found: Path) -> bool:
            return all((found / split / MANIFEST_NAME).is_file() for split in splits)

        started = time.monotonic()
        if made_once(folder, is_whole, lambda into: self._write_rows(corpus, into, held_out), is_resumable=True):
            self.report.is_cached = False
            self.report.row_seconds += time.monotonic() - started
        elif self.is_verifying:
            self.report.verified_bytes += sum(verify(folder / split) for split in splits)
        return folder

    def _write_rows(self, corpus: Corpus, into: Path, held_out: float) -> None:
        rows = CorpusRows(
            corpus,
            into,
            held_out=held_out,
            row_maker=self.data.row_maker,
            seq_len=self.seq_len,
            encoder=self.encoder,
            vocab_size=self.vocab_size,
            num_processes=self.report.num_processes,
            show=lambda reports, position: self._show(corpus, reports, position),
        )
        found = [sum(getattr(report, count) for report in rows.reports) for count in ("tokens", "text_bytes")]
        rows.write()
        self.report.encoded_tokens += sum(report.tokens for report in rows.reports) - found[0]
        self.report.encoded_bytes += sum(report.text_bytes for report in rows.reports) - found[1]
        must_fill_a_row = self.data.row_maker == "packed" and corpus not in self.sources.validation.values()
        rows.check_sizes(self.seq_len if must_fill_a_row else None)

    def _show(self, corpus: Corpus, reports: list[SetReport], position: int) -> None:
        documents, tokens, text_bytes = (
            sum(getattr(report, count) for report in reports) for count in ("documents", "tokens", "text_bytes")
        )
        self.progress(Progress("rows", corpus.name, documents, tokens, text_bytes, position, corpus.size()))
