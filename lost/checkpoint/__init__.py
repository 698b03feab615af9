"""Checkpoints and the run directory: saved whole or not at all, verified when read, nothing unpickled."""

from lost.checkpoint.fingerprint import check_same, differences, fixed_keys
from lost.checkpoint.manager import CheckpointManager
from lost.checkpoint.run_dir import (
    RunLock,
    read_status,
    truncate_metrics,
    write_json_atomically,
    write_status,
    write_text_atomically,
)

__all__ = [
    "CheckpointManager",
    "RunLock",
    "check_same",
    "differences",
    "fixed_keys",
    "read_status",
    "truncate_metrics",
    "write_json_atomically",
    "write_status",
    "write_text_atomically",
]
