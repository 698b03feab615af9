"""Packaged YAML + choices + overrides -> one typed, checked config. The only file that knows Hydra and OmegaConf."""

import copy
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_origin

import yaml

from lost.config.choices import ALIASES, ROOTS, choices, config_folder, groups, known_keys
from lost.config.section import build, hints_of, is_section, nearest, pick
from lost.config.validate import Rule, all_problems
from lost.config.values import fitted, parse
from lost.utils.errors import ConfigError

_REFERENCE = re.compile(r"\\?\$\{([^{}]*)\}")
_MARK = re.compile("\ue000(\\d+)\ue001")


@dataclass
class Request:
    """What the overrides ask for, and what is wrong with them."""

    chosen: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, ...], Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def compose(
    command: str,
    overrides: list[str],
    config_file: str | None = None,
    more_rules: Sequence[Rule] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """The typed config of a command.

    Args:
        command: a key of `lost.config.choices.ROOTS`.
        overrides: `key=value` or `group=choice`, later ones win.
        config_file: a YAML file (for instance a run's config.yaml) that lies over the packaged defaults and under
            the overrides.
        more_rules: rules on top of those of `lost.config.validate`.
        defaults: nested plain values that stand in for a config file where there is none.
    Raises:
        ConfigError: lists every unknown key and choice, wrong type and broken rule.
    """
    section, _ = ROOTS[command]
    request = read_overrides(command, overrides)
    from_file = _read_config_file(config_file) if config_file else dict(defaults or {})
    if config_file and "experiment" in request.chosen:
        experiment = request.chosen.pop("experiment")
        request.problems.append(
            f"experiment={experiment} with --config-file: the file already holds every value; leave one of them out"
        )
    values = fitted(section, _composed(command, request, from_file))
    problems = request.problems + all_problems(command, section, values, more_rules)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return build(section, values)


def read_overrides(command: str, overrides: list[str]) -> Request:
    """Sorts overrides into choices of groups and values of keys; whatever is neither becomes a problem."""
    request = Request()
    for override in overrides:
        name, equals, text = override.partition("=")
        key = name.strip().lstrip("+")
        if key.startswith("~"):
            request.problems.append(f"{override}: a setting cannot be removed; give it a value, {key[1:]}=...")
        elif key.startswith("-"):
            asked = key.lstrip("-").replace("-", "_")
            request.problems.append(
                f"unknown option {key}{_nearest_key(command, asked)}: settings are written key=value"
            )
        elif not equals:
            request.problems.append(f"{override!r} has no '=': settings are written key=value")
        elif key in groups(command):
            _choose(command, request, key, text.strip())
        else:
            _set(command, request, key, text)
    _one_length(command, request)
    return request


def _choose(command: str, request: Request, group: str, choice: str) -> None:
    choice = ALIASES.get((group, choice), choice)
    known = choices(command, group)
    if choice in known:
        request.chosen[group] = choice
    else:
        request.problems.append(f"{group}={choice}: must be one of {', '.join(known)}{nearest(choice, known)}")


def _set(command: str, request: Request, key: str, text: str) -> None:
    known = known_keys(command)
    if key in known and not is_section(known[key]):
        request.values[tuple(key.split("."))] = parse(text, known[key])
        return
    if key in known:
        inside = ", ".join(name for name in known if name.startswith(f"{key}."))
        request.problems.append(f"{key}={text}: {key} is a group of keys, set one of them: {inside}")
        return
    # An entry of a map: the rest of the key, dots included, is the entry's name.
    for name, hint in known.items():
        entry_hint = _entry_hint(hint)
        if key.startswith(f"{name}.") and entry_hint is not None:
            request.values[(*name.split("."), key.removeprefix(f"{name}."))] = parse(text, entry_hint)
            return
    request.problems.append(f"unknown key {key}{_nearest_key(command, key)}")


def _one_length(command: str, request: Request) -> None:
    """Whoever types only one length means it: those of the experiment or the defaults must not end the run before."""
    if ("train", "max_tokens") in request.values:
        request.values.setdefault(("train", "max_steps"), 0)
    if "train.num_epochs" in known_keys(command) and ("train", "max_steps") in request.values:
        request.values.setdefault(("train", "num_epochs"), 0.0)


def _entry_hint(hint: Any) -> Any:
    """The type of a map's entries, or None for what is no map."""
    options = [hint, *getattr(hint, "__args__", ())]
    return next((option.__args__[1] for option in options if get_origin(option) is dict), None)


def _nearest_key(command: str, key: str) -> str:
    """' (did you mean X?)' among the dotted keys: one with the same last word before one with a similar one."""
    known = [name for name, hint in known_keys(command).items() if not is_section(hint)]
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    if same:
        return f" (did you mean {' or '.join(same)}?)"
    inside = [name for name in known if name.startswith(f"{key.rpartition('.')[0]}.")]
    if inside:
        # Of the last words, because the group's name alone would make every key there similar.
        by_word = {name.rpartition(".")[2]: name for name in inside}
        word = re.search(r"did you mean (.*)\?", nearest(last, by_word))
        return f" (did you mean {by_word[word[1]]}?)" if word else f": the keys there are {', '.join(inside)}"
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    found = nearest(key, [*known, *groups(command)])
    if found:
        return found
    similar = re.search(r"did you mean (.*)\?", nearest(last, by_last))
    return f" (did you mean {by_last[similar[1]]}?)" if similar else ""


def _read_config_file(config_file: str) -> dict[str, Any]:
    path = Path(config_file).expanduser()
    if path.is_dir():
        raise ConfigError(f"--config-file {config_file} is a folder: name its config.yaml")
    if not path.is_file():
        raise ConfigError(f"--config-file {config_file}: there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--config-file {config_file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config-file {config_file}: must hold a map of keys, for instance a run's config.yaml")
    return {str(key): value for key, value in content.items()}


def _composed(command: str, request: Request, from_file: dict[str, Any]) -> dict[str, Any]:
    """Nested plain values: packaged defaults, the config file, the overrides; every interpolation resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen = _choices_of_file(command, from_file) | request.chosen
    tree = copy.deepcopy(_packaged(ROOTS[command][1], tuple(chosen.items())))
    _drop_foreign_keys(command, tree, request.chosen)
    marks = Marks(known_keys(command))
    for key, value in from_file.items():
        # A choice on the command line replaces the whole section that the file holds.
        if key not in request.chosen:
            _lay_over(tree, key, marks.protected(value), is_whole=_is_own_choice(command, key, value))
    for path, value in request.values.items():
        _set_at(tree, path, marks.protected(value))
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from error
    return marks.restored(_without_missing(plain))


def _drop_foreign_keys(command: str, tree: Any, typed: dict[str, str]) -> None:
    """Drops what an experiment says about a choice of its own that the command line has replaced by another one."""
    for group in typed:
        hint = hints_of(ROOTS[command][0]).get(group)
        if is_section(hint):
            known = hints_of(pick(hint, tree[group]))
            for key in [key for key in tree[group] if key not in known]:
                del tree[group][key]


@cache
def _packaged(root: str, chosen: tuple[tuple[str, str], ...]) -> Any:
    """The packaged files of a root with these choices, composed by Hydra, interpolations unresolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        tree = hydra_compose(root, [f"{group}={choice}" for group, choice in chosen])
    OmegaConf.set_struct(tree, False)
    return tree


def _lay_over(tree: Any, key: str, value: Any, is_whole: bool) -> None:
    """Puts a value of a file into the tree: maps are merged, unless the map is whole by itself."""
    from omegaconf import OmegaConf

    is_merged = isinstance(value, dict) and not is_whole and OmegaConf.is_dict(tree.get(key))
    tree[key] = OmegaConf.merge(tree[key], value) if is_merged else value


def _set_at(tree: Any, path: tuple[str, ...], value: Any) -> None:
    from omegaconf import OmegaConf

    node = tree
    for part in path[:-1]:
        if not OmegaConf.is_dict(node.get(part)):
            node[part] = {}
        node = node[part]
    node[path[-1]] = value


def _without_missing(value: Any) -> Any:
    """The tree without keys that still hold `???`, so that the schema reports them as missing."""
    if not isinstance(value, dict):
        return value
    return {key: _without_missing(entry) for key, entry in value.items() if entry != "???"}


def _choices_of_file(command: str, from_file: dict[str, Any]) -> dict[str, str]:
    """The choice of each group that the file's `name` keys pick; the file itself stands for the experiment."""
    if not from_file:
        return {}
    chosen = {"experiment": "custom"} if "experiment" in groups(command) else {}
    for group in groups(command):
        section = from_file.get(group)
        name = section.get("name") if isinstance(section, dict) else None
        if group != "experiment" and name in choices(command, group):
            chosen[group] = name
    return chosen


def _is_own_choice(command: str, key: str, value: Any) -> bool:
    """Whether a section of a file has a `name` of its own, so that no packaged choice lies under it."""
    has_name = isinstance(value, dict) and "name" in value and key in groups(command)
    return has_name and value["name"] not in choices(command, key)


class Marks:
    """Stand-ins that mean nothing to OmegaConf, so that text may hold any character (`${`, `???`, quotes).

    Only `${key}` of a known key stays an interpolation; `\\${key}` is the text `${key}`.
    """

    def __init__(self, known: Container[str]):
        self.known = known
        self.texts: list[str] = []

    def protected(self, value: Any) -> Any:
        """The nested value with every text swapped for a mark."""
        if isinstance(value, list):
            return [self.protected(entry) for entry in value]
        if isinstance(value, dict):
            # The schema knows no key but text, and names the others as unknown.
            return {self._mark_name(name): self.protected(entry) for name, entry in value.items()}
        return self._protected_text(value) if isinstance(value, str) else value

    def restored(self, value: Any) -> Any:
        """The nested value with every mark swapped back for its text."""
        if isinstance(value, list):
            return [self.restored(entry) for entry in value]
        if isinstance(value, dict):
            return {self.restored(name): self.restored(entry) for name, entry in value.items()}
        return _MARK.sub(lambda mark: self.texts[int(mark[1])], value) if isinstance(value, str) else value

    def _protected_text(self, text: str) -> str:
        result, position = "", 0
        for reference in _REFERENCE.finditer(text):
            if reference[1] in self.known:
                is_text = reference[0].startswith("\\")
                result += self._mark(text[position : reference.start()])
                result += self._mark(reference[0][1:]) if is_text else reference[0]
                position = reference.end()
        return result + self._mark(text[position:])

    def _mark_name(self, name: Any) -> str:
        # Keys of sections must stay readable: they are merged with those of the packaged files.
        return str(name) if str(name).isidentifier() else self._mark(str(name))

    def _mark(self, text: str) -> str:
        self.texts.append(text)
        return f"\ue000{len(self.texts) - 1}\ue001"
