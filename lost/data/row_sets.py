"""The row sets that data settings name, found in the cache or made: all that `lost prepare` does.

Imports neither torch nor transformers, which take longer to load than the standard library takes to tokenise.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lost.config.data import C4DataConfig, DataConfig
from lost.data.cache import key_of, made_once
from lost.data.corpus_rows import CorpusRows, is_held_out
from lost.data.encoding import processes_to_use, tokenizer_threads
from lost.data.files import hash_key
from lost.data.report import PrepareReport, Progress, ProgressCallable, SetReport
from lost.data.shards import MANIFEST_NAME, read_manifest, verify
from lost.data.sources import Corpus, open_sources
from lost.data.tokenizer import (
    TOKENIZER_NAME,
    Encoder,
    TrainedTokenizer,
    check_vocabulary,
    load_tokenizer,
    sample_bytes,
    train_tokenizer,
)
from lost.utils.errors import DataError
from lost.utils.files import cache_folder

# Raised when the files or the making of them change: older cached rows are then left alone and made anew.
_FORMAT = 2


def make_rows(
    data: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    tokenizer: Any = None,
    progress: ProgressCallable | None = None,
) -> PrepareReport:
    """Rows and tokenizer of a data set on disk, as `lost.data.prepare` makes and finds them, and nothing loaded.

    Rows that are there are compared with their checksums.

    Args:
        vocab_size, seq_len, tokenizer, progress: as of `lost.data.prepare`.
    Raises:
        DataError: names what cannot be read, is damaged or too small, and the fix.
    """
    sets = RowSets(data, vocab_size, seq_len, progress, verify_rows=True)
    sets.choose_tokenizer(tokenizer, TrainedTokenizer)
    if not is_streamed(data):
        sets.train_folders()
    sets.validation_folders()
    return sets.finished_report()


def is_streamed(data: DataConfig) -> bool:
    """Whether training reads its documents as they come, so that only the validation rows are made."""
    return isinstance(data, C4DataConfig) and data.streaming


class RowSets:
    """One preparation: the sources, their hashes, and what becomes of them. The tokenizer comes before the folders.

    Args:
        verify_rows: compare rows that are there with their checksums; otherwise only sizes are.
    """

    encoder: Encoder

    def __init__(
        self,
        data: DataConfig,
        vocab_size: int,
        seq_len: int,
        progress: ProgressCallable | None,
        verify_rows: bool = False,
    ):
        self.started = time.monotonic()
        self.data = data
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.progress = progress or (lambda _: None)
        self.is_verifying = verify_rows
        self.cache = cache_folder(data.cache_dir)
        self.report = PrepareReport(num_processes=processes_to_use(data.num_processes))
        self.sources = open_sources(data)
        # Fraction of the training corpora's documents held out; 0 where there are validation corpora.
        self.held_out = 0.0 if self.sources.validation else data.validation_fraction

    def choose_tokenizer(self, given: Any, open_trained: Callable[[Path], Any]) -> Any:
        """Uses the tokenizer that the settings name, else the one given, else one trained on the training documents.

        Args:
            given: a transformers tokenizer or None.
            open_trained: opens the folder of the trained one.
        """
        if not self.sources.train:
            raise DataError("data.train_files is empty: name at least one file, data.train_files=[path]")
        if self.data.tokenizer != "train":
            given = load_tokenizer(self.data.tokenizer, self.sources.hub_advice)
        elif given is None:
            given = open_trained(self.trained_tokenizer())
        self.use(given)
        return given

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
        if made_once(folder, lambda found: (found / TOKENIZER_NAME).is_file(), make):
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

    def train_folders(self) -> tuple[list[Path], dict[str, Path]]:
        """The folders of the row sets to train on, and by name of those held out from them."""
        train, held_out = [], {}
        is_mixture = len(self.sources.train) > 1
        for corpus in self.sources.train:
            folder = self._row_folder(corpus, self.held_out)
            train.append(self._found(folder / "train", f"train/{corpus.name}" if is_mixture else "train"))
            if self.held_out:
                name = corpus.name if is_mixture else "validation"
                held_out[name] = self._found(folder / "validation", name)
        return train, held_out

    def validation_folders(self) -> dict[str, Path]:
        """The folders of the validation corpora's row sets, by name."""
        corpora = self.sources.validation.items()
        return {name: self._found(self._row_folder(corpus, 0.0) / "train", name) for name, corpus in corpora}

    def _found(self, folder: Path, name: str) -> Path:
        """Reports a row set; refuses one that is damaged or has ids that the model has not."""
        meta = read_manifest(folder)
        self.report.sets[name] = SetReport.from_dict(meta)
        self.report.folders[name] = folder
        check_vocabulary(meta["max_token_id"], self.vocab_size, self.encoder.label)
        return folder

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
