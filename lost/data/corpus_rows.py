"""The row sets of one corpus: "train" and, where a part is held out, "validation". Resumable shard by shard."""

import json
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np

from lost.data.encoding import EncodedBatch, encode_in_order
from lost.data.files import Piece
from lost.data.report import SetReport
from lost.data.row_makers import RowWriter, WriterState, batches
from lost.data.shards import check_sizes, files_of, write_durably
from lost.data.sources import Corpus
from lost.data.tokenizer import Encoder
from lost.utils.errors import DataError
from lost.utils.logging import get_logger

log = get_logger(__name__)

# Tokens of a shard, give or take a batch: 128 MiB of uint16, one or two minutes of work for one core to lose by a kill.
SHARD_TOKENS = 1 << 26
_PROGRESS_NAME = "progress.json"


def is_held_out(piece: Piece, fraction: float) -> bool:
    """Whether the piece's document belongs to the part that is held out."""
    return piece.key < fraction * 2.0**64


class CorpusRows:
    """Writes the row sets of a corpus into a folder, and goes on where an earlier one was killed.

    All splits end their shards together. After each, progress.json says how many pieces went into the shards, and what
    the writers hold beside them; who finds it reads over those pieces, which takes a fraction of tokenising them.

    Args:
        folder: an empty folder, or what a killed preparation of the same rows left.
        held_out: fraction of the documents that go to "validation"; 0: that set is not made.
        show: called with the counts of all splits and the position after every batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        *,
        held_out: float,
        row_maker: str,
        seq_len: int,
        encoder: Encoder,
        vocab_size: int,
        num_processes: int,
        show: Callable[[list[SetReport], int], None],
    ):
        self._corpus = corpus
        self._folder = folder
        self._held_out = held_out
        self._encoder = encoder
        self._num_processes = num_processes
        self._show = show
        self._progress = self._found_progress()
        self._writers = []
        for split in ["train", "validation"] if held_out else ["train"]:
            (folder / split).mkdir(exist_ok=True)
            stored = self._progress["writers"].get(split)
            state = WriterState.from_dict(stored) if stored else None
            writer = RowWriter(folder / split, row_maker, seq_len, encoder, vocab_size, state)
            self._writers.append((split, writer))

    @property
    def reports(self) -> list[SetReport]:
        return [writer.report for _, writer in self._writers]

    def _found_progress(self) -> dict:
        path = self._folder / _PROGRESS_NAME
        if not path.is_file():
            return {"pieces": 0, "lowest_key": 1 << 64, "writers": {}}
        progress = json.loads(path.read_text())
        num_shards = 0
        for split, state in progress["writers"].items():
            check_sizes(self._folder / split, files_of(state["shards"]))
            num_shards += len(state["shards"])
        log.info("%s: going on after %d finished shards", self._corpus.name, num_shards)
        return progress

    def write(self) -> None:
        """Makes the row sets.

        Raises:
            DataError: the corpus cannot be read, or gives no row to train or validate on.
        """
        self._show(self.reports, 0)
        try:
            # Closed at once also after an error: it holds processes.
            with closing(self._encoded()) as encoded_batches:
                for batch, encoded in encoded_batches:
                    self._add(batch, encoded)
                    self._show(self.reports, batch[-1].position)
                    if max(writer.num_shard_tokens for _, writer in self._writers) >= SHARD_TOKENS:
                        self._end_shards()
            for _, writer in self._writers:
                writer.close()
        finally:
            for _, writer in self._writers:
                writer.abandon()
        (self._folder / _PROGRESS_NAME).unlink(missing_ok=True)

    def _encoded(self) -> Generator[EncodedBatch, None, None]:
        pieces = self._corpus.pieces()
        for piece in islice(pieces, self._progress["pieces"]):
            self._show(self.reports, piece.position)
        return encode_in_order(batches(pieces), self._encoder, self._num_processes)

    def _add(self, batch: list[Piece], encoded: list[np.ndarray]) -> None:
        progress = self._progress
        progress["pieces"] += len(batch)
        progress["lowest_key"] = min(progress["lowest_key"], *(piece.key for piece in batch))
        for split, writer in self._writers:
            mine = [
                (piece, ids)
                for piece, ids in zip(batch, encoded, strict=True)
                if is_held_out(piece, self._held_out) == (split == "validation")
            ]
            writer.add([piece for piece, _ in mine], [ids for _, ids in mine])

    def _end_shards(self) -> None:
        self._progress["writers"] = {split: writer.end_shard().to_dict() for split, writer in self._writers}
        write_durably(self._folder / _PROGRESS_NAME, self._progress)

    def check_sizes(self, seq_len: int | None) -> None:
        """Refuses a corpus that gives no row to train or validate on.

        Args:
            seq_len: tokens that the training rows must fill one row of; None: any number will do.
        """
        name, fraction = self._corpus.name, self._held_out
        whole, *others = self.reports
        documents = sum(report.documents for report in self.reports)
        empty = sum(report.empty_documents for report in self.reports)
        if documents == empty:
            raise DataError(f"{name}: no text in {documents} documents ({empty} empty): give files with text")
        if others and documents - empty == 1:
            raise DataError(f"{name}: one document cannot be split: name data.validation_files, or give more documents")
        if others and not others[0].rows:
            lowest = self._progress["lowest_key"] / 2**64
            raise DataError(
                f"{name}: validation_fraction = {fraction:g} of {documents} documents holds out none: name"
                f" data.validation_files, or set data.validation_fraction above {lowest:.3g}"
            )
        if not whole.rows:
            raise DataError(
                f"{name}: validation_fraction = {fraction:g} of {documents} documents leaves none to train on: name"
                " data.validation_files, or lower data.validation_fraction"
            )
        if seq_len and whole.tokens < seq_len:
            raise DataError(
                f"{name}: {whole.tokens} tokens in {whole.documents} documents do not fill one row of seq_len ="
                f" {seq_len}: give more text or lower train.seq_len"
            )
