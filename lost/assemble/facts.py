"""The facts of a model card, from the config and the files of the run directory."""

import json
from pathlib import Path
from typing import Any

from lost.accounting import count_parameters
from lost.config.model import DenseConfig
from lost.config.schema import PretrainConfig
from lost.config.section import to_dict
from lost.export import CardFacts
from lost.utils.metrics_file import read_metrics


def card_facts(config: PretrainConfig, run_dir: Path, step: int, tokens_seen: int) -> CardFacts:
    """What the card of the run's model at `step` says; the validation is the last one up to that step."""
    optimizer, schedule = to_dict(config.optimizer), to_dict(config.schedule)
    lines = read_metrics(run_dir / "metrics.jsonl")
    evaluations = [line for line in lines if "eval/loss" in line and line["step"] <= step]
    packages = read_if_there(run_dir / "versions.json").get("packages", {})
    return CardFacts(
        name=f"{config.model.name}, {to_dict(config.parameterization)['name']}, {config.experiment}",
        parameterization=to_dict(config.parameterization),
        num_parameters=count_parameters(config.model, config.parameterization),
        num_dense_parameters=count_parameters(config.model, DenseConfig()),
        data=data_words(config, run_dir),
        steps=step,
        tokens_seen=tokens_seen,
        seq_len=config.train.seq_len,
        global_batch_size=config.train.global_batch_size,
        learning_rate=optimizer["learning_rate"],
        optimizer=optimizer["name"],
        schedule=schedule["name"],
        seed=config.seed,
        validation=validation_facts(evaluations[-1]) if evaluations else {},
        versions={name: version for name, version in packages.items() if version},
    )


def data_words(config: PretrainConfig, run_dir: Path) -> str:
    """'stdlib (734 documents), packed rows'."""
    data = to_dict(config.data)
    sets = read_if_there(run_dir / "data.json").get("sets", {})
    documents = sum(counts["documents"] for counts in sets.values())
    count = f" ({documents:,} documents)" if documents else ""
    return f"{data['name']}{count}, {data['row_maker']} rows"


def validation_facts(line: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Perplexities of each validation set from one evaluation line."""
    prefixes = {key.removesuffix("perplexity_lineage") for key in line if key.endswith("/perplexity_lineage")}
    names = {prefix: prefix.removeprefix("eval").strip("/") or "validation" for prefix in sorted(prefixes)}
    return {
        name: {
            "perplexity": line[f"{prefix}perplexity"],
            "perplexity_lineage": line[f"{prefix}perplexity_lineage"],
            "lineage_note": line[f"{prefix}perplexity_lineage_note"],
            "num_tokens": line[f"{prefix}tokens"],
        }
        for prefix, name in names.items()
    }


def read_if_there(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
