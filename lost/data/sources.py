"""What the data settings name: corpora of documents, each with the hash of its content."""

import glob
import hashlib
import logging
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lost.config.data import C4DataConfig, DataConfig, StdlibDataConfig, TextFilesDataConfig
from lost.data.files import Piece, hash_key, read_text, reader_of
from lost.utils.errors import DataError

logger = logging.getLogger(__name__)

# encodings: generated tables of character codecs, an eighth of all bytes and easy to predict.
_NOT_TEXT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}

# Bytes of text in a byte of a compressed file, roughly.
_EXPANSION = {".gz": 3, ".parquet": 2}


class Corpus(ABC):
    """Documents that become one row set (or two, where a part is held out). `name` is what reports call it."""

    name: str

    @cached_property
    def content_hash(self) -> str:
        """Hash of all that decides the documents."""
        return self._hash()

    @abstractmethod
    def _hash(self) -> str: ...

    @abstractmethod
    def size(self) -> int:
        """Bytes to read, 0 where it is not known."""

    @abstractmethod
    def text_size(self) -> int:
        """Bytes of text, roughly, 0 where it is not known."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All documents from the beginning, in an order that is always the same; position counts up to size()."""


@dataclass(frozen=True)
class Sources:
    """Corpora to train on with their weights, and to validate on; no validation corpus: hold out from training.

    Args:
        train: corpora to train on; may be empty where only validation is wanted.
        weights: share of each training corpus in an epoch; None: by size.
        validation: corpora by set name.
        hub_advice: what to use instead where the documents come from a hub that is out of reach.
    """

    train: list[Corpus]
    weights: list[float] | None = None
    validation: dict[str, Corpus] = field(default_factory=dict)
    hub_advice: str = ""


class FileCorpus(Corpus):
    """Files, one after the other.

    Args:
        name: what messages and reports call it.
        files: paths, each with its label; label and bytes make the content hash.
        text_field: field of the records.
        is_keyed_by_label: a document's place in the hash order comes from its file's label instead of its content,
            and every file is one document whatever its ending.
    """

    def __init__(self, name: str, files: list[tuple[Path, str]], text_field: str, is_keyed_by_label: bool = False):
        self.name = name
        self.files = files
        self._text_field = text_field
        self._is_keyed_by_label = is_keyed_by_label
        if not is_keyed_by_label:
            for path, _ in files:
                reader_of(path)

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{self._text_field} {self._is_keyed_by_label}".encode())
        for path, label in self.files:
            digest.update(f"\0{label}\0{_hash_of_file(path)}".encode())
        return digest.hexdigest()

    def size(self) -> int:
        return sum(self._sizes)

    def text_size(self) -> int:
        expansions = [_EXPANSION.get(path.suffix.lower(), 1) for path, _ in self.files]
        return sum(size * expansion for size, expansion in zip(self._sizes, expansions, strict=True))

    @cached_property
    def _sizes(self) -> list[int]:
        return [path.stat().st_size for path, _ in self.files]

    def pieces(self) -> Iterator[Piece]:
        before = 0
        for (path, label), size in zip(self.files, self._sizes, strict=True):
            if self._is_keyed_by_label:
                pieces = read_text(path, key=hash_key(label.encode()))
            else:
                pieces = reader_of(path)(path, self._text_field)
            for piece in pieces:
                piece.position += before
                yield piece
            before += size


def open_sources(data: DataConfig) -> Sources:
    """The corpora that the settings name.

    Raises:
        DataError: a file that is missing or of an unknown kind, a hub that cannot be reached.
    """
    if isinstance(data, StdlibDataConfig):
        return Sources([stdlib_corpus()])
    if isinstance(data, TextFilesDataConfig):
        return _text_files(data)
    if isinstance(data, C4DataConfig):
        from lost.data.hub import open_c4

        return open_c4(data)
    raise AssertionError(f"no source for {type(data).__name__}")


def stdlib_corpus() -> FileCorpus:
    """The .py files of the running interpreter's standard library, without tests and codec tables, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_TEXT_FOLDERS)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = sorted((path.relative_to(root).as_posix(), path) for path in found if path.is_file())
    if not files:
        raise DataError(
            f"data=stdlib: no .py files in {root}, this Python comes without its library's source:"
            " use data=text_files data.train_files=[...]"
        )
    return FileCorpus("stdlib", [(path, label) for label, path in files], "", is_keyed_by_label=True)


def _text_files(data: TextFilesDataConfig) -> Sources:
    train_paths = [expand(entry, "data.train_files") for entry in data.train_files]
    train: list[Corpus] = []
    if data.train_weights:
        names = _unique_names([Path(entry).stem for entry in data.train_files])
        train += [_corpus(name, paths, data) for name, paths in zip(names, train_paths, strict=True)]
    elif train_paths:
        train += [_corpus("train", [path for paths in train_paths for path in paths], data)]
    sets = data.validation_files
    if isinstance(sets, list):
        sets = {"validation": sets} if sets else {}
    validation = {}
    for name, entries in sets.items():
        key = "data.validation_files" + (f".{name}" if isinstance(data.validation_files, dict) else "")
        if not entries:
            raise DataError(f"{key} is empty: name at least one file, or leave the set out")
        paths = [path for entry in entries for path in expand(entry, key)]
        for path in {path.resolve() for path in paths} & {p.resolve() for ps in train_paths for p in ps}:
            logger.warning("%s is in both data.train_files and %s: its validation loss says little", path, key)
        validation[name] = _corpus(name, paths, data)
    return Sources(train, list(data.train_weights) or None, validation)


def _corpus(name: str, paths: list[Path], data: TextFilesDataConfig) -> FileCorpus:
    return FileCorpus(name, [(path, path.name) for path in paths], data.text_field)


def expand(entry: str, key: str) -> list[Path]:
    """The files of a path or glob pattern, sorted."""
    path = Path(entry).expanduser()
    if path.is_dir():
        raise DataError(f"{key}: {entry} is a folder: name its files, for instance {path / '*.jsonl'}")
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        is_pattern = glob.has_magic(str(path))
        what = "no file matches" if is_pattern else "no such file:"
        raise DataError(f"{key}: {what} {entry} (looked from {Path.cwd()}): check the path")
    return found


def _unique_names(names: list[str]) -> list[str]:
    """Names as they are where they differ, else with their place."""
    plain = [name.replace("*", "_") for name in names]
    return [name if plain.count(name) == 1 else f"{name}_{k}" for k, name in enumerate(plain)]


def _hash_of_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error
