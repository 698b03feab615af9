"""Documents to token rows on disk, and the order in which training reads them."""

from lost.data.loader import train_batches
from lost.data.prepare import Prepared, prepare
from lost.data.report import PrepareReport, Progress
from lost.data.rows import Batch, Mixture, TokenRows

__all__ = ["Batch", "Mixture", "PrepareReport", "Prepared", "Progress", "TokenRows", "prepare", "train_batches"]
