"""What a resumed run must share with the run that wrote the checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lost.config.section import Section, leaves
from lost.utils.errors import CheckpointError

_MISSING = object()


def fixed_keys(section: Section) -> list[str]:
    """Dotted keys that the schema marks as fixed on resume."""
    return [key for key, _, rule in leaves(section) if rule.is_fixed_on_resume]


def differences(old_config: Mapping[str, Any], new_config: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """One line for each key whose value changed, such as "model.hidden_size: checkpoint 256, now 512".

    Args:
        old_config: nested plain values, from the checkpoint.
        new_config: nested plain values, of this run.
        keys: dotted keys to compare, usually `fixed_keys(config)`. Where a group's choice (its `name`) changed, the
            other keys of the group are left out: they belong to another choice.
    """
    keys = list(keys)
    changed = [key for key in keys if not _same(_value_at(old_config, key), _value_at(new_config, key))]
    other_choices = tuple(key.removesuffix("name") for key in changed if key.endswith(".name"))
    lines = []
    for key in changed:
        if key.startswith(other_choices) and not key.endswith(".name"):
            continue
        old, new = _value_at(old_config, key), _value_at(new_config, key)
        lines.append(f"{key}: checkpoint {_words(old)}, now {_words(new)}")
    return lines


def check_same(
    old_config: Mapping[str, Any], new_config: Mapping[str, Any], keys: Iterable[str], checkpoint: str | Path
) -> None:
    """Refuses to resume where a fixed key changed.

    Raises:
        CheckpointError: lists every difference.
    """
    lines = differences(old_config, new_config, keys)
    if lines:
        listed = "\n".join(f"  - {line}" for line in lines)
        raise CheckpointError(
            f"{checkpoint} was made by a run with other settings, so it cannot go on:\n{listed}\n"
            "Use the checkpoint's values, or choose another run_dir"
            " (source=<run_dir> starts a new run from its weights)."
        )


def _value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return _MISSING
        config = config[part]
    return config


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return list(old) == list(new)
    return old is new or (old is not _MISSING and new is not _MISSING and old == new)


def _words(value: Any) -> str:
    if value is _MISSING:
        return "has none"
    return repr(value) if value == "" or isinstance(value, list | dict) else str(value)
