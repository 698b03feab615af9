"""Pictures are drawn from whatever a metrics file holds, and show what it holds."""

import json
import math

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from lost.utils import plots
from lost.utils.plots import plot_run, read_metrics, series, smoothed


def write_metrics(run_dir, lines, tail="") -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def training_lines(count: int) -> list[dict]:
    return [
        {
            "step": step,
            "loss": None if step == 7 else 3 + 5 * math.exp(-step / 20) + 0.1 * math.sin(9 * step),
            "learning_rate": 1e-3 * min(step / 10, 1),
            "tokens_per_second": 4000 + 100 * math.sin(step),
        }
        for step in range(1, count + 1)
    ]


def names(paths) -> list[str]:
    return [path.name for path in paths]


ALL = ["loss.png", "learning_rate.png", "throughput.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"step": 0, "eval/loss": 8.0}, *training_lines(50), {"step": 50, "eval/loss": 3.0}], ALL),
        (training_lines(1), ALL),
        (training_lines(2), ALL),
        ([{"step": 1, "loss": None, "learning_rate": 1e-3, "tokens_per_second": 5.0}], ALL[1:]),
        ([{"step": 0, "eval/loss": 8.0}], ALL[:1]),
        ([{"step": 0, "eval/english/loss": 8.0, "eval/python/loss": 7.0}], ALL[:1]),
        ([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 900_000, "loss": 1e9}], ALL[:1]),
        ([{"step": 1, "loss": 2.5, "learning_rate": 0.0, "tokens_per_second": 1e9}], ALL),
        ([], []),
    ],
)
def test_every_metrics_file_gives_its_pictures(tmp_path, lines, expected):
    write_metrics(tmp_path, lines, tail='{"step": 51, "los')
    written = plot_run(tmp_path)
    assert names(written) == expected
    for path in written:
        picture = image.imread(path)
        assert picture.shape[:2] == (630, 1080)
        assert picture[..., :3].std() > 0.01
    if written:
        assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(expected)


def figures_of(tmp_path, monkeypatch, lines) -> dict[str, Figure]:
    found = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: found.update({path.stem: figure}))
    write_metrics(tmp_path / "my_run", lines)
    plot_run(tmp_path / "my_run")
    return found


def test_axes_have_titles_and_units(tmp_path, monkeypatch):
    found = figures_of(tmp_path, monkeypatch, training_lines(30))
    labels = {name: figure.axes[0].get_ylabel() for name, figure in found.items()}
    assert labels == {
        "loss": "mean token loss (nats)",
        "learning_rate": "learning rate",
        "throughput": "training speed (tokens/s)",
    }
    assert {figure.axes[0].get_xlabel() for figure in found.values()} == {"optimizer step"}
    assert found["loss"].axes[0].get_title(loc="left") == "my_run: loss"


def test_curves_hold_the_values_of_the_file(tmp_path, monkeypatch):
    lines = [{"step": 0, "eval/loss": 8.0}, *training_lines(30), {"step": 30, "eval/loss": 3.5}]
    curves = {curve.get_label(): curve for curve in figures_of(tmp_path, monkeypatch, lines)["loss"].axes[0].lines}
    assert set(curves) == {"train, each step", "train, smoothed", "validation"}
    raw = curves["train, each step"]
    assert 7 not in raw.get_xdata()
    assert list(raw.get_ydata()) == [line["loss"] for line in lines if line.get("loss") is not None]
    assert list(curves["validation"].get_xdata()) == [0, 30]
    assert list(curves["validation"].get_ydata()) == [8.0, 3.5]


def test_smoothing_is_the_mean_of_the_neighbours():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    expected = [8 / 3, 9 / 4, 14 / 5, 20 / 5, 19 / 4, 15 / 3]
    assert smoothed(values, 2) == pytest.approx(expected, rel=1e-14)
    assert smoothed(values, 0) == values
    assert smoothed([], 3) == []


def test_series_leaves_out_what_is_no_number():
    lines = [
        {"step": 1, "a": 1},
        {"step": 2, "a": None},
        {"step": 3, "a": math.nan},
        {"step": 4},
        {"step": 5, "a": "x"},
    ]
    assert series(lines, "a") == plots.Series([1], [1])


def test_lines_without_a_step_are_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n{"a": 1}\n[1]\nnot json\n\xff\n{"step": 2}')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]
