"""Sliding windows over packed rows: every token is predicted once, with at least window - stride tokens before it.

Shape letters: n windows of a forward, T tokens of a window.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from lost.evaluation.perplexity import Rows
from lost.utils.labels import IGNORED_LABEL


class PackedRows(Rows, Protocol):
    """Rows whose tokens follow each other as one text; only the last row is padded."""

    seq_len: int
    num_tokens: int


class SlidingWindows:
    """The tokens of packed rows as overlapping windows of the rows' length.

    Window i holds the tokens from i * stride on. Labels are -100 where an earlier window had the token, and in the
    padding of the last window; so all tokens but the very first are predicted exactly once.

    Args:
        rows: packed rows without isolated documents.
        stride: tokens from one window to the next, from 1 to seq_len - 1.
    """

    def __init__(self, rows: PackedRows, stride: int):
        assert 0 < stride < rows.seq_len, (stride, rows.seq_len)
        self.rows, self.stride, self.window = rows, stride, rows.seq_len

    def __len__(self) -> int:
        return 1 + max(0, math.ceil((self.rows.num_tokens - self.window) / self.stride))

    @property
    def per_block(self) -> int:
        """Windows that predict as many tokens together as a row holds."""
        return math.ceil(self.window / self.stride)

    def read(self, indices: list[int]) -> dict[str, Tensor]:
        """input_ids and labels of windows, int64 [n, T]."""
        starts = torch.tensor(indices) * self.stride
        places = starts[:, None] + torch.arange(self.window)
        is_text = places < self.rows.num_tokens
        places = places.clamp_max(self.rows.num_tokens - 1)
        numbers, which = torch.unique(places // self.window, return_inverse=True)
        row_ids = self.rows.read(numbers.tolist())["input_ids"]
        input_ids = row_ids[which, places % self.window]
        # What the window before reached; the first window has none before it.
        reached = torch.where(starts > 0, starts - self.stride + self.window, 0)
        is_new = (starts[:, None] + torch.arange(self.window)) >= reached[:, None]
        return {"input_ids": input_ids, "labels": torch.where(is_text & is_new, input_ids, IGNORED_LABEL)}
