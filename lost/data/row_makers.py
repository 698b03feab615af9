"""Documents to row sets on disk, in bounded memory.

Two row makers: "packed" joins documents with EOS after each and cuts the stream into rows; "padded" puts one document
in a row, cut off so that EOS ends it (as the t5 tokenizer's own truncation does: the lineage's recipe).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lost.data.files import Piece
from lost.data.report import SetReport
from lost.data.tokenizer import Encoder, check_vocabulary

# Characters and pieces that are tokenised at once: enough to occupy all cores, below 200 MB of encodings.
_BATCH_CHARACTERS = 1 << 20
_BATCH_PIECES = 512


class RowWriter:
    """Writes one row set. Call `add` for every batch of pieces, then `close`.

    Args:
        folder: an empty folder.
        row_maker: "packed" or "padded".
        seq_len: tokens of a row.
    """

    def __init__(self, folder: Path, row_maker: str, seq_len: int, encoder: Encoder, vocab_size: int):
        self.report = SetReport()
        self._folder = folder
        self._is_packed = row_maker == "packed"
        self._seq_len = seq_len
        self._encoder = encoder
        self._vocab_size = vocab_size
        self._dtype = np.dtype(np.uint16 if max(encoder.max_id, encoder.pad_id) < 1 << 16 else np.uint32)
        self._digest = hashlib.sha256()
        self._tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115
        self._starts = open(folder / "starts.bin", "wb")  # noqa: SIM115
        self._lengths = open(folder / "lengths.bin", "wb")  # noqa: SIM115
        self._num_written = 0
        # Of the document that is being read: what it has so far.
        self._document_tokens: list[int] = []
        self._num_document_tokens = 0
        self._is_invalid = False
        self._has_text = False

    def add(self, pieces: list[Piece]) -> None:
        """Tokenises the pieces and writes what is complete.

        Raises:
            DataError: a token id that the model's vocabulary does not have.
        """
        encoded = self._encoder.encode([piece.text for piece in pieces])
        largest = max((max(ids) for ids in encoded if ids), default=-1)
        self.report.max_token_id = max(self.report.max_token_id, largest)
        check_vocabulary(largest, self._vocab_size, self._encoder.label)
        for piece, ids in zip(pieces, encoded, strict=True):
            self._add_piece(piece, ids)

    def _add_piece(self, piece: Piece, ids: list[int]) -> None:
        self.report.text_bytes += piece.num_bytes
        self.report.invalid_sequences += piece.num_invalid
        if piece.num_invalid:
            self._is_invalid = True
            self.report.add_invalid_file(piece.file)
        self._has_text = self._has_text or bool(piece.text and not piece.text.isspace())
        self._num_document_tokens += len(ids)
        if self._is_packed:
            self._document_tokens += ids
            # A document of many pieces goes to the disk as it comes.
            if not piece.is_last and self._has_text and self._document_tokens:
                self._write_document_part()
        elif len(self._document_tokens) < self._seq_len:
            self._document_tokens += ids[: self._seq_len]
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
            self._document_tokens.append(self._encoder.eos_id)
            self._num_document_tokens += 1
            self._write_document_part()
        else:
            self._write_padded()
        self._document_tokens, self._num_document_tokens = [], 0
        self._is_invalid = self._has_text = False

    def _write_document_part(self) -> None:
        if self._num_document_tokens == len(self._document_tokens):
            np.array([self._num_written], dtype=np.int64).tofile(self._starts)
        self._write(self._document_tokens)
        self.report.tokens += len(self._document_tokens)
        self._document_tokens = []

    def _write_padded(self) -> None:
        kept = self._document_tokens[: self._seq_len - 1] + [self._encoder.eos_id]
        num_cut = self._num_document_tokens - (len(kept) - 1)
        self.report.truncated_documents += num_cut > 0
        self.report.truncated_tokens += num_cut
        self.report.tokens += len(kept)
        np.array([self._num_written], dtype=np.int64).tofile(self._starts)
        np.array([len(kept)], dtype=np.int32).tofile(self._lengths)
        self._write(kept + [self._encoder.pad_id] * (self._seq_len - len(kept)))

    def _write(self, ids: list[int]) -> None:
        raw = np.array(ids, dtype=self._dtype).tobytes()
        self._digest.update(raw)
        self._tokens.write(raw)
        self._num_written += len(ids)

    def close(self) -> None:
        """Fills the last row with padding and writes meta.json, which completes the folder."""
        num_rows = -(-self._num_written // self._seq_len)
        if self._is_packed and num_rows:
            last_length = self._num_written - (num_rows - 1) * self._seq_len
            self._write([self._encoder.pad_id] * (self._seq_len - last_length))
            _write_lengths(self._lengths, num_rows, self._seq_len, last_length)
        self.report.rows = num_rows
        self.abandon()
        meta = self.report.to_dict() | {
            "seq_len": self._seq_len,
            "dtype": self._dtype.name,
            "eos_id": self._encoder.eos_id,
            "pad_id": self._encoder.pad_id,
            "sha256": self._digest.hexdigest(),
            "file_bytes": {path.name: path.stat().st_size for path in sorted(self._folder.glob("*.bin"))},
        }
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=1))

    def abandon(self) -> None:
        """Closes the files."""
        for file in (self._tokens, self._starts, self._lengths):
            file.close()


def _write_lengths(file, num_rows: int, seq_len: int, last_length: int) -> None:
    """Full rows and a last one, in bounded blocks."""
    left = num_rows - 1
    while left:
        count = min(left, 1 << 20)
        np.full(count, seq_len, dtype=np.int32).tofile(file)
        left -= count
    np.array([last_length], dtype=np.int32).tofile(file)


def is_row_set(folder: Path) -> bool:
    """Whether a folder holds a whole row set: meta.json, and every file as long as it says."""
    try:
        sizes = json.loads((folder / "meta.json").read_text())["file_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


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
