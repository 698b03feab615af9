"""What the data settings name, and the mistakes in them."""

from pathlib import Path

import pytest

from lost.config.data import C4DataConfig, StdlibDataConfig, TextFilesDataConfig
from lost.data.sources import open_sources, stdlib_corpus
from lost.utils.errors import ConfigError, DataError


def labels(corpus):
    return [label for _, label in corpus.files]


def test_stdlib_is_sorted_and_without_tests():
    (corpus,) = open_sources(StdlibDataConfig()).train
    names = labels(corpus)
    assert names == sorted(names)
    assert len(names) > 400
    assert {"abc.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert stdlib_corpus().content_hash == corpus.content_hash


def test_stdlib_keys_come_from_the_path_not_the_content():
    pieces = {piece.file: piece.key for piece in stdlib_corpus().pieces() if piece.file.endswith("__init__.py")}
    # Many __init__.py are empty; their places in the hash order differ all the same.
    assert len(set(pieces.values())) == len(pieces) > 20


def test_globs_are_sorted_and_several(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    data = TextFilesDataConfig(train_files=[f"{tmp_path}/**/*.txt", f"{tmp_path}/d.jsonl"])
    assert labels(open_sources(data).train[0]) == ["a.txt", "b.txt", "c.txt", "d.jsonl"]


def test_a_name_with_brackets_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    data = TextFilesDataConfig(train_files=[f"{tmp_path}/a[1].txt"])
    assert labels(open_sources(data).train[0]) == ["a[1].txt"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("nothing.txt", ["data.train_files", "no such file", "nothing.txt", "check the path"]),
        ("*.txt", ["data.train_files", "no file matches", "*.txt"]),
        ("", ["is a folder", "*.jsonl"]),
        ("a.csv", ["a.csv", "unknown kind", ".parquet"]),
    ],
)
def test_wrong_entries_are_named(tmp_path, entry, words):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError) as error:
        open_sources(TextFilesDataConfig(train_files=[f"{tmp_path}/{entry}"]))
    assert all(word in str(error.value) for word in words), error.value


def test_named_validation_sets_and_mixtures(tmp_path):
    for name in ("a", "b", "v"):
        (tmp_path / f"{name}.txt").write_text(name)
    sources = open_sources(
        TextFilesDataConfig(
            train_files=[f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"],
            train_weights=[1.0, 3.0],
            validation_files={"first": [f"{tmp_path}/v.txt"], "second": [f"{tmp_path}/v.txt", f"{tmp_path}/b.txt"]},
        )
    )
    assert [corpus.name for corpus in sources.train] == ["a", "b"]
    assert sources.weights == [1.0, 3.0]
    assert {name: labels(corpus) for name, corpus in sources.validation.items()} == {
        "first": ["v.txt"],
        "second": ["v.txt", "b.txt"],
    }


def test_a_file_to_train_and_validate_on_is_warned_of(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("x")
    files = [f"{tmp_path}/a.txt"]
    open_sources(TextFilesDataConfig(train_files=files, validation_files=files))
    assert "a.txt is in both data.train_files and data.validation_files" in caplog.text


def test_weights_must_fit_the_entries():
    with pytest.raises(ConfigError, match="train_weights has 1 entries and train_files 2"):
        TextFilesDataConfig(train_files=["a", "b"], train_weights=[1.0])
    with pytest.raises(ConfigError, match="every weight must be above 0"):
        TextFilesDataConfig(train_files=["a"], train_weights=[0.0])


def test_content_hash_follows_bytes_and_names_not_folders(tmp_path):
    def hash_of(folder, name, text, field="text"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
        data = TextFilesDataConfig(train_files=[f"{tmp_path}/{folder}/{name}"], text_field=field)
        return open_sources(data).train[0].content_hash

    here = hash_of("here", "a.txt", "x")
    assert hash_of("there", "a.txt", "x") == here
    others = {hash_of("o", "a.txt", "y"), hash_of("o", "b.txt", "x"), hash_of("here", "a.txt", "x", field="body")}
    assert len(others | {here}) == 4


def test_c4_offline_says_what_to_use(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sources = open_sources(C4DataConfig(dataset="nobody/nothing"))
    with pytest.raises(DataError) as error:
        next(sources.train[0].pieces())
    for word in ("HF_HUB_OFFLINE", "nobody/nothing", "data=stdlib", "data=text_files", "c4-train"):
        assert word in str(error.value)
    assert "data=stdlib" in sources.hub_advice
