"""`lost evaluate source=<run>` without a word about data takes the data that the run was trained on; convert too."""

from pathlib import Path
from typing import Any

import yaml

from lost.utils.errors import ConfigError


def run_defaults(command: str, overrides: list[str]) -> dict[str, Any]:
    """What lies over the packaged defaults and under the command line: data and seq_len of the run that made `source`.

    Empty for other commands, and where the source is no run directory and in none (an export, a hub id).

    Raises:
        ConfigError: a tokenizer, which is always the model's.
    """
    if command not in ("evaluate", "convert"):
        return {}
    if any(override.partition("=")[0] == "data.tokenizer" for override in overrides):
        raise ConfigError(f"data.tokenizer with `lost {command}`: text is read by the model's own; leave it out")
    sources = [value for key, equals, value in (o.partition("=") for o in overrides) if equals and key == "source"]
    if not sources:
        return {}
    return defaults_of(command, sources[-1].strip())


def defaults_of(command: str, source: str) -> dict[str, Any]:
    """The same of one source; empty where no run has made it."""
    config_file = config_file_of(Path(source).expanduser())
    if config_file is None:
        return {}
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
        if "method" in config:
            return of_classifier(config) if command == "evaluate" and config["task"] == "classification" else {}
        return {"data": config["data"], "seq_len": config["train"]["seq_len"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        # Loading the model says what is wrong with the run; its data is then for the command line to name.
        return {}


def of_classifier(config: dict[str, Any]) -> dict[str, Any]:
    """The run's test files, else its validation files, and how they are read."""
    data = config["data"]
    fields = {key: data[key] for key in ("text_field", "pair_field", "label_field")}
    if data["glue"]:
        from lost.finetune.labelled import GLUE

        fields |= dict(zip(("text_field", "pair_field"), GLUE[data["glue"]].columns, strict=False))
    files = data["test_files"] or data["validation_files"]
    return {"labelled": {"files": files, **fields}, "seq_len": config["train"]["seq_len"]}


def config_file_of(source: Path) -> Path | None:
    """config.yaml of the run directory that `source` is, or is the final model or a checkpoint of."""
    path = source.resolve()
    run_dir = path
    if path.name == "final":
        run_dir = path.parent
    elif path.parent.name == "checkpoints":
        run_dir = path.parent.parent
    config_file = run_dir / "config.yaml"
    return config_file if config_file.is_file() else None
