"""Files that survive a loss of power, folders that are whole or not there, and where prepared data lies."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lost.utils.errors import LostError


def flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_readable(folder: Path) -> None:
    """Gives every file the mode that the process gives to new ones: safetensors writes its own for the owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def appearing(folder: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name once everything is on disk.

    On failure it is removed, and so are the parents that were made for it.

    Args:
        replaces: whether an older folder of that name makes way; without it, only an empty one does.
    Raises:
        LostError: it could not be written; an older folder is then still there.
    """
    folder = folder.absolute()
    partial, replaced = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "replaced"))
    # Left behind by a process that was killed while saving.
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        make_readable(partial)
        for path in (*partial.rglob("*"), partial):
            flush(path)
        if folder.is_dir() and not replaces:
            folder.rmdir()
        elif folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise LostError(f"{folder} could not be written: {error}. Check the free space and the permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            # One that holds something by now stays.
            with suppress(OSError):
                parent.rmdir()
    shutil.rmtree(replaced, ignore_errors=True)


def cache_folder(setting: str) -> Path:
    """The folder of prepared data: data.cache_dir, else $LOST_CACHE, else $XDG_CACHE_HOME/lost, else ~/.cache/lost."""
    chosen = setting or os.environ.get("LOST_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lost"
