"""Which groups a command has, which choices a group has, and what the packaged YAML files say. Reads YAML, no Hydra."""

import importlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml

from lost.config import schema, use
from lost.config.convert import ConvertConfig
from lost.config.finetune import FinetuneConfig
from lost.config.section import Section, choices_of, hints_of, is_section

# The typed root of each command and the YAML file (without .yaml) that it starts from.
ROOTS: dict[str, tuple[type[Section], str]] = {
    "pretrain": (schema.PretrainConfig, "pretrain"),
    "prepare": (schema.PretrainConfig, "pretrain"),
    "evaluate": (use.EvaluateConfig, "evaluate"),
    "generate": (use.GenerateConfig, "generate"),
    "export": (use.ExportConfig, "export"),
    "convert": (ConvertConfig, "convert"),
    "finetune": (FinetuneConfig, "finetune"),
    "plan": (schema.PlanConfig, "plan"),
    "bench": (schema.BenchConfig, "bench"),
}

# `experiment=none` is another word for the experiment that changes nothing.
ALIASES = {("experiment", "none"): "custom"}


@cache
def config_folder() -> Path:
    """The folder of the packaged YAML files: configs/ in a checkout, lost_configs in a wheel."""
    return Path(importlib.import_module("lost_configs").__path__[0])


@cache
def read_yaml(name: str) -> dict[str, Any]:
    """The plain content of one packaged file, interpolations as written; `name` is relative and has no suffix."""
    text = (config_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text) or {}


def groups(command: str) -> dict[str, str]:
    """Each group of a command with its default choice, in the order of the root's defaults list."""
    entries = read_root(ROOTS[command][1])["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def read_root(name: str) -> dict[str, Any]:
    """The content of a root file over that of the roots that its defaults list names."""
    content = {"defaults": [], **read_yaml(name)}
    bases = [entry for entry in content["defaults"] if isinstance(entry, str) and entry != "_self_"]
    for base in bases:
        under = read_root(base)
        content = merged(under, content) | {"defaults": under["defaults"] + content["defaults"]}
    return content


def choices(command: str, group: str) -> list[str]:
    """The choices of a group that the command's schema allows, sorted by name and number."""
    found = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
    hint = hint_of(ROOTS[command][0], group)
    if is_section(hint) and not choices_of(hint):
        # A section without subclasses may still fix its `name`, as bench takes no other parameterization than lost.
        allowed = get_args(hints_of(hint).get("name"))
        found = [name for name in found if not allowed or name in allowed]
    return sorted(found, key=_size)


def _size(name: str) -> tuple[str, float, str]:
    """Sorts llama_60m before llama_130m before llama_1b."""
    stem, _, last = name.rpartition("_")
    scale = {"m": 1e6, "b": 1e9}.get(last[-1:], 0.0)
    return (stem, scale * float(last[:-1]), name) if scale and last[:-1].isdigit() else (stem, 0.0, name)


def hint_of(section: type[Section], key: str) -> Any:
    """The annotated type of a field of a section."""
    return hints_of(section).get(key)


def default_values(command: str) -> dict[str, Any]:
    """Nested default values as the YAML files write them, interpolations unresolved (`${model.lineage_rank}`)."""
    root = {key: value for key, value in read_root(ROOTS[command][1]).items() if key != "defaults"}
    values: dict[str, Any] = {}
    chosen = groups(command)
    experiment = read_yaml(f"experiment/{chosen['experiment']}") if "experiment" in chosen else {}
    for entry in experiment.get("defaults", []):
        chosen |= {key.removeprefix("override /"): choice for key, choice in entry.items()}
    for group, choice in chosen.items():
        if group != "experiment":
            values[group] = dict(read_yaml(f"{group}/{choice}"))
    for layer in (root, {key: value for key, value in experiment.items() if key != "defaults"}):
        values = merged(values, layer)
    return values


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over` on top, nested maps merged."""
    result = dict(under)
    for key, value in over.items():
        both_maps = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both_maps else value
    return result


@cache
def known_keys(command: str) -> dict[str, Any]:
    """Every dotted key that some choice of the command has, with its annotated type; sections included."""
    found: dict[str, Any] = {}
    _collect(ROOTS[command][0], "", found)
    return found


def _collect(section: type[Section], path: str, found: dict[str, Any]) -> None:
    for variant in [section, *choices_of(section).values()]:
        hints = hints_of(variant)
        for item in fields(variant):
            key = f"{path}{item.name}"
            found.setdefault(key, hints[item.name])
            if is_section(hints[item.name]):
                _collect(hints[item.name], f"{key}.", found)
