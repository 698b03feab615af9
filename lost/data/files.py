"""Readers of local files: .txt, .jsonl, .jsonl.gz, .parquet and source code, in bounded pieces.

A document comes as one or more pieces, so that one of any length needs little memory. What cannot be read is a
DataError that names file and record; what can be mended (invalid UTF-8) is mended and counted.
"""

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lost.utils.errors import DataError

# Length of a piece in characters: long enough that the cuts do not matter, short enough that the tokenizer's work on
# one piece stays below 100 MB and a batch of pieces spreads over the cores.
PIECE_CHARACTERS = 1 << 18
_BLOCK_BYTES = 1 << 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Piece:
    """A part of a document.

    Args:
        key: the document's place in the hash order, uniform on [0, 2^64): decides split and samples.
        text: part of the text; the parts of a document follow one another.
        num_bytes: length of the text in UTF-8.
        num_invalid: invalid byte sequences that were replaced by U+FFFD.
        is_first, is_last: whether the document begins, ends with this piece.
        file: where it comes from.
        position: bytes of the file read so far, for progress.
    """

    key: int
    text: str
    num_bytes: int
    num_invalid: int
    is_first: bool
    is_last: bool
    file: str
    position: int


def hash_key(content: bytes) -> int:
    """A uniform number on [0, 2^64) from bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def reader_of(path: Path) -> Callable[[Path, str], Iterator[Piece]]:
    """The reader for a file's ending.

    Raises:
        DataError: an ending without a reader.
    """
    for ending, reader in _READERS.items():
        if path.name.lower().endswith(ending):
            return reader
    raise DataError(
        f"{path}: unknown kind of file; the ending must be one of {', '.join(_READERS)}."
        " Rename or convert the file, or leave it out"
    )


def decode(raw: bytes) -> tuple[str, int]:
    """UTF-8 as text, and how many invalid sequences were replaced by U+FFFD."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")


def read_text(path: Path, text_field: str = "", key: int | None = None) -> Iterator[Piece]:
    """One document a file. Its key, where none is given, is that of the first block's content."""
    del text_field
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest, num_invalid, is_first, position = "", 0, True, 0
    with _opened(path) as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            if key is None:
                key = hash_key(block)
            if not position:
                block = block.removeprefix(_BYTE_ORDER_MARK)
            position = file.tell()
            text, invalid = _decode_block(decoder, block)
            rest, num_invalid = rest + text, num_invalid + invalid
            while block and len(rest) > PIECE_CHARACTERS:
                cut = _cut(rest)
                yield _piece(key, rest[:cut], num_invalid, is_first, False, path, position)
                rest, num_invalid, is_first = rest[cut:], 0, False
            if not block:
                yield _piece(key, rest, num_invalid, is_first, True, path, position)
                return


def read_jsonl(path: Path, text_field: str) -> Iterator[Piece]:
    """One document a line: the text field of a JSON object. A blank line is an empty document."""
    with _opened(path) as file:
        yield from _json_records(path, file, text_field, file.tell)


def read_jsonl_gz(path: Path, text_field: str) -> Iterator[Piece]:
    """As read_jsonl, compressed with gzip."""
    num_records = 0
    with _opened(path) as file:
        lines = gzip.GzipFile(fileobj=file, mode="rb")
        try:
            for piece in _json_records(path, lines, text_field, file.tell):
                num_records += piece.is_last
                yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path}: the gzip data is cut off or damaged after record {num_records} ({error});"
                " copy or compress the file again"
            ) from error


def read_parquet(path: Path, text_field: str) -> Iterator[Piece]:
    """One document a record: the text column. A null is an empty document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, number = path.stat().st_size, 0
    try:
        # Buffered and one thread: a row group of many gigabytes is read page by page.
        file = pq.ParquetFile(path, buffer_size=_BLOCK_BYTES, pre_buffer=False)
        column = _text_column(path, file.schema_arrow, text_field)
        for batch in file.iter_batches(batch_size=256, columns=[text_field], use_threads=False):
            for value in batch.column(column).to_pylist():
                number += 1
                position = size * number // file.metadata.num_rows
                yield from document_pieces(value or "", 0, path, position)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: damaged parquet file, after record {number} ({error}); copy or write the file again"
        ) from error


def _text_column(path: Path, schema, text_field: str) -> int:
    """Place of the text column among the columns read (0: it is the only one), once it is known to hold text."""
    import pyarrow as pa

    if text_field not in schema.names:
        raise DataError(
            f"{path}: no column '{text_field}'; it has {', '.join(schema.names)}: set data.text_field to one of them"
        )
    kind = schema.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: column '{text_field}' holds {kind}, not text: set data.text_field to a text column")
    return 0


def _json_records(path: Path, lines, text_field: str, position: Callable[[], int]) -> Iterator[Piece]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        text, num_invalid = decode(line)
        yield from document_pieces(_text_of(text, path, number, text_field), num_invalid, path, position())


def _text_of(line: str, path: Path, number: int, text_field: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{number}: not JSON ({error.msg} at character {error.pos + 1}): mend or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: a line must be a JSON object with a field '{text_field}', not {line[:60]!r}")
    if text_field not in record:
        raise DataError(
            f"{path}:{number}: record {number} has no field '{text_field}'; it has {', '.join(record) or 'none'}:"
            " set data.text_field to one of them"
        )
    value = record[text_field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{path}:{number}: field '{text_field}' of record {number} is {type(value).__name__}, not text:"
            " set data.text_field to a field that holds text"
        )
    return value


def document_pieces(text: str, num_invalid: int, path: Path, position: int) -> Iterator[Piece]:
    """A document that is in memory, as pieces. Lone surrogates (JSON can hold them) count as invalid."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raw = text.encode("utf-8", errors="surrogatepass")
        text, invalid = decode(raw)
        num_invalid += invalid
    key = hash_key(raw)
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _cut(text, start)
        yield _piece(key, text[start:cut], num_invalid, start == 0, False, path, position)
        start, num_invalid = cut, 0
    yield _piece(key, text[start:], num_invalid, start == 0, True, path, position)


def _piece(key, text: str, num_invalid: int, is_first: bool, is_last: bool, path: Path, position: int) -> Piece:
    return Piece(key, text, len(text.encode()), num_invalid, is_first, is_last, str(path), position)


def _cut(text: str, start: int = 0) -> int:
    """Where the piece that begins at `start` ends: after the last line end in reach, else before the last space, else
    anywhere."""
    middle, end = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
    line_end = text.rfind("\n", middle, end)
    if line_end >= 0:
        return line_end + 1
    space = text.rfind(" ", middle, end)
    return space if space >= 0 else end


def _decode_block(decoder, block: bytes) -> tuple[str, int]:
    """The block's text, and how many invalid sequences were replaced."""
    held = decoder.getstate()[0]
    text = decoder.decode(block, final=not block)
    kept = decoder.getstate()[0]
    raw = held + block
    raw = raw[: len(raw) - len(kept)]
    return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")


def _opened(path: Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
    ".txt": read_text,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl_gz,
    ".parquet": read_parquet,
}
