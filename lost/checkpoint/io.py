"""Text files that either exist whole or not at all: flushed to the disk and renamed into place."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from lost.utils.errors import CheckpointError
from lost.utils.files import flush

# The manifest of ten thousand files takes 2 MB.
MAX_JSON_BYTES = 2**26


def write_text(path: Path, text: str) -> None:
    """Writes a text file and flushes it to the disk."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. {space_left(path)}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON and flushes it to the disk; floats are exact, keys become text."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or is far larger than any that we write.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is too large: {path.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a kill at any moment, sees the old contents or the new ones."""
    # Host and process in the name: two writers never share a temporary file.
    temporary = path.with_name(f".tmp_{path.name}_{socket.gethostname()}_{os.getpid()}")
    try:
        write_text(temporary, text)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: Path, value: Any) -> None:
    """Replaces a JSON file like `write_text_atomically`."""
    write_text_atomically(path, json.dumps(value, indent=1) + "\n")


def replace(source: Path, target: Path) -> None:
    """Renames over `target` and flushes the folder, so that the new name survives a power cut."""
    try:
        os.replace(source, target)
        flush(target.parent)
    except OSError as error:
        raise CheckpointError(f"{source} could not be renamed to {target.name}: {error}") from error


def space_left(path: Path) -> str:
    try:
        gib = shutil.disk_usage(path.parent).free / 2**30
    except OSError:
        return "Check that the folder exists and is writable"
    return f"Free space there: {gib:.2f} GiB; make room, or choose another run_dir"
