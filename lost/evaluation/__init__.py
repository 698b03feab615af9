"""Validation loss and perplexity of a model on token rows."""

from lost.evaluation.perplexity import PerplexityResult, perplexity, safe_exp

__all__ = ["PerplexityResult", "perplexity", "safe_exp"]
