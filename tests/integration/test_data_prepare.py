"""Preparing real files: cache, several processes, kills, sizes, and the mistakes that only reading shows."""

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

from lost.config.data import C4DataConfig, StdlibDataConfig, TextFilesDataConfig
from lost.data import corpus_rows, files, prepare, prepare_validation, row_sets
from lost.data.row_sets import make_rows
from lost.testing.tiny import tiny_tokenizer
from lost.utils.errors import DataError
from lost.utils.files import cache_folder

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

    def refuse(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(row_sets, "CorpusRows", refuse)
    monkeypatch.setattr(row_sets, "train_tokenizer", refuse)
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


def test_damage_is_an_error_with_a_way_out(tmp_path):
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", documents(300))])
    first = prepare(data, vocab_size=300, seq_len=32)
    folder = first.report.folders["train"]
    checked = make_rows(data, vocab_size=300, seq_len=32)
    assert checked.verified_bytes == sum(path.stat().st_size for path in folder.parent.rglob("*.bin"))
    with open(folder / "tokens_00000.bin", "r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    assert prepare(data, vocab_size=300, seq_len=32).report.is_cached
    with pytest.raises(DataError, match=r"tokens_00000.bin: prepared rows are damaged: expected sha256"):
        make_rows(data, vocab_size=300, seq_len=32)
    with open(folder / "tokens_00000.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"found 100\. Remove") as error:
        prepare(data, vocab_size=300, seq_len=32)
    shutil.rmtree(str(error.value).split("Remove ")[1].split(";")[0])
    again = prepare(data, vocab_size=300, seq_len=32)
    assert not again.report.is_cached
    assert again.fingerprint == first.fingerprint


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
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({fingerprint for _, fingerprint in lines}) == 1
    # One of them may have made the tokenizer and another one the rows.
    assert 1 <= sum(is_cached == "False" for is_cached, _ in lines) <= 2


def _prepare_and_die(data, num_documents):
    def die(progress):
        if progress.stage == "rows" and progress.documents > num_documents:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(data, vocab_size=300, seq_len=32, progress=die)


def kill_while_preparing(data, num_documents):
    """A preparation in a process of its own, killed after so many documents; the folder it leaves."""
    process = fork.Process(target=_prepare_and_die, args=(data, num_documents))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    (making,) = (cache_folder("") / "rows").glob(".making-*")
    return making


def files_below(folder, pattern="*.bin"):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


def inodes_below(folder):
    """What would change if a file were written again, by "split/file"."""
    found = {f"{path.parent.name}/{path.name}": path.stat() for path in folder.rglob("*.bin")}
    return {name: (facts.st_ino, facts.st_mtime_ns) for name, facts in found.items()}


@pytest.fixture
def _small_shards(monkeypatch):
    monkeypatch.setattr("lost.data.row_makers._BATCH_PIECES", 16)
    monkeypatch.setattr(corpus_rows, "SHARD_TOKENS", 2000)


@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize(("row_maker", "num_processes"), [("packed", 1), ("packed", 2), ("padded", 2)])
def test_killed_twice_it_goes_on_and_ends_the_same(tmp_path, monkeypatch, row_maker, num_processes):
    """Finished shards stay the files they are, and what came after them is all that is encoded again."""
    data = TextFilesDataConfig(
        train_files=[write_jsonl(tmp_path / "a.jsonl", documents(600))],
        validation_fraction=0.1,
        row_maker=row_maker,
        num_processes=num_processes,
    )
    rows = tmp_path / "cache" / "rows"
    unbroken = prepare(data, vocab_size=300, seq_len=32)
    assert len(unbroken.train.sets[0].meta["shards"]) > 4
    expected = files_below(rows)
    shutil.rmtree(rows)
    finished, pieces = {}, 0
    for num_documents in (200, 400):
        making = kill_while_preparing(data, num_documents)
        progress = json.loads((making / "progress.json").read_text())
        inodes = inodes_below(making)
        now_finished = {
            f"{split}/{name}": inodes[f"{split}/{name}"]
            for split, state in progress["writers"].items()
            for shard in state["shards"]
            for name in shard["files"]
        }
        assert finished.items() < now_finished.items()
        assert pieces + 50 < progress["pieces"] < num_documents + 50
        finished, pieces = now_finished, progress["pieces"]
    encoded = []
    in_order = corpus_rows.encode_in_order

    def counted(*arguments):
        for batch, ids in in_order(*arguments):
            encoded.append(len(batch))
            yield batch, ids

    monkeypatch.setattr(corpus_rows, "encode_in_order", counted)
    resumed = prepare(data, vocab_size=300, seq_len=32)
    assert sum(encoded) == 600 - pieces
    assert files_below(rows) == expected
    assert finished.items() < inodes_below(rows).items()
    assert resumed.fingerprint == unbroken.fingerprint
    assert resumed.report.sets == unbroken.report.sets
    assert not resumed.report.is_cached
    assert unbroken.report.encoded_tokens == unbroken.report.tokens
    assert resumed.report.encoded_tokens < unbroken.report.tokens * (1 - pieces / 700)
    assert {path.name for path in rows.rglob("*.json")} == {"manifest.json"}
    assert not list(rows.glob(".making-*"))


@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize("row_maker", ["packed", "padded"])
def test_the_number_of_processes_and_the_size_of_shards_change_no_row(tmp_path, monkeypatch, row_maker):
    one = write_jsonl(tmp_path / "a.jsonl", [*documents(300), "long " * 3000])
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 2000)

    def prepared(num_processes):
        data = TextFilesDataConfig(
            train_files=[one], validation_fraction=0.1, row_maker=row_maker, num_processes=num_processes
        )
        report = prepare(data, vocab_size=300, seq_len=32).report
        assert report.num_processes == num_processes
        content = files_below(tmp_path / "cache" / "rows", "*")
        shutil.rmtree(tmp_path / "cache")
        return report.sets, {name: raw for name, raw in content.items() if name.suffix != ".lock"}

    counts, alone = prepared(1)
    assert prepared(2) == prepared(3) == (counts, alone)
    sizes = {name: len(content) for name, content in alone.items() if name.name.startswith("tokens")}
    assert len(sizes) > 4
    # SHARD_TOKENS and one batch, two bytes each.
    assert max(sizes.values()) <= 2 * (2000 + 16 * (2000 if row_maker == "packed" else 32))
    monkeypatch.setattr(corpus_rows, "SHARD_TOKENS", 1 << 40)
    counts_of_one, one_shard = prepared(1)
    assert counts_of_one == counts
    for split in ("train", "validation"):
        joined = [
            b"".join(content for name, content in sorted(found.items()) if name.match(f"{split}/tokens_*"))
            for found in (alone, one_shard)
        ]
        assert joined[0] == joined[1] != b""


def test_workers_end_with_a_killed_parent(tmp_path, monkeypatch):
    """They hold its file lock: if they lived on, the next start would wait for them."""
    monkeypatch.setattr("lost.data.row_makers._BATCH_PIECES", 64)
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", documents(600))], num_processes=2)
    kill_while_preparing(data, 100)
    started = time.monotonic()
    assert prepare(data, vocab_size=300, seq_len=32).report.documents == 600
    assert time.monotonic() - started < 60


@pytest.mark.usefixtures("_small_shards")
def test_a_killed_worker_is_named_and_finished_shards_are_kept(tmp_path):
    data = TextFilesDataConfig(train_files=[write_jsonl(tmp_path / "a.jsonl", documents(600))], num_processes=2)

    def kill_a_worker(progress):
        workers = multiprocessing.active_children()
        if progress.stage == "rows" and progress.documents > 200 and workers:
            workers[0].kill()

    with pytest.raises(DataError, match=r"ended from outside.*data.num_processes below 2"):
        prepare(data, vocab_size=300, seq_len=32, progress=kill_a_worker)
    report = prepare(data, vocab_size=300, seq_len=32).report
    assert report.documents == 600
    assert report.encoded_tokens < report.tokens * 0.9


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
        (["just one document"], {}, ["one document cannot be split", "data.validation_files", "more documents"]),
        (
            ["a b", "c d"],
            {"validation_fraction": 1e-6},
            ["of 2 documents holds out none", "data.validation_files", "fraction above 0."],
        ),
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
