"""Token rows of examples on disk, memory-mapped, in the form that the training loop reads. n rows read, T tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lost.data.rows import NO_LOSS, Batch, isolated

FACTS_NAME = "facts.json"


class ArrayRows:
    """Arrays of one set, `<name>_<array>.npy` in a folder, opened when first read."""

    def __init__(self, folder: Path, name: str, seq_len: int, num_rows: int, num_tokens: int):
        self.folder, self.name = folder, name
        self.seq_len = seq_len
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self._arrays: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as its whole content; reader processes open their own.
        return self.__dict__ | {"_arrays": {}}

    def array(self, kind: str) -> np.ndarray:
        if kind not in self._arrays:
            self._arrays[kind] = np.load(self.folder / f"{self.name}_{kind}.npy", mmap_mode="r")
        return self._arrays[kind]

    def has(self, kind: str) -> bool:
        return (self.folder / f"{self.name}_{kind}.npy").is_file()


class LabelledRows(ArrayRows):
    """Texts with one label each: `tokens` flat, `ends` [N], `labels` [N], where the model has them `types` flat.

    Args:
        pad_id: fills rows up to the longest of a micro-batch.
    """

    def __init__(self, folder: Path, name: str, facts: dict[str, Any], pad_id: int):
        counts = facts["sets"][name]
        super().__init__(folder, name, facts["seq_len"], counts["rows"], counts["tokens"])
        self._pad_id = pad_id

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """input_ids int64 [n, T], attention_mask int64 [n, T], maybe token_type_ids [n, T], labels [n]; T is the
        longest of these rows."""
        wanted = np.asarray(indices, dtype=np.int64)
        ends = self.array("ends")
        starts = np.where(wanted > 0, ends[np.maximum(wanted - 1, 0)], 0)
        lengths = ends[wanted] - starts
        shape = (len(wanted), int(lengths.max(initial=1)))
        places = np.arange(shape[1])
        is_token = places < lengths[:, None]
        sources = (starts[:, None] + places)[is_token]
        batch = {"input_ids": self._filled(shape, is_token, "tokens", sources, self._pad_id)}
        batch["attention_mask"] = torch.from_numpy(is_token.astype(np.int64))
        if self.has("types"):
            batch["token_type_ids"] = self._filled(shape, is_token, "types", sources, 0)
        batch["labels"] = torch.from_numpy(np.array(self.array("labels")[wanted]))
        return batch

    def _filled(
        self, shape: tuple[int, int], is_token: np.ndarray, kind: str, sources: np.ndarray, fill: int
    ) -> torch.Tensor:
        values = np.full(shape, fill, dtype=np.int64)
        values[is_token] = self.array(kind)[sources]
        return torch.from_numpy(values)


class ConversationRows(ArrayRows):
    """Rows of conversations: `tokens`, `labels` [N, T], `starts` bool [N, T] (a conversation, or padding, begins)."""

    def __init__(self, folder: Path, name: str, facts: dict[str, Any]):
        counts = facts["sets"][name]
        super().__init__(folder, name, facts["seq_len"], counts["rows"], counts["tokens"])

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """input_ids and labels int64 [n, T] (-100: no loss), position_ids [n, T] and attention_mask bool [n, 1, T, T],
        by which no conversation sees another one."""
        wanted = np.asarray(indices, dtype=np.int64)
        read = {kind: np.array(self.array(kind)[wanted]) for kind in ("tokens", "labels", "starts")}
        is_first = torch.from_numpy(read["starts"])
        labels = torch.from_numpy(read["labels"].astype(np.int64)).masked_fill(is_first, NO_LOSS)
        return {"input_ids": torch.from_numpy(read["tokens"].astype(np.int64)), "labels": labels, **isolated(is_first)}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Written last: a folder without it is not whole."""
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))


def is_whole(folder: Path) -> bool:
    return (folder / FACTS_NAME).is_file()
