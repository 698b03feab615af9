"""What a conversion kept, for people: a table, conversion.json, conversion.png and the model card."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from lost.config.convert import ConvertConfig
from lost.config.section import to_dict
from lost.export.card import CONVERSION_PICTURE, CONVERSION_REPORT, LOST_TAGS, joined_card, license_fields, usage
from lost.utils.hub import is_hub_id

if TYPE_CHECKING:
    from lost.convert.conversion import Conversion

_BLOCK = re.compile(r"(.*?\.)(\d+)\.(.*)")


def write_report(folder: Path, conversion: "Conversion", config: ConvertConfig) -> None:
    """conversion.json, conversion.png and README.md."""
    facts = as_json(conversion, config)
    (folder / CONVERSION_REPORT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    draw(facts["layers"], folder / CONVERSION_PICTURE)
    (folder / "README.md").write_text(model_card(facts, conversion, config), encoding="utf-8")


def as_json(conversion: "Conversion", config: ConvertConfig) -> dict[str, Any]:
    plan = conversion.plan
    layers = [
        {
            "name": layer.name,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "lost_rank": plan.ranks[layer.name],
            "num_kept": layer.num_kept,
            "num_parameters_before": layer.num_dense,
            "num_parameters_after": layer.num_parameters(plan.ranks[layer.name]),
            **asdict(conversion.errors[layer.name]),
        }
        for layer in plan.layers
    ]
    return {
        "source": config.source,
        "model_type": conversion.model_type,
        "num_parameters_before": plan.num_dense,
        "num_parameters_after": plan.num_parameters,
        "left_dense": list(plan.left_dense),
        "perplexity_before": conversion.before,
        "perplexity_after": conversion.after,
        "seconds": round(conversion.seconds, 3),
        "peak_memory_gib": round(conversion.peak_memory_gib, 3),
        "settings": to_dict(config),
        "layers": layers,
    }


# ------------------------------------------------------------------------------------------------------ words


def by_projection(layers: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layers of each projection, over the blocks."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        found.setdefault(projection_and_block(layer["name"])[0], []).append(layer)
    return found


def projection_and_block(name: str) -> tuple[str, int]:
    """('self_attn.q_proj', 3) for model.layers.3.self_attn.q_proj; block 0 for a layer that is in none."""
    match = _BLOCK.fullmatch(name)
    return (match[3], int(match[2])) if match else (name, 0)


def rows_of(layers: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row a projection: name, layers, ranks, kept channels, energy kept, relative error."""
    rows = []
    for projection, group in by_projection(layers).items():
        energy = [layer["energy_kept"] for layer in group]
        error = [layer["relative_error"] for layer in group]
        rows.append(
            (
                projection,
                str(len(group)),
                _span([layer["lost_rank"] for layer in group]),
                _span([layer["num_kept"] for layer in group]),
                f"{_mean(energy):.2%} ({min(energy):.2%})",
                f"{_mean(error):.4f} ({max(error):.4f})",
            )
        )
    return rows


COLUMNS = ("projection", "layers", "rank", "kept channels", "energy kept, mean (lowest)", "error, mean (highest)")


def table_of(conversion: "Conversion", config: ConvertConfig) -> Table:
    facts = as_json(conversion, config)
    table = Table(title=f"{conversion.place.name} in LOST form", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "projection" else "right")
    for row in rows_of(facts["layers"]):
        table.add_row(*row)
    return table


def summary_lines(conversion: "Conversion", config: ConvertConfig) -> list[str]:
    """Sizes, perplexities, and what to know about the activation."""
    plan = conversion.plan
    share = plan.num_parameters / plan.num_dense
    lines = [f"parameters: {plan.num_dense:,} -> {plan.num_parameters:,} ({share:.1%})"]
    if plan.left_dense:
        lines.append(
            f"left dense, because the rank for energy = {config.energy:g} saves nothing: {len(plan.left_dense)} of"
            f" {len(plan.left_dense) + len(plan.layers)} layers"
        )
    for name, before in conversion.before.items():
        after = conversion.after[name]
        lines.append(
            f"perplexity on {name} ({before['num_tokens']:,} tokens of data={to_dict(config.data)['name']}):"
            f" {before['perplexity']:.3f} -> {after['perplexity']:.3f}"
        )
    if not conversion.before:
        lines.append("perplexity: not measured (perplexity=false)")
    lines.append(activation_words(config))
    return lines


def activation_words(config: ConvertConfig) -> str:
    if config.activation == "identity":
        return (
            "activation: identity. The weights were trained without a function between their factors; one there would"
            " change what they compute"
        )
    return (
        f"activation: {config.activation} between factors that were trained without it: the model computes another"
        " function now, and needs training before it is of use"
    )


def model_card(facts: dict[str, Any], conversion: "Conversion", config: ConvertConfig) -> str:
    """README.md; the licence is the dense model's, as its own card has it."""
    own = conversion.place.folder / "README.md"
    header: dict[str, Any] = {
        **license_fields(own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": LOST_TAGS,
    }
    if is_hub_id(conversion.place.name):
        header["base_model"] = conversion.place.name
    rows = [" | ".join(row) for row in [COLUMNS, ("---",) * len(COLUMNS), *rows_of(facts["layers"])]]
    name = Path(conversion.place.name).name
    text = "\n".join(
        [
            f"# {name}, converted to LOST",
            "",
            f"The {conversion.model_type} model {name}, whose linear layers `lost convert` made low-rank factors plus",
            "a block of kept channels (LOST, arXiv 2508.02668), from the singular value decomposition of its trained",
            "weights. Not trained any further.",
            "",
            "## Conversion",
            "",
            "From the dense model to its LOST form:",
            "",
            "\n".join(f"- {line}" for line in summary_lines(conversion, config)),
            "",
            "\n".join(f"| {row} |" for row in rows),
            "",
            "Energy kept: share of the squared singular values in the low-rank factors. Error: |W - W'| / |W| in the",
            f"Frobenius norm, kept channels included. Every layer: {CONVERSION_REPORT}.",
            "",
            f"![Rank, energy kept and error of every layer]({CONVERSION_PICTURE})",
            "",
            "## Use",
            "",
            usage("lost"),
            "",
        ]
    )
    return joined_card(header, text)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


# ---------------------------------------------------------------------------------------------------- picture


def draw(layers: list[dict[str, Any]], path: Path) -> None:
    """Rank, energy kept and relative error over the blocks, one line a projection."""
    figure = Figure(figsize=(12, 4), dpi=110)
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(1, 3))
    # Fitting the panels to their labels would draw the picture twice.
    figure.subplots_adjust(left=0.04, right=0.84, bottom=0.12, top=0.91, wspace=0.16)
    for axes, key, words in zip(
        panels,
        ("lost_rank", "energy_kept", "relative_error"),
        ("rank", "energy kept by the low-rank factors", "relative error |W - W'| / |W|"),
        strict=True,
    ):
        for projection, group in by_projection(layers).items():
            points = sorted((projection_and_block(layer["name"])[1], layer[key]) for layer in group)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, label=projection)
        axes.set_title(words, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("block")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="#e2e8f0", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper right", frameon=False, fontsize=8)
    figure.savefig(path)
