"""Readers: every kind of file, and everything that can be wrong with one."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lost.data import files
from lost.data.files import decode, read_text, reader_of
from lost.utils.errors import DataError


def read(path, text_field="text"):
    """(text, invalid sequences) of every document, pieces joined."""
    documents, is_open = [], False
    for piece in reader_of(path)(path, text_field):
        assert piece.is_first != is_open, "a document must begin where the last one ended"
        assert piece.num_bytes == len(piece.text.encode())
        if piece.is_first:
            documents.append(["", 0])
        documents[-1][0] += piece.text
        documents[-1][1] += piece.num_invalid
        is_open = not piece.is_last
    assert not is_open
    return [tuple(document) for document in documents]


TEXTS = ["plain", "", "two\nlines\n", "ünï → 漢字 🙂", "x" * 1000, " \t "]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_records_come_back_in_order(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path)
    else:
        opener = gzip.open if ending.endswith("gz") else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    assert read(path) == [(text, 0) for text in TEXTS]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\r\n\r\ntwo ü", newline="")
    assert read(path) == [("one\r\n\r\ntwo ü", 0)]


@pytest.mark.parametrize("filling", ["line of text\n", "word ", "x", "漢"])
def test_long_documents_come_in_pieces(tmp_path, monkeypatch, filling):
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 37)
    text = filling * 200 + "end"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}))
    assert read(tmp_path / "a.txt") == [(text, 0)]
    assert read(tmp_path / "a.jsonl") == [(text, 0), ("short", 0)]
    for name in ("a.txt", "a.jsonl"):
        pieces = list(reader_of(tmp_path / name)(tmp_path / name, "text"))
        # A block may lie behind the cut.
        assert max(len(piece.text) for piece in pieces) <= 137
        assert len({piece.key for piece in pieces if piece.text != "short"}) == 1
        if filling.endswith("\n"):
            assert all(piece.text.endswith("\n") or piece.is_last for piece in pieces)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_invalid_utf8_is_replaced_and_counted(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "_BLOCK_BYTES", block)
    raw = "ä\ufffdb".encode() + b"\xff\xfe c \xe2\x82" + "d€".encode() + b"\xc3"
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    expected = raw.decode("utf-8", errors="replace")
    # The one genuine U+FFFD does not count.
    assert read(path) == [(expected, expected.count("\ufffd") - 1)]
    assert decode(raw) == (expected, expected.count("\ufffd") - 1)
    assert expected.count("\ufffd") == 5


def test_invalid_utf8_in_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xffb"}\n{"text": "\\ud800 lone"}\n{"text": "fine"}\n')
    (first, one), (second, two), third = read(path)
    assert (first, one) == ("a\ufffdb", 1)
    assert two >= 1
    assert second.endswith(" lone")
    second.encode()
    assert third == ("fine", 0)


def test_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", b"hello"), ("a.jsonl", b'{"text": "hello"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert read(tmp_path / name) == [("hello", 0)]


def test_blank_lines_and_nulls_are_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": null}\n')
    assert [text for text, _ in read(tmp_path / "a.jsonl")] == ["a", "", ""]
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert [text for text, _ in read(tmp_path / "a.parquet")] == ["a", "", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', ["a.jsonl:2", "not JSON", "mend"]),
        ("[1, 2]", ["a.jsonl:2", "JSON object"]),
        ('{"body": "a", "title": "b"}', ["a.jsonl:2", "record 2", "no field 'text'", "body, title", "data.text_field"]),
        ('{"text": 3}', ["a.jsonl:2", "int", "data.text_field"]),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read(tmp_path / "a.jsonl")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_damaged_gzip_is_named(tmp_path, damage):
    lines = "".join(json.dumps({"text": f"{i} {i * i} words"}) + "\n" for i in range(3000))
    raw = gzip.compress(lines.encode())
    if damage == "cut":
        raw = raw[:-20]
    elif damage == "flipped":
        raw = raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 255]) + raw[len(raw) // 2 + 1 :]
    else:
        raw = lines.encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        read(path)


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["abc"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.parquet: damaged"):
        read(path)


def test_parquet_columns_are_checked(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), path)
    with pytest.raises(DataError, match="int64, not text"):
        read(path)
    with pytest.raises(DataError, match="no column 'words'; it has text, body"):
        read(path, "words")
    assert [text for text, _ in read(path, "body")] == ["a", "b"]


def test_parquet_reads_the_named_column_only_of_several(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["1"], "text": ["2"], "z": ["3"]}), path)
    assert read(path) == [("2", 0)]


def test_unknown_and_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv: unknown kind.*\.txt, \.jsonl"):
        reader_of(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(No such file"):
        list(read_text(tmp_path / "a.txt"))
