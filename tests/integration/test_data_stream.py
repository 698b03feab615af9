"""Training from a stream: rows made as documents come, shared out over processes, and begun anew by a resume."""

import gzip
import json
import random
from itertools import islice

import pytest
import torch

from lost.config.data import C4DataConfig
from lost.data import TokenStream, prepare, train_batches
from lost.testing.runs import TINY_MODEL, losses, lost_here
from lost.testing.tiny import tiny_tokenizer
from lost.utils.errors import ConfigError, DataError

PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def c4(tmp_path_factory):
    """A folder in C4's shape: 4 files of 10 documents to train on, each with its number, and one to validate on."""
    folder = tmp_path_factory.mktemp("c4")
    (folder / "en").mkdir()
    rng = random.Random(0)
    for name, first, count in [*((f"train.{k:05d}-of-00004", 10 * k, 10) for k in range(4)), ("validation.0", 900, 5)]:
        with gzip.open(folder / "en" / f"c4-{name}.json.gz", "wt") as file:
            for number in range(first, first + count):
                text = f"{number:03d} " + "".join(rng.choices("abcdef ", k=rng.randint(1, 90)))
                file.write(json.dumps({"text": text, "url": "u"}) + "\n")
            file.write(json.dumps({"text": " ", "url": "blank"}) + "\n")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("LOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def settings(c4, **changes):
    values = {"dataset": str(c4), "tokenizer": str(c4 / "tokenizer"), "row_maker": "padded", "streaming": True}
    return C4DataConfig(**(values | changes))


def stream(c4, seq_len=128, **changes):
    return prepare(settings(c4, **changes), vocab_size=258, seq_len=seq_len).train


def texts_in(c4):
    found = {}
    for path in (c4 / "en").glob("c4-train*"):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            text = json.loads(line)["text"]
            if text.strip():
                found[text[:3]] = text
    return found


def read(train, num_batches, *, process=0, processes=1, first_step=1, micro=1, seed=3, num_workers=0):
    steps = train_batches(
        train,
        seed=seed,
        first_step=first_step,
        global_batch_size=micro * processes,
        micro_batch_size=micro,
        process_index=process,
        num_processes=processes,
        num_workers=num_workers,
    )
    found = [batch for step in islice(steps, num_batches) for batch in step]
    steps.close()
    return found


def numbers(batches):
    return [tiny_tokenizer().decode(row[:3]) for batch in batches for row in batch["input_ids"]]


def test_padded_rows_are_the_documents_each_once_a_pass(c4):
    train = stream(c4)
    assert isinstance(train, TokenStream)
    batches = read(train, 40, micro=2)
    texts = texts_in(c4)
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            tokens = [*tiny_tokenizer().encode(texts[tiny_tokenizer().decode(ids[:3])], add_special_tokens=False), EOS]
            assert ids == tokens + [PAD] * (128 - len(tokens))
            assert labels == tokens + [-100] * (128 - len(tokens))
    order = numbers(batches)
    assert sorted(order[:40]) == sorted(order[40:]) == sorted(texts)
    # Shuffled, and each pass in another way.
    assert sorted(texts) != order[:40] != order[40:]


def test_packed_rows_are_the_same_tokens_without_a_break(c4):
    """Documents in the order of the padded stream, joined; what is left of a pass goes on in the next."""
    documents = numbers(read(stream(c4), 80))
    texts = texts_in(c4)
    tokens = [t for name in documents for t in [*tiny_tokenizer().encode(texts[name], add_special_tokens=False), EOS]]
    num_rows = len(tokens) // 32
    batches = read(stream(c4, seq_len=32, row_maker="packed"), num_rows)
    flat = torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist()
    assert flat == tokens[: num_rows * 32]
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
def test_processes_share_a_pass(c4, processes):
    """Three and five processes do not divide four files: each takes every third, fifth document."""
    parts = [list(stream(c4).corpus.part(7, process, processes, 1)) for process in range(processes)]
    found = [piece.text[:3] for part in parts for piece in part if piece.text.strip()]
    assert sorted(found) == sorted(texts_in(c4))
    assert min(map(len, parts)) > 40 / processes / 2


@pytest.mark.parametrize("processes", [1, 2])
def test_readers_of_a_process_share_its_part(c4, processes):
    """Two readers each take turns; the first pass of every one is its files' documents."""
    num_documents = 40 // (2 * processes)
    found = []
    for process in range(processes):
        mine = numbers(read(stream(c4), 2 * num_documents, process=process, processes=processes, num_workers=2))
        found += mine
    assert sorted(found) == sorted(texts_in(c4))


def test_a_resume_begins_anew_and_says_what_that_loses(c4, caplog):
    train = stream(c4)
    whole = numbers(read(train, 40))
    assert "data.streaming" not in caplog.text
    resumed = numbers(read(train, 40, first_step=11))
    assert "step 11 begins the stream anew" in caplog.text
    assert "documents that were read may come again" in caplog.text
    # All of the documents again, in another order; the same at every resume from that step.
    assert sorted(resumed) == sorted(whole)
    assert resumed != whole
    assert resumed[:30] != whole[10:]
    assert numbers(read(train, 40, first_step=11)) == resumed
    assert numbers(read(train, 40, seed=4)) != whole


def test_max_documents_is_shared_out(c4):
    train = stream(c4, max_documents=10)
    order = numbers(read(train, 30))
    assert len(set(order[:10])) == 10
    assert all(len(numbers(read(train, 5, process=p, processes=2))) == 5 for p in range(2))


def test_a_reader_without_a_row_is_named(c4):
    with pytest.raises(DataError, match=r"no whole row .* 1 processes with 1 readers each"):
        read(stream(c4, seq_len=100_000, row_maker="packed"), 1)


def test_the_fingerprint_follows_what_decides_the_rows(c4):
    def fingerprint(seq_len=64, **changes):
        return prepare(settings(c4, **changes), vocab_size=258, seq_len=seq_len).fingerprint

    different = [fingerprint(), fingerprint(seq_len=32), fingerprint(row_maker="packed"), fingerprint(max_documents=9)]
    assert len({*different, fingerprint(streaming=False)}) == 5
    assert fingerprint() == different[0]


def test_isolated_documents_need_rows_on_disk(c4):
    with pytest.raises(ConfigError, match="streaming = true with isolate_documents = true"):
        settings(c4, row_maker="packed", isolate_documents=True)


def test_a_run_trains_from_the_stream_and_goes_on(c4, tmp_path, capfd):
    """The real command; then more steps, which say what they lose."""
    arguments = [
        *("pretrain", "data=c4", f"data.dataset={c4}", f"data.tokenizer={c4 / 'tokenizer'}", "data.streaming=true"),
        *("train.seq_len=64", "train.global_batch_size=4", "train.micro_batch_size=2", "logging=none"),
        *(f"run_dir={tmp_path / 'run'}", "evaluation.every_steps=0", *TINY_MODEL),
    ]
    assert lost_here(*arguments, "train.max_steps=3") == 0
    first = capfd.readouterr()
    assert "a stream, whose place a resume loses" in first.out
    assert "begins the stream anew" not in first.err
    assert len(losses(tmp_path / "run")) == 3
    assert lost_here(*arguments, "train.max_steps=5") == 0
    assert capfd.readouterr().err.count("step 4 begins the stream anew") == 1
    assert len(losses(tmp_path / "run")) == 5
