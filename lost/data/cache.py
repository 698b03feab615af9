"""Folders made once, named by a hash of what went into them: safe with several processes and after a kill."""

import errno
import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lost.utils.errors import DataError, InterruptedDataError, LostError
from lost.utils.files import flush

logger = logging.getLogger(__name__)

# No space, over quota, read-only, too large a file.
_DISK_PROBLEMS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def key_of(**facts: object) -> str:
    """A short name that is the same for the same facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def made_once(
    folder: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], None], *, is_resumable: bool = False
) -> bool:
    """Makes `folder` if it is not there whole: in a temporary folder beside it, renamed when done.

    One process makes it; others that ask meanwhile wait for it. What a killed process left behind is removed, or, where
    `is_resumable`, given to `make` again. A mistake in the input (LostError) leaves nothing.

    Returns:
        Whether it was made now.
    Raises:
        DataError: the cache cannot be written.
    """
    if folder.is_dir() and is_whole(folder):
        return False
    with _locked(folder):
        if folder.is_dir():
            if is_whole(folder):
                return False
            logger.warning("%s is damaged: making it again", folder)
            shutil.rmtree(folder)
        making = folder.parent / f".making-{folder.name}"
        if not is_resumable:
            shutil.rmtree(making, ignore_errors=True)
        making.mkdir(exist_ok=True)
        try:
            make(making)
            for path in making.rglob("*"):
                flush(path)
            making.rename(folder)
            flush(folder.parent)
        except LostError as error:
            if not isinstance(error, InterruptedDataError):
                shutil.rmtree(making)
            raise
        except OSError as error:
            if error.errno not in _DISK_PROBLEMS:
                raise
            raise DataError(
                f"cannot write prepared data to {folder.parent} ({error.strerror or error}):"
                " free some space or set data.cache_dir to another folder"
            ) from error
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`; the system gives it back when a process dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.parent / f"{folder.name}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise DataError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}):"
            " set data.cache_dir or LOST_CACHE to a folder of yours"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is making %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
