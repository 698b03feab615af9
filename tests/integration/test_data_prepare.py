"""Preparing real files: cache, several processes, kills, sizes, and the mistakes that only reading shows."""

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

from lost.config.schema import C4DataConfig, StdlibDataConfig, TextFilesDataConfig
from lost.data import files, prepare, prepare_validation
from lost.testing.tiny import tiny_tokenizer
from lost.utils.errors import DataError

# The package's name `prepare` is the function.
prepare_module = sys.modules["lost.data.prepare"]
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOST_CACHE", str(tmp_path / "cache"))


def documents(count, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def rows_of(token_rows):
    return token_rows.read(range(len(token_rows)))["input_ids"]


def texts_of(token_rows, tokenizer):
    """The documents of packed rows, from the flat stream."""
    text = tokenizer.decode(rows_of(token_rows).flatten())
    return text.replace(tokenizer.pad_token, "").split(tokenizer.eos_token)[:-1]


def test_the_split_holds_every_document_once_and_does_not_depend_on_order(tmp_path):
    texts = documents(400)
    one = write_jsonl(tmp_path / "a.jsonl", texts)
    prepared = prepare(TextFilesDataConfig(train_files=[one], validation_fraction=0.1), vocab_size=300, seq_len=32)
    train = texts_of(prepared.train.sets[0], prepared.tokenizer)
    held_out = texts_of(prepared.validation["validation"], prepared.tokenizer)
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text not in set(held_out)]
    assert 15 <= len(held_out) <= 70
    shuffled = write_jsonl(tmp_path / "b.jsonl", random.Random(1).sample(texts, len(texts)))
    again = prepare(TextFilesDataConfig(train_files=[shuffled], validation_fraction=0.1), vocab_size=300, seq_len=32)
    assert sorted(texts_of(again.validation["validation"], again.tokenizer)) == sorted(held_out)
    report = prepared.report
    assert report.documents == 400
    assert report.text_bytes == sum(map(len, texts))
    assert report.tokenizer_sample_bytes == sum(map(len, train))


def test_the_second_call_only_hashes(tmp_path, monkeypatch):
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", documents(300))])
    first = prepare(data, vocab_size=300, seq_len=32)
    assert not first.report.is_cached

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(prepare_module, "RowWriter", refuse)
    monkeypatch.setattr(prepare_module, "train_tokenizer", refuse)
    second = prepare(data, vocab_size=300, seq_len=32)
    assert second.report.is_cached
    assert second.fingerprint == first.fingerprint
    assert second.report.sets == first.report.sets
    assert torch.equal(rows_of(second.train), rows_of(first.train))
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare(data, vocab_size=300, seq_len=31)


def test_the_fingerprint_follows_everything_that_decides_the_rows(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", documents(200))
    two = write_jsonl(tmp_path / "b.jsonl", documents(200, seed=1))
    mixed = {"train_files": [one, two], "validation_fraction": 0.1}

    def fingerprint(vocab_size=300, seq_len=32, **settings):
        values = {"train_files": [one], "validation_fraction": 0.1} | settings
        return prepare(TextFilesDataConfig(**values), vocab_size=vocab_size, seq_len=seq_len).fingerprint

    different = [
        fingerprint(),
        fingerprint(vocab_size=310),
        fingerprint(seq_len=16),
        fingerprint(row_maker="padded"),
        fingerprint(isolate_documents=True),
        fingerprint(validation_fraction=0.3),
        fingerprint(train_files=[two]),
        fingerprint(**mixed),
        fingerprint(**mixed, train_weights=[1.0, 2.0]),
        fingerprint(validation_files=[two]),
        fingerprint(validation_files={"other": [two]}),
    ]
    assert len(set(different)) == len(different)
    (tmp_path / "moved").mkdir()
    shutil.copy(one, tmp_path / "moved" / "a.jsonl")
    assert fingerprint(train_files=[str(tmp_path / "moved" / "a.jsonl")]) == different[0]


def test_a_damaged_cache_is_made_again(tmp_path):
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", documents(300))])
    first = prepare(data, vocab_size=300, seq_len=32)
    with open(first.report.folders["train"] / "tokens.bin", "r+b") as file:
        file.truncate(100)
    second = prepare(data, vocab_size=300, seq_len=32)
    assert not second.report.is_cached
    assert second.fingerprint == first.fingerprint


def _prepare_and_log(data, log, delay):
    def slowly(_progress):
        time.sleep(delay)

    prepared = prepare(data, vocab_size=300, seq_len=32, progress=slowly)
    with open(log, "a") as file:
        file.write(f"{prepared.report.is_cached} {prepared.fingerprint}\n")


def test_several_processes_at_once_make_the_rows_once(tmp_path):
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", documents(60))], validation_fraction=0.2)
    processes = [fork.Process(target=_prepare_and_log, args=(data, tmp_path / "log", 0.002)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({fingerprint for _, fingerprint in lines}) == 1
    # One of them may have made the tokenizer and another one the rows.
    assert 1 <= sum(is_cached == "False" for is_cached, _ in lines) <= 2


def _prepare_and_die(data):
    def die(progress):
        if progress.stage == "rows" and progress.documents > 100:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(data, vocab_size=300, seq_len=32, progress=die)


def test_a_kill_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("lost.data.row_makers._BATCH_PIECES", 64)
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", documents(300))])
    process = fork.Process(target=_prepare_and_die, args=(data,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    making = list((tmp_path / "cache" / "rows").glob(".making-*"))
    assert len(making) == 1
    prepared = prepare(data, vocab_size=300, seq_len=32)
    assert not prepared.report.is_cached
    assert prepared.report.documents == 300
    assert not list((tmp_path / "cache" / "rows").glob(".making-*"))
    shutil.rmtree(tmp_path / "cache")
    assert prepare(data, vocab_size=300, seq_len=32).fingerprint == prepared.fingerprint


def test_mixtures_with_held_out_parts(tmp_path):
    one = write_jsonl(tmp_path / "prose.jsonl", documents(200))
    two = write_jsonl(tmp_path / "code.jsonl", documents(100, seed=1))
    data = TextFilesDataConfig(train_files=[one, two], train_weights=[1.0, 1.0], validation_fraction=0.1)
    prepared = prepare(data, vocab_size=300, seq_len=32)
    assert set(prepared.validation) == {"prose", "code"}
    assert set(prepared.report.sets) == {"train/prose", "train/code", "prose", "code"}
    assert prepared.train.order(0).quotas == [len(prepared.train) - len(prepared.train) // 2, len(prepared.train) // 2]


def test_only_validation(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", documents(100))
    validation = write_jsonl(tmp_path / "b.jsonl", documents(20, seed=1))
    data = TextFilesDataConfig(train_files=["no such file here"], validation_files={"b": [validation]})
    with pytest.raises(DataError, match="no such file here"):
        prepare_validation(data, vocab_size=258, seq_len=16, tokenizer=tiny_tokenizer())
    data = TextFilesDataConfig(validation_files={"b": [validation]})
    sets, report = prepare_validation(data, vocab_size=258, seq_len=16, tokenizer=tiny_tokenizer())
    assert list(sets) == list(report.sets) == ["b"]
    assert texts_of(sets["b"], tiny_tokenizer()) == documents(20, seed=1)
    with pytest.raises(DataError, match=r"data.train_files is empty"):
        prepare(data, vocab_size=300, seq_len=16)
    held_out, _ = prepare_validation(
        TextFilesDataConfig(train_files=[train], validation_fraction=0.2),
        vocab_size=258,
        seq_len=16,
        tokenizer=tiny_tokenizer(),
    )
    assert set(texts_of(held_out["validation"], tiny_tokenizer())) < set(documents(100))


@pytest.mark.parametrize(
    ("texts", "settings", "words"),
    [
        ([], {}, ["no text in 0 documents"]),
        (["", " \n"], {}, ["no text in 2 documents (2 empty)"]),
        (["just one document"], {}, ["of 1 documents holds out none", "data.validation_files", "fraction above 0."]),
        (["a b", "c d"], {"validation_fraction": 0.999999}, ["leaves none to train on", "lower"]),
        (["ab", "cd"], {"validation_files": ["v.jsonl"]}, ["do not fill one row of seq_len = 32", "lower train"]),
    ],
)
def test_too_little_text_is_refused(tmp_path, monkeypatch, texts, settings, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "v.jsonl", ["validation text"])
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", texts)], **settings)
    with pytest.raises(DataError) as error:
        prepare(data, vocab_size=300, seq_len=32)
    assert all(word in str(error.value) for word in words), error.value
    # A refused corpus leaves no rows: the same mistake is the same message.
    with pytest.raises(DataError, match=words[0].replace("(", r"\(").replace(")", r"\)")):
        prepare(data, vocab_size=300, seq_len=32)


def test_the_fraction_that_the_message_names_is_enough(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(5))
    with pytest.raises(DataError) as error:
        prepare(TextFilesDataConfig(train_files=[path], validation_fraction=1e-6), vocab_size=300, seq_len=8)
    named = float(str(error.value).rsplit("above ", 1)[1])
    prepared = prepare(
        TextFilesDataConfig(train_files=[path], validation_fraction=named * 1.01), vocab_size=300, seq_len=8
    )
    assert prepared.report.sets["validation"].documents == 1


def test_invalid_utf8_is_counted_and_named(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", documents(50))
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "caf\xe9 ol\xe9 ' + b"x " * 50 + b'"}\n{"text": "good"}\n')
    data = TextFilesDataConfig(train_files=[str(tmp_path / "bad.jsonl")], validation_files=[good])
    counts = prepare(data, vocab_size=300, seq_len=8).report.sets["train"]
    assert (counts.invalid_documents, counts.invalid_sequences) == (1, 2)
    assert [name.endswith("bad.jsonl") for name in counts.invalid_files] == [True]


def test_a_damaged_file_leaves_no_rows(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in documents(500)).encode())[:-9])
    data = TextFilesDataConfig(train_files=[str(path)])
    for _ in range(2):
        with pytest.raises(DataError, match="cut off or damaged after record 500"):
            prepare(data, vocab_size=300, seq_len=32)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    data = TextFilesDataConfig(
        train_files=[write_jsonl(tmp_path / "a.jsonl", documents(300))], cache_dir=str(tmp_path / "file")
    )
    with pytest.raises(DataError, match=r"cannot be written .*data.cache_dir"):
        prepare(data, vocab_size=300, seq_len=32)


def test_c4_from_a_local_folder(tmp_path, monkeypatch):
    """The lineage's recipe on files of C4's shape: shuffled, one document a row, EOS at the end, padding."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "c4" / "en").mkdir(parents=True)
    texts = documents(60)
    for split, part in (("train", texts[:50]), ("validation", texts[50:])):
        with gzip.open(tmp_path / "c4" / "en" / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text, "timestamp": "t", "url": "u"}) + "\n" for text in part)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    settings = {"dataset": str(tmp_path / "c4"), "tokenizer": str(tmp_path / "tokenizer"), "row_maker": "padded"}
    prepared = prepare(C4DataConfig(**settings), vocab_size=258, seq_len=512)
    rows = rows_of(prepared.train)
    found = [prepared.tokenizer.decode(row).split("<eos>")[0] for row in rows]
    assert sorted(found) == sorted(texts[:50])
    assert found != texts[:50]
    assert all((row == 1).sum() == 1 for row in rows)
    assert len(prepared.validation["validation"]) == 10
    fewer = prepare(C4DataConfig(**settings, max_documents=20), vocab_size=258, seq_len=512)
    assert torch.equal(rows_of(fewer.train), rows[:20])


def test_stdlib_fills_a_small_vocabulary(monkeypatch):
    """The whole way on a part of the real corpus."""
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 4096)
    from lost.data.sources import FileCorpus, stdlib_corpus

    whole = stdlib_corpus()
    part = FileCorpus("stdlib", whole.files[::40], "", is_keyed_by_label=True)
    monkeypatch.setattr("lost.data.sources.stdlib_corpus", lambda: part)
    data = StdlibDataConfig(validation_fraction=0.2)
    prepared = prepare(data, vocab_size=512, seq_len=64)
    text = {path.read_text() for path, _ in part.files}
    found = texts_of(prepared.train.sets[0], prepared.tokenizer)
    found += texts_of(prepared.validation["validation"], prepared.tokenizer)
    assert set(found) == {document for document in text if document.strip()}
    assert len(prepared.tokenizer) == 512
