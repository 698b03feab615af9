"""Files that survive a loss of power, and where prepared data lies."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(setting: str) -> Path:
    """The folder of prepared data: data.cache_dir, else $LOST_CACHE, else $XDG_CACHE_HOME/lost, else ~/.cache/lost."""
    chosen = setting or os.environ.get("LOST_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lost"
