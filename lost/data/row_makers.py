"""Documents to row sets on disk, in bounded memory and in shards of bounded size.

Two row makers: "packed" joins documents with EOS after each and cuts the stream into rows; "padded" puts one document
in a row, cut off so that EOS ends it (as the t5 tokenizer's own truncation does: the lineage's recipe).
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lost.data.files import Piece
from lost.data.report import SetReport
from lost.data.shards import ShardFile, write_manifest
from lost.data.tokenizer import Encoder, check_vocabulary

# Characters and pieces that are tokenised at once: so little that a batch of encodings stays below 100 MB, and that
# the standard library's 11 MB spread evenly over several processes.
_BATCH_CHARACTERS = 1 << 18
_BATCH_PIECES = 512


@dataclass
class WriterState:
    """What a RowWriter knows between two shards; plain values, so that a killed preparation goes on from it.

    Args:
        report: the counts so far.
        shards: entries of the finished shards for the manifest.
        tail: tokens of the row that is not full yet.
        tail_starts: places in `tail` where a document begins.
        document: tokens that are kept of the document being read.
        num_document_tokens: how many it has had.
        is_invalid, has_text: whether it has had invalid bytes, anything but white space.
    """

    report: SetReport = field(default_factory=SetReport)
    shards: list[dict] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    tail_starts: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    num_document_tokens: int = 0
    is_invalid: bool = False
    has_text: bool = False

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "WriterState":
        return cls(**{**values, "report": SetReport.from_dict(values["report"])})


class RowWriter:
    """Writes one row set. Call `add` for every batch of pieces, `end_shard` between two batches, then `close`.

    Args:
        folder: an empty folder, or the one that `state` describes.
        row_maker: "packed" or "padded".
        seq_len: tokens of a row.
        state: what an earlier writer returned from `end_shard`.
    """

    def __init__(
        self,
        folder: Path,
        row_maker: str,
        seq_len: int,
        encoder: Encoder,
        vocab_size: int,
        state: WriterState | None = None,
    ):
        self._folder = folder
        self._is_packed = row_maker == "packed"
        self._seq_len = seq_len
        self._encoder = encoder
        self._vocab_size = vocab_size
        state = state or WriterState()
        self.report = state.report
        self._shards = state.shards
        # Of the document that is being read.
        self._document = [np.array(state.document, dtype=encoder.dtype)]
        self._num_document_tokens = state.num_document_tokens
        self._is_invalid, self._has_text = state.is_invalid, state.has_text
        self._begin_shard(state.tail, state.tail_starts)

    def _begin_shard(self, tail: list[int], tail_starts: list[int]) -> None:
        names = {kind: f"{kind}_{len(self._shards):05d}.bin" for kind in ("tokens", "lengths", "starts")}
        self._files = {kind: ShardFile(self._folder / name) for kind, name in names.items()}
        # Tokens of the shard that are written, and those that wait for their row to be full.
        self.num_shard_tokens = 0
        self._waiting = [np.array(tail, dtype=self._encoder.dtype)]
        self._num_waiting = len(tail)
        self._starts = list(tail_starts)
        self._lengths: list[int] = []

    def add(self, pieces: list[Piece], encoded: list[np.ndarray]) -> None:
        """Writes the rows that these pieces, with the ids of each, make full.

        Raises:
            DataError: a token id that the model's vocabulary does not have.
        """
        largest = max((int(ids.max()) for ids in encoded if ids.size), default=-1)
        self.report.max_token_id = max(self.report.max_token_id, largest)
        check_vocabulary(largest, self._vocab_size, self._encoder.label)
        for piece, ids in zip(pieces, encoded, strict=True):
            self._add_piece(piece, ids)
        self._write_full_rows()

    def _add_piece(self, piece: Piece, ids: np.ndarray) -> None:
        self.report.text_bytes += piece.num_bytes
        self.report.invalid_sequences += piece.num_invalid
        if piece.num_invalid:
            self._is_invalid = True
            self.report.add_invalid_file(piece.file)
        self._has_text = self._has_text or bool(piece.text and not piece.text.isspace())
        num_before = self._num_document_tokens
        self._num_document_tokens += len(ids)
        if self._is_packed:
            self._document.append(ids)
            # A document of many pieces goes to the disk as it comes.
            if not piece.is_last and self._has_text:
                self._append_document_part()
        elif num_before < self._seq_len:
            self._document.append(ids[: self._seq_len - num_before])
        if piece.is_last:
            self._end_document()

    def _end_document(self) -> None:
        report = self.report
        report.documents += 1
        report.invalid_documents += self._is_invalid
        # A tokenizer may drop all characters of a text, for instance control characters.
        if not self._has_text or not self._num_document_tokens:
            report.empty_documents += 1
        elif self._is_packed:
            self._document.append(np.array([self._encoder.eos_id], dtype=self._encoder.dtype))
            self._num_document_tokens += 1
            self._append_document_part()
        else:
            self._append_padded()
        self._document, self._num_document_tokens = [], 0
        self._is_invalid = self._has_text = False

    def _append_document_part(self) -> None:
        num_tokens = sum(map(len, self._document))
        if num_tokens and self._num_document_tokens == num_tokens:
            self._starts.append(self.num_shard_tokens + self._num_waiting)
        for ids in self._document:
            self._append(ids)
        self.report.tokens += num_tokens
        self._document = []

    def _append_padded(self) -> None:
        row = np.full(self._seq_len, self._encoder.pad_id, dtype=self._encoder.dtype)
        kept = np.concatenate(self._document)[: self._seq_len - 1]
        row[: len(kept)] = kept
        row[len(kept)] = self._encoder.eos_id
        num_cut = self._num_document_tokens - len(kept)
        self.report.truncated_documents += num_cut > 0
        self.report.truncated_tokens += num_cut
        self.report.tokens += len(kept) + 1
        self._starts.append(self.num_shard_tokens + self._num_waiting)
        self._lengths.append(len(kept) + 1)
        self._append(row)

    def _append(self, ids: np.ndarray) -> None:
        self._waiting.append(ids)
        self._num_waiting += len(ids)

    def _write_full_rows(self, last_length: int = 0) -> None:
        """Writes what fills rows; `last_length`: tokens of the last of them that are no padding, 0: all of them."""
        num_rows = self._num_waiting // self._seq_len
        num_tokens = num_rows * self._seq_len
        tokens = np.concatenate(self._waiting)
        self._files["tokens"].write(tokens[:num_tokens])
        self._waiting, self._num_waiting = [tokens[num_tokens:]], len(tokens) - num_tokens
        self.num_shard_tokens += num_tokens
        self.report.rows += num_rows
        if self._is_packed:
            lengths = np.full(num_rows, self._seq_len, dtype=np.int32)
        else:
            lengths = np.array(self._lengths, dtype=np.int32)
        if last_length:
            lengths[-1] = last_length
        self._files["lengths"].write(lengths)
        self._lengths = []
        starts = np.array(self._starts, dtype=np.int64)
        num_starts = int(np.searchsorted(starts, self.num_shard_tokens))
        self._files["starts"].write(starts[:num_starts])
        self._starts = self._starts[num_starts:]

    def end_shard(self) -> WriterState:
        """Finishes the shard and begins another; what a writer needs that goes on from here."""
        tail = np.concatenate(self._waiting).tolist()
        tail_starts = [start - self.num_shard_tokens for start in self._starts]
        files = dict(file.finish() for file in self._files.values())
        if self.num_shard_tokens:
            self._shards.append({"rows": self.num_shard_tokens // self._seq_len, "files": files})
        else:
            for name in files:
                (self._folder / name).unlink()
        self._begin_shard(tail, tail_starts)
        document = np.concatenate(self._document).tolist() if self._document else []
        return WriterState(
            report=self.report,
            shards=self._shards,
            tail=tail,
            tail_starts=tail_starts,
            document=document,
            num_document_tokens=self._num_document_tokens,
            is_invalid=self._is_invalid,
            has_text=self._has_text,
        )

    def close(self) -> None:
        """Fills the last row with padding and writes the manifest, which completes the folder."""
        last_length = self._num_waiting
        if last_length:
            padding = np.full(self._seq_len - last_length, self._encoder.pad_id, dtype=self._encoder.dtype)
            self._append(padding)
            self._write_full_rows(last_length)
        self.end_shard()
        self.abandon()
        facts = {
            "seq_len": self._seq_len,
            "dtype": self._encoder.dtype.name,
            "eos_id": self._encoder.eos_id,
            "pad_id": self._encoder.pad_id,
        }
        write_manifest(self._folder, self.report.to_dict() | facts, self._shards)

    def abandon(self) -> None:
        """Closes the files of the shard that is not finished, and removes them."""
        for file in self._files.values():
            file.abandon()


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of bounded size."""
    batch, num_characters = [], 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece.text)
        if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
