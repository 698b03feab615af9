"""Validation loss and perplexity of a model on token rows."""

from lost.evaluation.perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]
