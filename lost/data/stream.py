"""Training rows made of a stream as it comes, without rows on disk.

The price is the data position: a resumed run begins the stream anew. Shape letters: N rows, T seq_len.
"""

from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lost.data.encoding import tokenizer_threads
from lost.data.files import Piece
from lost.data.hub import C4Corpus
from lost.data.order import derive_seed
from lost.data.row_makers import batches
from lost.data.rows import NO_LOSS, Batch
from lost.data.tokenizer import Encoder, check_vocabulary
from lost.utils.errors import DataError
from lost.utils.logging import get_logger

log = get_logger(__name__)

# Ids of a row and how many of them are not padding.
Row = tuple[np.ndarray, int]


class TokenStream:
    """What training reads instead of a Mixture where data.streaming is set.

    Args:
        row_maker: "packed" or "padded".
    """

    def __init__(self, corpus: C4Corpus, encoder: Encoder, row_maker: str, seq_len: int, vocab_size: int):
        self.corpus = corpus
        self.encoder = encoder
        self.row_maker = row_maker
        self.seq_len = seq_len
        self.vocab_size = vocab_size

    def describe(self) -> str:
        """What there is to train on, in words."""
        return "a stream, whose place a resume loses"

    def rows(self, seed: int, process_index: int, num_processes: int) -> Iterator[Row]:
        """The rows of one reader (this one), pass after pass, each pass in another shuffle.

        Raises:
            DataError: a pass without a row.
        """
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        carried = np.empty(0, dtype=self.encoder.dtype)
        for turn in count():
            pieces = self.corpus.part(derive_seed(seed, turn), process_index, num_processes, num_workers)
            documents = self._documents(pieces)
            num_rows = 0
            for row in self._padded(documents) if self.row_maker == "padded" else self._packed(documents, carried):
                if row[1] < self.seq_len and self.row_maker == "packed":
                    # The last row of a pass is filled in the next one.
                    carried = row[0][: row[1]]
                    continue
                num_rows += 1
                yield row
            if not num_rows:
                raise DataError(
                    f"{self.corpus.name}: a reader found no whole row in a pass over the stream, which {num_processes}"
                    f" processes with {num_workers} readers each share: have fewer of them (data.num_workers), more"
                    " files or more text"
                )

    def _documents(self, pieces: Iterable[Piece]) -> Iterator[np.ndarray]:
        """The ids of each document that has text, without EOS."""
        parts, has_text = [], False
        for batch in batches(pieces):
            with tokenizer_threads(1):
                encoded = self.encoder.encode([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                check_vocabulary(int(ids.max(initial=0)), self.vocab_size, self.encoder.label)
                parts.append(ids)
                has_text = has_text or bool(piece.text and not piece.text.isspace())
                if piece.is_last:
                    document = np.concatenate(parts)
                    if has_text and document.size:
                        yield document
                    parts, has_text = [], False

    def _padded(self, documents: Iterable[np.ndarray]) -> Iterator[Row]:
        for document in documents:
            kept = document[: self.seq_len - 1]
            row = np.full(self.seq_len, self.encoder.pad_id, dtype=document.dtype)
            row[: len(kept)] = kept
            row[len(kept)] = self.encoder.eos_id
            yield row, len(kept) + 1

    def _packed(self, documents: Iterable[np.ndarray], carried: np.ndarray) -> Iterator[Row]:
        """Full rows; then, if tokens are left, one that is not."""
        end = np.array([self.encoder.eos_id], dtype=carried.dtype)
        for document in documents:
            carried = np.concatenate([carried, document, end])
            num_full = len(carried) // self.seq_len
            for row in carried[: num_full * self.seq_len].reshape(num_full, self.seq_len):
                yield row, self.seq_len
            carried = carried[num_full * self.seq_len :]
        if carried.size:
            yield carried, len(carried)


class StreamBatches(IterableDataset):
    """Micro-batches of one process from `first_step` on; several reading processes share its part of the stream."""

    def __init__(
        self,
        stream: TokenStream,
        *,
        seed: int,
        first_step: int,
        micro_batch_size: int,
        process_index: int,
        num_processes: int,
    ):
        self._stream = stream
        # Of the step, so that a resumed run does not begin with the documents of the run's beginning.
        self._seed = derive_seed(seed, first_step)
        self._micro_batch_size = micro_batch_size
        self._process_index = process_index
        self._num_processes = num_processes
        if first_step > 1 and process_index == 0:
            log.warning(
                "data.streaming: step %d begins the stream anew, in another shuffle. What this loses is the place in"
                " the pass: documents that were read may come again before all others have come, and the run does not"
                " equal an unbroken one. Rows on disk (data.streaming=false) lose nothing",
                first_step,
            )

    def __iter__(self) -> Iterator[Batch]:
        rows = self._stream.rows(self._seed, self._process_index, self._num_processes)
        while True:
            yield batch_of([next(rows) for _ in range(self._micro_batch_size)])


def batch_of(rows: list[Row]) -> Batch:
    """input_ids int64 [N, T], and labels, the same with -100 where a row is padding."""
    input_ids = torch.from_numpy(np.stack([ids for ids, _ in rows]).astype(np.int64))
    lengths = torch.tensor([length for _, length in rows])
    is_padding = torch.arange(input_ids.shape[1]) >= lengths[:, None]
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(is_padding, NO_LOSS)}
