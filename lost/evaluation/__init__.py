"""Validation loss and perplexity of a model on token rows or sliding windows, and tasks of lm-eval."""

from lost.evaluation.errors import Estimate, loss_difference, mean_loss
from lost.evaluation.perplexity import PerplexityResult, RowSums, perplexity, row_sums, safe_exp, summarise
from lost.evaluation.windows import SlidingWindows

__all__ = [
    "Estimate",
    "PerplexityResult",
    "RowSums",
    "SlidingWindows",
    "loss_difference",
    "mean_loss",
    "perplexity",
    "row_sums",
    "safe_exp",
    "summarise",
]
