"""`lost prepare` as a person sees it, and real English where there is some."""

import io
import json
import os
import re
import time

import pytest
from rich.console import Console

from lost.cli.main import main
from lost.config.data import TextFilesDataConfig
from lost.data import PreparationBar, prepare
from lost.data.report import Progress


def test_prepare_reports_what_it_did_and_then_finds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOST_CACHE", str(tmp_path / "cache"))
    texts = [f"document {i} {'words ' * (i % 50)}" for i in range(300)]
    lines = [json.dumps({"body": text}) for text in [*texts, ""]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arguments = ["prepare", "data=text_files", f"data.train_files=[{tmp_path}/a.jsonl]", "data.row_maker=padded"]
    arguments += ["data.text_field=body", "data.validation_fraction=0.1", "train.seq_len=16"]
    arguments += ["data.num_processes=2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "train: " in out
    assert "validation: " in out
    assert "1 empty documents" in out
    assert "documents longer than a row" in out
    assert f"rows in {tmp_path}/cache/rows/" in out
    assert re.search(r"took [\d.]+ s on 2 processes \(.* s tokenizer, .* s rows\): [\d.]+ MB/s, [\d,]+ tokens/s", out)
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert "everything was in the cache" in again
    assert "checksums compared: " in again
    tokens = next((tmp_path / "cache" / "rows").rglob("tokens_00000.bin"))
    tokens.write_bytes(bytes(tokens.stat().st_size))
    assert main(arguments) == 2
    assert f"{tokens}: prepared rows are damaged: expected sha256" in capsys.readouterr().err


def test_a_mistake_exits_2_with_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOST_CACHE", str(tmp_path / "cache"))
    assert main(["prepare", "data=text_files", f"data.train_files=[{tmp_path}/none.txt]"]) == 2
    error = capsys.readouterr().err
    assert "none.txt does not exist" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_or_lines(is_terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=120)
    with PreparationBar(every_seconds=0.0, console=console) as bar:
        bar.show(Progress("tokenizer", "books", 3, 0, 2_000_000, 100, 400))
        # 1.5 MB and 1 M tokens were in finished shards.
        bar.show(Progress("rows", "books", 200, 1_000_000, 1_500_000, 0, 400))
        time.sleep(0.1)
        bar.show(Progress("rows", "books", 1234, 5_000_000, 9_000_000, 300, 400))
    text = out.getvalue()
    assert "tokenising books" in text
    assert "1,234 documents" in text
    assert "5.00 M tokens at " in text
    rates = [float(rate) for rate in re.findall(r"9.0 MB at ([\d.]+) MB/s", text)]
    assert 0 < rates[-1] <= 75
    assert ("75 %" in text) != is_terminal
    out.truncate(0)
    PreparationBar(is_main=False, every_seconds=0.0, console=console).show(Progress("rows", "b", 1, 1, 1, 1, 1))
    assert not out.getvalue().strip("\0")


def test_real_english(tmp_path):
    """Set LOST_TEST_DATA to a folder with train.jsonl.gz and validation.jsonl.gz (field "text") to run this."""
    folder = os.environ.get("LOST_TEST_DATA")
    if not folder:
        pytest.skip("LOST_TEST_DATA names no folder of real text")
    data = TextFilesDataConfig(
        train_files=[f"{folder}/train.jsonl.gz"],
        validation_files=[f"{folder}/validation.jsonl.gz"],
        cache_dir=str(tmp_path),
    )
    prepared = prepare(data, vocab_size=4096, seq_len=256)
    assert prepared.report.tokens / prepared.report.text_bytes < 0.4
    assert set(prepared.report.sets) == {"train", "validation"}
