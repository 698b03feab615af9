"""Rows of tokens on disk, memory-mapped: what training and evaluation read. Shape letters: N rows read, T seq_len."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lost.data.order import MixtureOrder
from lost.data.shards import read_manifest
from lost.utils.errors import DataError

Batch = dict[str, torch.Tensor]
NO_LOSS = -100


class TokenRows:
    """The rows of one set.

    Args:
        folder: a row set's folder.
        isolate_documents: also give position_ids and attention_mask, which restart at every document.
    Raises:
        DataError: files are missing or of a wrong size.
    """

    def __init__(self, folder: Path | str, *, isolate_documents: bool = False):
        self.folder = Path(folder)
        self.isolate_documents = isolate_documents
        self.meta = read_manifest(self.folder)
        self.seq_len: int = self.meta["seq_len"]
        self.num_tokens: int = self.meta["tokens"]
        self._num_shard_rows: list[int] = [shard["rows"] for shard in self.meta["shards"]]
        self._ends = np.cumsum(self._num_shard_rows, dtype=np.int64)
        self._maps: dict[int, _Maps] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getstate__(self) -> dict:
        # A memory map would be pickled as its whole content; reader processes open their own.
        return self.__dict__ | {"_maps": {}}

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows at `indices`.

        Returns:
            input_ids int64 [N, T]; labels int64 [N, T], the same with -100 where no loss is taken: padding and, with
            isolate_documents, every document's first token. The model shifts them. With isolate_documents also
            position_ids int64 [N, T] and attention_mask bool [N, 1, T, T], true where a query sees a key.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a set of {len(self)}")
        ids = np.empty((len(wanted), self.seq_len), dtype=np.int64)
        lengths = np.empty((len(wanted), 1), dtype=np.int64)
        is_start = np.zeros(ids.shape, dtype=bool)
        which = np.searchsorted(self._ends, wanted, side="right")
        for shard in np.unique(which).tolist():
            places = np.flatnonzero(which == shard)
            rows = wanted[places] - (self._ends[shard] - self._num_shard_rows[shard])
            maps = self._open(shard)
            ids[places], lengths[places, 0] = maps.tokens[rows], maps.lengths[rows]
            if self.isolate_documents:
                is_start[places] = _document_starts(rows, maps.starts, self.seq_len)
        input_ids = torch.from_numpy(ids)
        is_padding = torch.arange(self.seq_len) >= torch.from_numpy(lengths)
        labels = input_ids.masked_fill(is_padding, NO_LOSS)
        batch = {"input_ids": input_ids, "labels": labels}
        if self.isolate_documents:
            is_first = torch.from_numpy(is_start) | _first_of(is_padding)
            batch["labels"] = labels.masked_fill(is_first, NO_LOSS)
            batch |= isolated(is_first)
        return batch

    def _open(self, shard: int) -> "_Maps":
        if shard not in self._maps:
            tokens, lengths, starts = (self.folder / f"{kind}_{shard:05d}.bin" for kind in _Maps._fields)
            shape = (self._num_shard_rows[shard], self.seq_len)
            self._maps[shard] = _Maps(
                np.memmap(tokens, mode="r", dtype=self.meta["dtype"], shape=shape),
                np.memmap(lengths, mode="r", dtype=np.int32, shape=shape[:1]),
                # The middle of a long document holds no start, and an empty file cannot be mapped.
                np.memmap(starts, mode="r", dtype=np.int64) if starts.stat().st_size else np.empty(0, dtype=np.int64),
            )
        return self._maps[shard]


class _Maps(NamedTuple):
    """The files of one shard."""

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray


def _document_starts(rows: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """Whether each place of a shard's rows holds a document's first token, bool [N, T]."""
    flags = np.zeros((len(rows), seq_len), dtype=bool)
    for n, row in enumerate(rows):
        first, last = np.searchsorted(starts, [row * seq_len, (row + 1) * seq_len])
        flags[n, starts[first:last] - row * seq_len] = True
    return flags


def _first_of(is_padding: torch.Tensor) -> torch.Tensor:
    """Marks the first padding place of each row, so that padding is a document of its own: [N, T]."""
    before = torch.zeros_like(is_padding)
    before[:, 1:] = is_padding[:, :-1]
    return is_padding & ~before


def isolated(is_first: torch.Tensor) -> Batch:
    """position_ids [N, T] and attention_mask bool [N, 1, T, T] that restart wherever `is_first` [N, T] is true.

    Boolean, because that is right with transformers' default attention (sdpa) in every dtype: an additive float32 mask
    gives wrong numbers, silently, with float64 queries (torch 2.13, CPU). Eager attention would add it as 0 and 1.
    A row that begins inside a document counts from 0 too: its beginning is in another row.
    """
    document = is_first.cumsum(dim=1)
    places = torch.arange(is_first.shape[1]).expand(is_first.shape)
    start = torch.where(is_first, places, 0).cummax(dim=1).values
    is_same = document[:, :, None] == document[:, None, :]
    is_past = places[:, :, None] >= places[:, None, :]
    return {"position_ids": places - start, "attention_mask": (is_same & is_past)[:, None]}


class Mixture:
    """Several row sets read as one; the row ids of set k follow those of set k-1.

    Args:
        sets: row sets of one seq_len.
        weights: share of each set in an epoch; None: by size.
    """

    def __init__(self, sets: list[TokenRows], weights: list[float] | None = None):
        assert sets, "a mixture needs a set"
        assert weights is None or len(weights) == len(sets), (weights, len(sets))
        self.sets = sets
        self.weights = weights
        self.seq_len = sets[0].seq_len
        self.num_tokens = sum(rows.num_tokens for rows in sets)
        self._ends = np.cumsum([len(rows) for rows in sets])

    def describe(self) -> str:
        """What there is to train on, in words."""
        return f"{self.num_tokens:,} tokens to train on"

    def __len__(self) -> int:
        """Rows of an epoch."""
        return int(self._ends[-1])

    def order(self, seed: int) -> MixtureOrder:
        """The endless order in which training reads the rows.

        Raises:
            DataError: a weight so small that its set would never be read.
        """
        order = MixtureOrder([len(rows) for rows in self.sets], self.weights, seed)
        if 0 in order.quotas:
            k = order.quotas.index(0)
            raise DataError(
                f"train_weights[{k}] gives entry {k} of train_files no row in an epoch of {len(self)} rows:"
                " raise its weight or leave the entry out"
            )
        return order

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows at `indices`; see TokenRows.read."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(self.sets) == 1 or not wanted.size:
            return self.sets[0].read(wanted)
        which = np.searchsorted(self._ends, wanted, side="right")
        parts, places = [], []
        for k in np.unique(which):
            mine = np.flatnonzero(which == k)
            first_id = self._ends[k] - len(self.sets[k])
            parts.append(self.sets[k].read(wanted[mine] - first_id))
            places.append(mine)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
