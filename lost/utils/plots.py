"""Pictures of a run, drawn from its metrics.jsonl: loss, learning rate, throughput."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lost.utils.metrics_file import read_metrics

_BLUE, _ORANGE, _GREY = "#2563eb", "#ea580c", "#64748b"
_SIZE_INCHES = (7.2, 4.2)
_DOTS_PER_INCH = 150
# Left, bottom, width and height of the axes as shares of the picture. Fitting them to the labels would draw it twice.
_AXES = (0.12, 0.115, 0.855, 0.765)
# Neighbours on each side that smooth the loss, as a share of the points drawn.
_SMOOTHING_SHARE = 0.01
_VALIDATION_COLORS = (_ORANGE, "#16a34a", "#9333ea", "#dc2626", "#0891b2")


@dataclass(frozen=True)
class Series:
    """Values over steps; steps without a finite value are left out."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


def plot_run(run_dir: str | Path, title: str = "") -> list[Path]:
    """Draws <run_dir>/plots/{loss,learning_rate,throughput}.png from <run_dir>/metrics.jsonl.

    Args:
        run_dir: the run directory.
        title: above each picture, before what it shows; default: the folder's name.
    Returns:
        The pictures written; one without a single value is left out.
    """
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    pictures: dict[str, tuple[str, Callable[[Axes, list[dict[str, Any]]], bool]]] = {
        "loss": ("loss", _draw_loss),
        "learning_rate": ("learning rate", _draw_learning_rate),
        "throughput": ("throughput", _draw_throughput),
    }
    written = []
    for name, (words, draw) in pictures.items():
        figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        axes = figure.add_axes(_AXES)
        if draw(axes, lines):
            _style(axes, f"{title or run_dir.resolve().name}: {words}")
            path = run_dir / "plots" / f"{name}.png"
            _save(figure, path)
            written.append(path)
    return written


def series(lines: Iterable[dict[str, Any]], key: str) -> Series:
    """The finite values of `key`, by step."""
    found = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
    return Series([step for step, _ in found], [value for _, value in found])


def smoothed(values: list[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` neighbours on both sides (those that exist).

    Centred, so that the curve does not trail behind a falling loss.
    """
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        first, end = max(0, index - reach), min(len(values), index + reach + 1)
        result.append((sums[end] - sums[first]) / (end - first))
    return result


def plot_arms(path: Path, title: str, label: str, arms: dict[str, tuple[float, float, float]]) -> None:
    """Horizontal bars of (value, low, high) by name into the PNG at `path`, the first on top; 1 is marked."""
    figure = Figure(figsize=(_SIZE_INCHES[0], 1.2 + 0.4 * len(arms)), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [value for value, _, _ in arms.values()]
    # A median of few rounds may lie outside the quantiles of its ratios by rounding.
    spreads = [[max(0.0, v - low) for v, low, _ in arms.values()], [max(0.0, high - v) for v, _, high in arms.values()]]
    bars = axes.barh(list(arms), values, xerr=spreads, color=_BLUE, ecolor=_GREY)
    axes.bar_label(bars, fmt="%.2f", padding=6)
    axes.axvline(1.0, color=_ORANGE, linewidth=1)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9)
    _save(figure, path)


def _draw_loss(axes: Axes, lines: list[dict[str, Any]]) -> bool:
    train = series(lines, "loss")
    validation = {key: series(lines, key) for key in _validation_keys(lines)}
    if train:
        is_smoothing = len(train.values) >= 10
        axes.plot(
            train.steps,
            train.values,
            color=_BLUE,
            alpha=0.28 if is_smoothing else 1.0,
            linewidth=0.9 if is_smoothing else 1.6,
            marker="" if len(train.values) > 1 else "o",
            label="train, each step" if is_smoothing else "train",
        )
        if is_smoothing:
            reach = max(2, round(_SMOOTHING_SHARE * len(train.values)))
            axes.plot(train.steps, smoothed(train.values, reach), color=_BLUE, linewidth=1.8, label="train, smoothed")
    for color, (key, values) in zip(_cycle(_VALIDATION_COLORS, len(validation)), validation.items(), strict=True):
        axes.plot(
            values.steps,
            values.values,
            color=color,
            linewidth=1.2,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label=_validation_label(key),
        )
    if not train and not validation:
        return False
    axes.set_ylabel("mean token loss (nats)")
    axes.legend(frameon=False)
    return True


def _draw_learning_rate(axes: Axes, lines: list[dict[str, Any]]) -> bool:
    rate = series(lines, "learning_rate")
    axes.plot(rate.steps, rate.values, color=_BLUE, linewidth=1.8, marker="" if len(rate.steps) > 1 else "o")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    return bool(rate)


def _draw_throughput(axes: Axes, lines: list[dict[str, Any]]) -> bool:
    speed = series(lines, "tokens_per_second")
    if not speed:
        return False
    axes.plot(speed.steps, speed.values, color=_BLUE, linewidth=1.2, marker="" if len(speed.steps) > 1 else "o")
    middle = sorted(speed.values)[len(speed.values) // 2]
    axes.axhline(
        middle, color=_GREY, linewidth=1, linestyle="--", label=f"median {EngFormatter(places=1, sep='')(middle)}"
    )
    axes.set_ylabel("training speed (tokens/s)")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    return True


def _validation_keys(lines: list[dict[str, Any]]) -> list[str]:
    """Keys such as eval/loss or eval/<set>/loss, in order of first appearance, with at least one finite value."""
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith("eval/") and key.endswith("/loss"))
    return [key for key in ("eval/loss", *(key for key in keys if key != "eval/loss")) if series(lines, key)]


def _validation_label(key: str) -> str:
    name = key.removeprefix("eval/").removesuffix("loss").strip("/")
    return f"validation, {name}" if name else "validation"


def _cycle(colors: tuple[str, ...], count: int) -> list[str]:
    return [colors[index % len(colors)] for index in range(count)]


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#0f172a")
    axes.set_xlabel("optimizer step")
    # A right limit of at least 1: a run of one step still has an axis of whole steps.
    axes.set_xlim(left=0, right=max(1.0, axes.get_xlim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors="#334155", labelsize=9)


def _save(figure: Figure, path: Path) -> None:
    """Writes beside the picture and renames, so that a viewer never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp_{path.name}")
    # Without the version, equal metrics give equal bytes on every machine with the same fonts.
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
