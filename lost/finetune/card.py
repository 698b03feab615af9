"""The model card (README.md) of a fine-tuned model."""

from typing import Any

from lost.config.finetune import FinetuneConfig
from lost.config.section import to_dict
from lost.export.card import table


def finetune_card(config: FinetuneConfig, result: dict[str, Any], *, tokens_seen: int) -> str:
    """What it started from, what it was trained on and how, and what came out."""
    method, optimizer = to_dict(config.method), to_dict(config.optimizer)
    settings = [f"{key} {value}" for key, value in method.items() if key != "name" and value not in ([], "")]
    data = f"GLUE {config.data.glue}" if config.data.glue else ", ".join(config.data.train_files)
    kind = "text-classification" if config.task == "classification" else "text-generation"
    header = [
        "---",
        "license: unknown",
        "library_name: transformers",
        f"pipeline_tag: {kind}",
        "tags:",
        "- lost",
        "---",
    ]
    rows: list[tuple[str, Any]] = [
        ("started from", config.source),
        ("task", config.task),
        ("method", ", ".join([method["name"], *settings])),
        ("data", data),
        ("steps", f"{result['last_step']:,}"),
        ("weights of step", f"{result['kept_step']:,}"),
        ("tokens seen (without padding)", f"{tokens_seen:,}"),
        ("tokens a row, at most", config.train.seq_len),
        ("rows a step", config.train.global_batch_size),
        ("optimizer", f"{optimizer['name']}, peak learning rate {optimizer['learning_rate']:g}"),
        ("seed", config.seed),
    ]
    return "\n\n".join(
        [
            "\n".join(header),
            f"# {config.task}, {method['name']}",
            f"Fine-tuned with `lost finetune`.\n\n## Training\n\n{table(rows)}",
            f"## Results\n\n{results(result)}",
            "## Limits\n\nNot aligned, not filtered, and only as good as the data above.\n",
        ]
    )


def results(result: dict[str, Any]) -> str:
    rows: list[tuple[str, Any]] = []
    if result["best_value"] is not None:
        metric = result["metric"].removeprefix("eval/")
        rows.append((f"best {metric} on the validation set", words(result["best_value"])))
    for name, metrics in result["test"].items():
        rows += [(f"{key}, {name}", words(value)) for key, value in metrics.items()]
    return table(rows) if rows else "Not evaluated."


def words(value: float | int) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
