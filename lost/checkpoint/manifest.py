"""The list of a checkpoint's files with their sizes and sha256 sums, written last: no manifest, no checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lost.checkpoint.io import read_json, write_json
from lost.utils.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "lost-checkpoint"
FORMAT_VERSION = 2
# Formats that cannot run code when they are read.
ALLOWED_SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class FileEntry:
    """What a file of the checkpoint must be."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Args:
        step: optimizer step at which the checkpoint was taken.
        files: file name -> size and sum.
        aliases: group of tensors -> {tied name: name under which it is stored}.
    """

    step: int
    files: dict[str, FileEntry]
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)


def file_entry(path: Path) -> FileEntry:
    return FileEntry(sha256_of(path), path.stat().st_size)


def write_manifest(
    folder: Path, step: int, aliases: dict[str, dict[str, str]], known: Mapping[str, FileEntry]
) -> Manifest:
    """Writes the manifest of every file in `folder`; the sums of `known` files were computed by who wrote them."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_NAME)
    files = {name: known.get(name) or file_entry(folder / name) for name in names}
    manifest = Manifest(step, files, aliases)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    write_json(folder / MANIFEST_NAME, {**content, "sha256_of_the_rest": _sum_of(content)})
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, itself checked.

    Raises:
        CheckpointError: missing, damaged, of another format version, or naming a file that is not plainly inside the
            folder or not of an allowed kind.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST_NAME}")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: expected format = {FORMAT}")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {content.get('format_version')}, this program reads {FORMAT_VERSION}:"
            " use the program version that wrote it"
        )
    expected = content.pop("sha256_of_the_rest", None)
    if expected != _sum_of(content):
        raise CheckpointError(f"{path} is damaged: its own sha256 should be {expected}, it is {_sum_of(content)}")
    try:
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(
            int(content["step"]), files, {name: dict(names) for name, names in content["aliases"].items()}
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    for name in manifest.files:
        _check_name(path, name)
    return manifest


def verify(folder: Path, group: str = "") -> Manifest:
    """Reads the manifest and compares every file with it, sizes first, then sums.

    Args:
        group: sums are computed of the files of this group of tensors and of state.json only; empty: of all.
    Raises:
        CheckpointError: names the first file that differs, what was expected and what was found.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing: the manifest lists it with {entry.size_bytes} bytes")
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise CheckpointError(f"{path} is damaged: expected {entry.size_bytes} bytes, found {size}")
    for path in folder.glob("*.safetensors"):
        # Its tensors would be read beside, or instead of, those of the listed files.
        if path.name not in manifest.files:
            raise CheckpointError(f"{path} is not listed in the manifest: it was not written with this checkpoint")
    for name, entry in manifest.files.items():
        if name.endswith(".safetensors") and not name.startswith(f"{group}_" if group else ""):
            continue
        found = sha256_of(folder / name)
        if found != entry.sha256:
            raise CheckpointError(f"{folder / name} is damaged: expected sha256 {entry.sha256}, found {found}")
    return manifest


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_name(path: Path, name: str) -> None:
    """A manifest may come from others: it names plain files beside it, of kinds that hold only data."""
    if PurePosixPath(name).name != name or "\\" in name or name.startswith("."):
        raise CheckpointError(f"{path} names the file {name!r}: only plain file names inside the folder are allowed")
    if not name.endswith(ALLOWED_SUFFIXES):
        raise CheckpointError(f"{path} names the file {name!r}: only {', '.join(ALLOWED_SUFFIXES)} files are read")
