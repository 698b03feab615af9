"""What the experiments' scripts compute from finished runs, against counts by hand."""

import gzip
import json
import runpy
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sentiment = runpy.run_path(str(SCRIPTS / "sentiment.py"))
recover = runpy.run_path(str(SCRIPTS / "recover.py"))


def test_interval_is_paired() -> None:
    """Two arms that err on the same sentences have a certain difference, however hard the sentences are."""
    generator = np.random.default_rng(1)
    second = generator.integers(0, 2, (3, 501)).astype(float)
    same = sentiment["interval"](second, second)
    assert same == {"points": 0.0, "low": 0.0, "high": 0.0}
    others = sentiment["interval"](generator.permuted(second, axis=1), second)
    assert others["points"] == pytest.approx(0.0, abs=1e-9)
    assert others["high"] - others["low"] > 4


def test_interval_covers_what_binomial_arithmetic_says() -> None:
    """One seed, the second arm right nowhere: the interval is that of a proportion, 1.96 sqrt(p (1 - p) / n)."""
    first = np.zeros((1, 1000))
    first[0, :700] = 1.0
    found = sentiment["interval"](first, np.zeros_like(first))
    half = 196 * (0.7 * 0.3 / 1000) ** 0.5
    assert found["points"] == pytest.approx(70.0)
    assert found["low"] == pytest.approx(70 - half, abs=0.25)
    assert found["high"] == pytest.approx(70 + half, abs=0.25)


def test_interval_draws_seeds_too() -> None:
    """Seeds that disagree widen the interval though every sentence of a seed says the same."""
    first = np.stack([np.ones(200), np.zeros(200)])
    found = sentiment["interval"](first, np.zeros_like(first))
    assert (found["low"], found["high"]) == (0.0, 100.0)


def test_hits_are_read_over_both_sets_in_order(tmp_path: Path) -> None:
    predictions = {"validation": [("1", "1"), ("0", "1")], "test": [("0", "0")]}
    for name, pairs in predictions.items():
        path = tmp_path / "predictions" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"prediction": p, "label": label}) + "\n" for p, label in pairs))
    assert sentiment["hits_of"](tmp_path).tolist() == [1.0, 0.0, 1.0]


def test_first_labels_only(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.writelines(f'{{"text": "{number}", "label": 0}}\n' for number in range(5))
    entry = sentiment["train_file"](Namespace(polarity=tmp_path, out=tmp_path, labels=2))
    written = Path(entry.removeprefix("data.train_files=[").removesuffix("]"))
    assert [json.loads(line)["text"] for line in written.read_text().splitlines()] == ["0", "1"]


def test_recovery_is_the_first_evaluation_that_is_no_worse(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "eval/perplexity": 90.0},
        {"step": 20, "loss": 4.0, "tokens_seen": 2048},
        {"step": 20, "eval/perplexity": 52.5},
        {"step": 40, "loss": 3.9, "tokens_seen": 4096},
        {"step": 40, "eval/perplexity": 50.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = recover["curve_of"](tmp_path)
    assert curve == [(0, 90.0), (2048, 52.5), (4096, 50.0)]
    assert recover["first_within"](curve, 52.5) == 2048
    assert recover["first_within"](curve, 49.0) is None
