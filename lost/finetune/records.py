"""Records of local files: JSON lines (also gzip) and parquet, each with its place for messages."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lost.data.files import hash_key
from lost.data.sources import expand
from lost.utils.errors import DataError

Record = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def files_of(entries: list[str], key: str) -> list[Path]:
    """The files that paths and glob patterns name.

    Raises:
        DataError: nothing matches, or a file of a kind that holds no records.
    """
    paths = [path for entry in entries for path in expand(entry, key)]
    for path in paths:
        if not path.name.lower().endswith(ENDINGS):
            raise DataError(f"{key}: {path} holds no records: the ending must be one of {', '.join(ENDINGS)}")
    return paths


def hash_of_files(paths: list[Path]) -> str:
    """Hash of the contents, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_records(paths: list[Path], key: str) -> Iterator[tuple[str, Record]]:
    """(place, record) of every line or row; blank lines are left out.

    Raises:
        DataError: a line that is no JSON object, a damaged file, or no record at all.
    """
    is_empty = True
    for path in paths:
        reader = _parquet_records if path.name.lower().endswith(".parquet") else _json_records
        for place, record in reader(path):
            is_empty = False
            yield place, record
    if is_empty:
        raise DataError(f"{key} = {', '.join(map(str, paths))}: there is no record in it; one JSON object a line")


def field_of(record: Record, field: str, key: str, place: str) -> Any:
    """A field of a record.

    Raises:
        DataError: the record has no such field.
    """
    if field not in record:
        raise DataError(f"{place}: no field '{field}'; it has {', '.join(record) or 'none'}: set {key} to one of them")
    return record[field]


def text_of(record: Record, field: str, key: str, place: str) -> str:
    """A field that must hold text."""
    value = field_of(record, field, key, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: field '{field}' is {type(value).__name__}, not text: set {key} to a field of text")
    return value


def is_held_out(record: Record, fraction: float) -> bool:
    """Whether a record belongs to the validation set that is split off, by a hash of its content."""
    content = json.dumps(record, sort_keys=True, default=str).encode("utf-8", errors="surrogatepass")
    return hash_key(content) < fraction * 2**64


def _json_records(path: Path) -> Iterator[tuple[str, Record]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is cut off or damaged after line {number} ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _parsed(raw: bytes, place: str) -> Record:
    try:
        line = raw.decode("utf-8-sig")
        record = json.loads(line)
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{place}: not UTF-8 ({found}): save the file as UTF-8, or mend or remove the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg} at character {error.pos + 1}): mend or remove it") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: a line must be a JSON object, not {line.strip()[:60]!r}")
    return record


def _parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet file, after record {number} ({error})") from error
