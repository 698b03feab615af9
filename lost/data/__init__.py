"""Documents to token rows on disk, and the order in which training reads them."""

from lost.data.loader import train_batches
from lost.data.prepare import Prepared, prepare, prepare_validation
from lost.data.progress import PreparationBar, report_lines
from lost.data.report import PrepareReport, Progress
from lost.data.rows import Batch, Mixture, TokenRows
from lost.data.stream import TokenStream

__all__ = [
    "Batch",
    "Mixture",
    "PreparationBar",
    "PrepareReport",
    "Prepared",
    "Progress",
    "TokenRows",
    "TokenStream",
    "prepare",
    "prepare_validation",
    "report_lines",
    "train_batches",
]
