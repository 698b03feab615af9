"""Documents to token rows on disk, and the order in which training reads them.

Names load when they are first touched: what `lost prepare` imports from this package needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lost.data.loader import train_batches
    from lost.data.prepared import Prepared, prepare, prepare_validation
    from lost.data.progress import PreparationBar, report_lines
    from lost.data.report import PrepareReport, Progress
    from lost.data.rows import Batch, Mixture, TokenRows
    from lost.data.stream import TokenStream

_HOMES = {
    "Batch": "rows",
    "Mixture": "rows",
    "PreparationBar": "progress",
    "PrepareReport": "report",
    "Prepared": "prepared",
    "Progress": "report",
    "TokenRows": "rows",
    "TokenStream": "stream",
    "prepare": "prepared",
    "prepare_validation": "prepared",
    "report_lines": "progress",
    "train_batches": "loader",
}
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


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'lost.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lost.data.{_HOMES[name]}"), name)
