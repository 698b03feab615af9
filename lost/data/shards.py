"""The files of a row set: shards of bounded size, a manifest with their sizes and sha256 sums, written last.

A row set is a folder with manifest.json and, for each shard k: tokens_k.bin [rows, seq_len], lengths_k.bin int32 [rows]
(tokens of a row that are not padding) and starts_k.bin int64 (places in the shard's flat tokens where documents begin).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from lost.utils.errors import DataError
from lost.utils.files import flush

MANIFEST_NAME = "manifest.json"


class ShardFile:
    """A file that is written once from its beginning, with the sum of what was written."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def write(self, values: np.ndarray) -> None:
        raw = values.tobytes()
        self._digest.update(raw)
        self._num_bytes += len(raw)
        self._file.write(raw)

    def finish(self) -> tuple[str, dict[str, int | str]]:
        """Brings the file to the disk; its name and its entry in the manifest."""
        self._file.close()
        flush(self._path)
        return self._path.name, {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Removes a file that is not finished."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_manifest(folder: Path, facts: dict[str, Any], shards: list[dict]) -> None:
    """manifest.json: the facts, the shards, and one sum over the sums of all files."""
    sums = [entry["sha256"] for shard in shards for entry in shard["files"].values()]
    manifest = facts | {"sha256": hashlib.sha256("".join(sums).encode()).hexdigest(), "shards": shards}
    write_durably(folder / MANIFEST_NAME, manifest)


def write_durably(path: Path, content: dict) -> None:
    """JSON that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a row set whose files are all there and as long as it says.

    Raises:
        DataError: they are not.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        files = files_of(manifest["shards"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(folder, folder / MANIFEST_NAME, f"it cannot be read ({error!r})") from error
    check_sizes(folder, files)
    return manifest


def files_of(shards: list[dict]) -> dict[str, dict]:
    """The entries of all files by name."""
    return {name: entry for shard in shards for name, entry in shard["files"].items()}


def check_sizes(folder: Path, files: dict[str, dict]) -> None:
    """Compares the sizes of files with their entries.

    Raises:
        DataError: names the first that differs.
    """
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise _damaged(folder, folder / name, f"it cannot be read ({error.strerror})") from error
        if size != entry["bytes"]:
            raise _damaged(folder, folder / name, f"expected {entry['bytes']} bytes, found {size}")


def verify(folder: Path) -> int:
    """Compares every file of a row set with its sum.

    Returns:
        Bytes compared.
    Raises:
        DataError: names the first file that differs, with both sums.
    """
    files = files_of(read_manifest(folder)["shards"])
    for name, entry in files.items():
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry["sha256"]:
            raise _damaged(folder, folder / name, f"expected sha256 {entry['sha256']}, found {found}")
    return sum(entry["bytes"] for entry in files.values())


def _damaged(folder: Path, path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: prepared rows are damaged: {what}. Remove {folder.parent}; the same command makes them again"
    )
