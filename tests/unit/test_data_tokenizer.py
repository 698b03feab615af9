"""Tokenizers: trained, from a folder, refused; and the fast way to the same ids."""

import pytest

from lost.data.tokenizer import Encoder, TrainedTokenizer, check_vocabulary, load_tokenizer, train_tokenizer
from lost.testing.tiny import tiny_tokenizer
from lost.utils.errors import DataError

TEXT = [
    "def main(argv):\n    return 'it''s'\n\n\n\t# don't\r\n",
    "the cat sat on the mat, the cat sat. " * 30,
    "Ünï 漢字 x²",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXT), 300, folder)
    return folder


def test_a_trained_tokenizer_has_eos_and_padding_and_gives_text_back(trained):
    tokenizer = load_tokenizer(str(trained))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert len(tokenizer) == 300
    for text in [*TEXT, "never seen: žluťoučký 🙂 \x00 \t  end "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        # It does not append EOS by itself: the row makers do.
        assert Encoder(tokenizer, "x").encode([text])[0].tolist() == tokenizer(text)["input_ids"]


def test_without_transformers_it_is_the_same_tokenizer(trained):
    """`lost prepare` opens it so; `lost pretrain`, with transformers, must find the rows that were made."""
    quick, usual = Encoder(TrainedTokenizer(trained), "x"), Encoder(load_tokenizer(str(trained)), "x")
    assert (quick.eos_id, quick.pad_id, quick.fingerprint) == (0, 1, usual.fingerprint)
    for ours, theirs in zip(quick.encode(TEXT), usual.encode(TEXT), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_training_is_deterministic(trained, tmp_path):
    train_tokenizer(iter(TEXT), 300, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    train_tokenizer(iter(TEXT[:2]), 300, tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() != (trained / "tokenizer.json").read_bytes()


def test_a_small_text_gives_a_small_vocabulary(tmp_path):
    train_tokenizer(iter(["ab ab"]), 4096, tmp_path)
    assert 258 <= len(load_tokenizer(str(tmp_path))) < 270


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model.vocab_size = 257: .* at least 258"):
        train_tokenizer(iter(TEXT), 257, tmp_path)


def test_the_fingerprint_survives_saving_and_ignores_what_others_set(trained, tmp_path):
    tokenizer = load_tokenizer(str(trained))
    before = Encoder(tokenizer, "x").fingerprint
    tokenizer(TEXT, truncation=True, max_length=5, padding="max_length")
    encoder = Encoder(tokenizer, "x")
    assert encoder.fingerprint == before
    assert len(encoder.encode([TEXT[1]])[0]) > 5
    tokenizer.save_pretrained(tmp_path)
    assert Encoder(load_tokenizer(str(tmp_path)), "x").fingerprint == before
    train_tokenizer(iter(TEXT), 290, tmp_path / "other")
    assert Encoder(load_tokenizer(str(tmp_path / "other")), "x").fingerprint != before


def test_text_that_spells_a_special_token_is_text(trained):
    encoder = Encoder(load_tokenizer(str(trained)), "x")
    (ids,) = encoder.encode(["a<|endoftext|>b<|pad|>"])
    assert not {encoder.eos_id, encoder.pad_id} & set(ids.tolist())


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="tokenizer tiny has no EOS"):
        Encoder(tokenizer, "tiny")


def test_without_padding_token_eos_pads():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert Encoder(tokenizer, "tiny").pad_id == tokenizer.eos_token_id


def test_the_ids_seen_count_not_the_length():
    check_vocabulary(31_999, 32_000, "t5-base")
    with pytest.raises(DataError, match=r"token id 32000, but model.vocab_size = 32000"):
        check_vocabulary(32_000, 32_000, "t5-base")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer can be loaded .* tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_hub_tokenizer_offline_says_what_to_use(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*nobody/nothing.*data.tokenizer=train.*; else X"):
        load_tokenizer("nobody/nothing", "; else X")
