"""Row makers and row sets against plain definitions in lists."""

import pickle

import numpy as np
import pytest
import torch

from lost.data import files
from lost.data.files import document_pieces
from lost.data.row_makers import RowWriter, batches, is_row_set
from lost.data.rows import Mixture, TokenRows
from lost.data.tokenizer import Encoder
from lost.testing.tiny import tiny_tokenizer
from lost.utils.errors import DataError

PAD, EOS = 0, 1
TEXTS = ["hello", "", "a", "long document " * 7, "  \n", "ünï", "b" * 15, "c" * 16, "tail"]


def ids_of(text):
    """The tiny tokenizer's ids: one a byte."""
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def write(folder, texts, row_maker, seq_len, vocab_size=258):
    folder.mkdir(parents=True)
    encoder = Encoder(tiny_tokenizer(), "tiny")
    writer = RowWriter(folder, row_maker, seq_len, encoder, vocab_size)
    pieces = (piece for text in texts for piece in document_pieces(text, 0, folder, 0))
    for batch in batches(pieces):
        writer.add(batch)
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
    with pytest.raises(DataError, match=f"Set model.vocab_size to {largest + 1} or more"):
        write(tmp_path / "smaller", ["AB"], "packed", 8, vocab_size=largest)


def test_a_damaged_row_set_is_seen(tmp_path):
    write(tmp_path / "set", TEXTS, "packed", 8)
    assert is_row_set(tmp_path / "set")
    with open(tmp_path / "set" / "tokens.bin", "ab") as file:
        file.write(b"x")
    assert not is_row_set(tmp_path / "set")
    assert not is_row_set(tmp_path / "nothing")


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
            return [[70_000 - i for i in range(len(text))] for text in texts]

    folder = tmp_path / "set"
    folder.mkdir()
    writer = RowWriter(folder, "packed", 4, Wide(), 70_001)
    writer.add(list(document_pieces("abc", 0, folder, 0)))
    writer.close()
    assert TokenRows(folder).read([0])["input_ids"].tolist() == [[70_000, 69_999, 69_998, EOS]]
