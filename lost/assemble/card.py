"""The model card of an export: from the files of the run that made the model, else from the card it came with."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from lost.assemble.facts import card_facts
from lost.assemble.load import Loaded, config_of_checkpoint, is_of_finetune, settings_in
from lost.checkpoint import CheckpointManager
from lost.checkpoint.io import read_json
from lost.config.section import to_dict
from lost.config.use import ExportConfig
from lost.export import Form, adapted_card, auto_class, lost_layers, model_card
from lost.utils.errors import CheckpointError, ConfigError


def card_of(loaded: Loaded, config: ExportConfig, form: Form) -> str:
    """The text of README.md.

    Raises:
        ConfigError: a file of `evaluations` is none of `lost evaluate`, or of another model.
    """
    evaluations = evaluation_lines(config.evaluations, loaded)
    checkpoint = checkpoint_of(loaded)
    own = loaded.place.folder / "README.md"
    if checkpoint is None:
        card = own.read_text(encoding="utf-8") if own.is_file() else bare_card(loaded)
        num_multiplied_out = len(lost_layers(loaded.model)) if form == "dense" else 0
        return adapted_card(
            card,
            form,
            config.license,
            evaluations,
            num_multiplied_out=num_multiplied_out,
            auto_name=auto_class(loaded.model).__name__,
        )
    counters, run_config = read_json(checkpoint / "state.json")["counters"], config_of_checkpoint(checkpoint)
    run_dir = loaded.place.run_dir
    assert run_dir is not None
    facts = card_facts(run_config, run_dir, counters["step"], counters["tokens_seen"])
    form_of_run: Form = "dense" if to_dict(run_config.parameterization)["name"] == "dense" else "lost"
    changes: dict[str, Any] = {} if form == form_of_run else {"form": form}
    changes |= {"license": config.license} if config.license else {}
    return model_card(loaded.model.config, dataclasses.replace(facts, evaluations=evaluations, **changes))


def checkpoint_of(loaded: Loaded) -> Path | None:
    """The checkpoint that the model is, or that `lost pretrain` saved together with final/.

    None of `lost finetune`: its final/ may be an older step's, and has a card of its own.
    """
    place = loaded.place
    if place.kind == "checkpoint":
        return place.folder
    if place.run_dir is None:
        return None
    try:
        newest = CheckpointManager(place.run_dir / "checkpoints").latest()
    except CheckpointError:
        return None
    return None if newest is None or is_of_finetune(settings_in(newest)) else newest


def bare_card(loaded: Loaded) -> str:
    return f"# {Path(loaded.origin).name}\n\nExported by `lost export` from {loaded.origin}, which has no model card.\n"


def evaluation_lines(files: list[str], loaded: Loaded) -> list[str]:
    """Lines of Markdown about what files of `lost evaluate` say of this model."""
    if not files:
        return []
    entries = [entry for file in files for entry in measures(read_result(file, loaded))]
    lines = ["| what | measure | value | standard error |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(entry) + " |" for entry in entries]
    has_perplexity = any(measure == "perplexity" for _, measure, _, _ in entries)
    exact = "; perplexity is exact: exp of the mean token loss" if has_perplexity else ""
    return [*lines, "", f"Measured by `lost evaluate`{exact}."]


def read_result(file: str, loaded: Loaded) -> dict[str, Any]:
    """What a JSON file of `lost evaluate` says of the model.

    Raises:
        ConfigError: it is no such file, or says nothing of this model.
    """
    try:
        result = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        found = {entry["origin"]: entry for entry in [result, *result["compared"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"evaluations: {file} is no JSON file of `lost evaluate` ({error!r})") from error
    for origin, entry in found.items():
        if Path(origin).expanduser().absolute() == Path(loaded.origin).absolute() or origin == loaded.origin:
            return {"setting": result, **entry}
    raise ConfigError(
        f"evaluations: {file} is about {', '.join(found)} and not about {loaded.origin}: evaluate what is exported"
    )


def measures(entry: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, measure, value, standard error) of every number."""
    setting = entry["setting"]
    rows = f"rows of {setting['seq_len']} tokens"
    if setting["stride"]:
        rows = f"windows of {setting['seq_len']} tokens, stride {setting['stride']}"
    found = [
        (f"{setting['data']['name']}: {name}, {rows}", "perplexity", number(values["perplexity"]), error_of(values))
        for name, values in entry.get("sets", {}).items()
    ]
    for name, task in entry.get("tasks", {}).items():
        what = f"{task['num_documents']:,} {name}"
        if task["num_fewshot"] is not None:
            what = f"{name}, {task['num_fewshot']}-shot, {task['num_documents']:,} questions"
        found += [(what, key, number(m["value"]), number(m["standard_error"])) for key, m in task["measures"].items()]
    return found


def error_of(values: dict[str, Any]) -> str:
    return number(values["perplexity_standard_error"])


def number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"
