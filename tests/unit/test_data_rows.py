"""Row makers and row sets against plain definitions in lists."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch

from lost.data import files
from lost.data.files import document_pieces
from lost.data.row_makers import RowWriter, WriterState, batches
from lost.data.rows import Mixture, TokenRows
from lost.data.shards import verify
from lost.data.tokenizer import Encoder
from lost.testing.tiny import tiny_tokenizer
from lost.utils.errors import DataError

PAD, EOS = 0, 1
TEXTS = ["hello", "", "a", "long document " * 7, "  \n", "ünï", "b" * 15, "c" * 16, "tail"]


def ids_of(text):
    """The tiny tokenizer's ids: one a byte."""
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def write(folder, texts, row_maker, seq_len, vocab_size=258, ends_shards=False):
    """A row set; with ends_shards each piece is a batch, and after each a new writer goes on from the stored state."""
    folder.mkdir(parents=True)
    encoder = Encoder(tiny_tokenizer(), "tiny")
    writer = RowWriter(folder, row_maker, seq_len, encoder, vocab_size)
    pieces = [piece for text in texts for piece in document_pieces(text, 0, folder, 0)]
    for batch in [[piece] for piece in pieces] if ends_shards else batches(pieces):
        writer.add(batch, encoder.encode([piece.text for piece in batch]))
        if ends_shards:
            state = json.dumps(writer.end_shard().to_dict())
            writer.abandon()
            stored = WriterState.from_dict(json.loads(state))
            writer = RowWriter(folder, row_maker, seq_len, encoder, vocab_size, stored)
    writer.close()
    return writer.report


def packed(texts, seq_len):
    """Definition: (rows of ids, rows of document numbers), -1 for padding."""
    stream = []
    for number, text in enumerate(text for text in texts if text.strip()):
        stream += [(token, number) for token in [*ids_of(text), EOS]]
    stream += [(PAD, -1)] * (-len(stream) % seq_len)
    rows = [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
    return [[t for t, _ in row] for row in rows], [[d for _, d in row] for row in rows]


@pytest.mark.parametrize("piece_characters", [1 << 18, 10])
@pytest.mark.parametrize("seq_len", [2, 7, 16, 1000])
def test_packed_rows(tmp_path, monkeypatch, seq_len, piece_characters):
    monkeypatch.setattr(files, "PIECE_CHARACTERS", piece_characters)
    report = write(tmp_path / "set", TEXTS, "packed", seq_len)
    rows = TokenRows(tmp_path / "set")
    ids, documents = packed(TEXTS, seq_len)
    batch = rows.read(range(len(rows)))
    assert batch["input_ids"].tolist() == ids
    expected = [
        [t if d >= 0 else -100 for t, d in zip(r, ds, strict=True)] for r, ds in zip(ids, documents, strict=True)
    ]
    assert batch["labels"].tolist() == expected
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "labels"}
    assert (report.documents, report.empty_documents, report.rows) == (9, 2, len(ids))
    assert report.tokens == rows.num_tokens == sum(d >= 0 for ds in documents for d in ds)
    assert report.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.truncated_documents == report.truncated_tokens == 0


@pytest.mark.parametrize("piece_characters", [1 << 18, 10])
@pytest.mark.parametrize("seq_len", [2, 7, 16, 1000])
def test_padded_rows(tmp_path, monkeypatch, seq_len, piece_characters):
    """One document a row: its first seq_len - 1 tokens, EOS, padding."""
    monkeypatch.setattr(files, "PIECE_CHARACTERS", piece_characters)
    report = write(tmp_path / "set", TEXTS, "padded", seq_len)
    ids, labels, num_cut = [], [], []
    for text in TEXTS:
        if text.strip():
            tokens = [*ids_of(text)[: seq_len - 1], EOS]
            num_cut.append(len(ids_of(text)) + 1 - len(tokens))
            ids.append(tokens + [PAD] * (seq_len - len(tokens)))
            labels.append(tokens + [-100] * (seq_len - len(tokens)))
    batch = TokenRows(tmp_path / "set").read(range(len(ids)))
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == labels
    assert report.truncated_tokens == sum(num_cut)
    assert report.truncated_documents == sum(n > 0 for n in num_cut)
    assert (report.documents, report.empty_documents, report.rows) == (9, 2, 7)
    assert report.tokens == sum(label != -100 for row in labels for label in row)


@pytest.mark.parametrize("seq_len", [7, 16, 100])
def test_isolated_documents(tmp_path, seq_len):
    write(tmp_path / "set", TEXTS, "packed", seq_len)
    rows = TokenRows(tmp_path / "set", isolate_documents=True)
    ids, documents = packed(TEXTS, seq_len)
    batch = rows.read(range(len(rows)))
    assert batch["input_ids"].tolist() == ids
    before = None
    for n, row in enumerate(documents):
        for i, document in enumerate(row):
            is_new = document != (row[i - 1] if i else before)
            # Padding and a document's first token have no loss; a document that goes on in this row has none anew.
            assert batch["labels"][n, i] == (-100 if is_new or document == -1 else ids[n][i])
            start = row.index(document)
            assert batch["position_ids"][n, i] == i - start
            seen = [j for j in range(seq_len) if j <= i and row[j] == document]
            assert batch["attention_mask"][n, 0, i].nonzero().flatten().tolist() == seen
        before = row[-1]
    assert batch["attention_mask"].shape == (len(rows), 1, seq_len, seq_len)
    assert batch["attention_mask"].dtype == torch.bool


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer tiny gives token id \d+, but model.vocab_size = 100"):
        write(tmp_path / "set", ["ünï"], "packed", 8, vocab_size=100)
    # The tokenizer may be larger than the vocabulary, as long as the ids seen are not.
    largest = max(ids_of("AB"))
    assert largest < 200
    write(tmp_path / "small", ["AB"], "packed", 8, vocab_size=largest + 1)
    with pytest.raises(DataError, match=f"set model.vocab_size to {largest + 1} or more"):
        write(tmp_path / "smaller", ["AB"], "packed", 8, vocab_size=largest)


@pytest.mark.parametrize("row_maker", ["packed", "padded"])
@pytest.mark.parametrize("seq_len", [2, 7, 16, 1000])
def test_shards_change_neither_rows_nor_counts(tmp_path, monkeypatch, row_maker, seq_len):
    """Cut wherever a piece ends: inside rows, inside documents, in empty ones."""
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 10)
    one = write(tmp_path / "one", TEXTS, row_maker, seq_len)
    many = write(tmp_path / "many", TEXTS, row_maker, seq_len, ends_shards=True)
    assert many == one
    whole, cut = (TokenRows(tmp_path / name, isolate_documents=row_maker == "packed") for name in ("one", "many"))
    num_shards = len(cut.meta["shards"])
    assert num_shards == min(len(cut), num_shards)
    assert num_shards > (2 if seq_len < 1000 else 0)
    wanted = [*range(len(cut)), *reversed(range(len(cut)))]
    batch, expected = cut.read(wanted), whole.read(wanted)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert {path.name for path in (tmp_path / "many").iterdir()} == {
        "manifest.json",
        *(f"{kind}_{k:05d}.bin" for kind in ("tokens", "lengths", "starts") for k in range(num_shards)),
    }


def test_damage_is_named(tmp_path):
    folder = tmp_path / "key" / "set"
    write(folder, TEXTS, "packed", 8)
    assert verify(folder) == sum(path.stat().st_size for path in folder.glob("*.bin"))
    tokens = folder / "tokens_00000.bin"
    right = tokens.read_bytes()
    wrong = bytes([right[0] ^ 1]) + right[1:]
    tokens.write_bytes(wrong)
    # Sizes alone do not tell.
    assert len(TokenRows(folder)) > 0
    sums = [hashlib.sha256(content).hexdigest() for content in (right, wrong)]
    with pytest.raises(DataError, match=rf"tokens_00000.bin: .* sha256 {sums[0]}, found {sums[1]}. Remove .*key;"):
        verify(folder)
    tokens.write_bytes(right[:-1])
    with pytest.raises(DataError, match=rf"tokens_00000.bin: .* expected {len(right)} bytes, found {len(right) - 1}"):
        TokenRows(folder)
    tokens.unlink()
    with pytest.raises(DataError, match=r"tokens_00000.bin: .* cannot be read \(No such file"):
        TokenRows(folder)
    for text in ("{", "[]", '{"shards": [1]}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest.json: prepared rows are damaged"):
            TokenRows(folder)


def test_rows_beyond_int32_and_offsets_beyond_4_gib(tmp_path):
    """Two shards of 2^31 + 3 rows each, as sparse files; a few rows are marked and all others are zero."""
    num_rows, seq_len = 2**31 + 3, 2
    marks = {0: (7, 8), 1234: (9, 10), 2**30 + 1: (3, 4), num_rows - 1: (5, 6)}
    shards = []
    for shard in range(2):
        with open(tmp_path / f"tokens_{shard:05d}.bin", "wb") as file:
            file.truncate(num_rows * seq_len * 2)
            for row, (one, two) in marks.items():
                file.seek(row * seq_len * 2)
                file.write(np.array([one, two + shard], dtype=np.uint16).tobytes())
            assert file.tell() > 2**32
        with open(tmp_path / f"lengths_{shard:05d}.bin", "wb") as file:
            file.truncate(num_rows * 4)
            for row in marks:
                file.seek(row * 4)
                file.write(np.array([seq_len], dtype=np.int32).tobytes())
        starts = np.array([row * seq_len + 1 for row in marks], dtype=np.int64)
        starts.tofile(tmp_path / f"starts_{shard:05d}.bin")
        names = [f"{kind}_{shard:05d}.bin" for kind in ("tokens", "lengths", "starts")]
        files = {name: {"bytes": (tmp_path / name).stat().st_size, "sha256": ""} for name in names}
        shards.append({"rows": num_rows, "files": files})
    facts = {"seq_len": seq_len, "tokens": 0, "dtype": "uint16", "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    rows = TokenRows(tmp_path, isolate_documents=True)
    mixture = Mixture([rows, rows])
    assert (len(rows), len(mixture)) == (2 * num_rows, 4 * num_rows)
    for part in range(4):
        batch = mixture.read([part * num_rows + row for row in marks])
        assert batch["input_ids"].tolist() == [[one, two + part % 2] for one, two in marks.values()]
        # The second token begins a document: no loss there, and positions start over.
        assert (batch["labels"] == -100).tolist() == [[False, True]] * len(marks)
        assert batch["position_ids"].tolist() == [[0, 0]] * len(marks)
    assert mixture.read([1])["labels"].tolist() == [[-100, -100]]


def test_reading_a_row_that_is_not_there(tmp_path):
    write(tmp_path / "set", TEXTS, "padded", 8)
    rows = TokenRows(tmp_path / "set")
    for wrong in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"of a set of {len(rows)}"):
            rows.read([wrong])
    assert rows.read([])["input_ids"].shape == (0, 8)


def test_pickled_rows_are_small_and_read_the_same(tmp_path):
    write(tmp_path / "set", ["text " * 20000], "packed", 64)
    rows = TokenRows(tmp_path / "set")
    batch = rows.read([3, 1, 3])
    raw = pickle.dumps(rows)
    assert len(raw) < 5000
    assert torch.equal(pickle.loads(raw).read([3, 1, 3])["input_ids"], batch["input_ids"])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][2])
    assert torch.equal(batch["input_ids"][1], rows.read([1])["input_ids"][0])


def test_a_mixture_reads_rows_of_all_sets_in_the_order_asked(tmp_path):
    for name, texts in (("a", ["aa", "ab", "ac"]), ("b", ["ba"]), ("c", ["ca", "cb"])):
        write(tmp_path / name, texts, "padded", 4)
    mixture = Mixture([TokenRows(tmp_path / name) for name in "abc"])
    assert len(mixture) == 6
    wanted = [5, 0, 3, 2, 4, 0, 1]
    texts = ["cb", "aa", "ba", "ac", "ca", "aa", "ab"]
    assert mixture.read(wanted)["input_ids"].tolist() == [[*ids_of(text), EOS, PAD] for text in texts]
    assert mixture.read(np.array([], dtype=np.int64))["input_ids"].shape == (0, 4)


def test_a_weight_too_small_for_one_row_is_refused(tmp_path):
    for name in "ab":
        write(tmp_path / name, ["x", "y"], "padded", 4)
    sets = [TokenRows(tmp_path / name) for name in "ab"]
    with pytest.raises(DataError, match=r"train_weights\[1\] gives entry 1"):
        Mixture(sets, [1.0, 0.01]).order(0)
    assert Mixture(sets, [1.0, 1.0]).order(0).quotas == [2, 2]


def test_tokens_above_65535_keep_their_value(tmp_path):
    """The file's integers are as wide as the tokenizer's largest id needs."""

    class Wide(Encoder):
        def __init__(self):
            super().__init__(tiny_tokenizer(), "wide")
            self.max_id = 70_000

        def encode(self, texts):
            return [np.array([70_000 - i for i in range(len(text))], dtype=self.dtype) for text in texts]

    folder = tmp_path / "set"
    folder.mkdir()
    writer = RowWriter(folder, "packed", 4, Wide(), 70_001)
    writer.add(list(document_pieces("abc", 0, folder, 0)), Wide().encode(["abc"]))
    writer.close()
    assert TokenRows(folder).read([0])["input_ids"].tolist() == [[70_000, 69_999, 69_998, EOS]]
