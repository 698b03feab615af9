"""JSON files that exist whole or not at all."""

import pytest

from lost.checkpoint.io import read_json, write_json, write_json_atomically
from lost.utils.errors import CheckpointError


def test_json_keeps_every_float_and_any_text(tmp_path):
    value = {"a": 0.1 + 0.2, "tiny": 5e-324, "big": 2**70, "nan": float("inf"), "text": "é \udce9 \n", "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_is_replaced_whole_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "status.json"
    write_json_atomically(path, {"a": 1})
    write_json_atomically(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert read_json(path) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_broken_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(CheckpointError, match=r"a.json is not readable JSON"):
        read_json(tmp_path / "a.json")
