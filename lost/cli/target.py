"""The file that `to=` names, looked at before the work whose result it takes."""

import os
from pathlib import Path

from lost.utils.errors import ConfigError


def target_file(to: str, kind: str) -> Path | None:
    """The file, whose folder can be made if it is not there; None where `to` is empty.

    Args:
        kind: what the file is, in words.
    Raises:
        ConfigError: a folder, or where nothing can be written.
    """
    if not to:
        return None
    target = Path(to).expanduser()
    if target.is_dir():
        raise ConfigError(f"to = {to} is a folder: give the name of a {kind}")
    nearest = next(parent for parent in target.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"to = {to}: {nearest} is no folder that may be written into: give another place")
    return target
