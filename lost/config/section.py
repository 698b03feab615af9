"""Config sections: keyword-only frozen dataclasses whose fields carry their doc, unit and rules.

Standard library only, so that `lost --help` stays fast and the model room imports it anywhere.
"""

import difflib
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from lost.utils.errors import ConfigError

S = TypeVar("S", bound="Section")
# An int is a count; a float above 0 and up to 1 is a fraction of what the key's doc names.
CountOrFraction = int | float
# The field to blame and the rule: see Section.cross_rules.
CrossRule = tuple[str, Callable[[], list[str]]]


@dataclass(frozen=True)
class Rule:
    """What a field means and which values it takes."""

    doc: str
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    # A resumed run must have the same value as the run that wrote the checkpoint.
    is_fixed_on_resume: bool = False

    def broken_by(self, value: Any) -> str | None:
        """The rule that `value` breaks, as words, or None."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not math.isfinite(value):
            return "must be a finite number"
        unit = f" {self.unit}" if self.unit else ""
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least:g}{unit}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most:g}{unit}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}{unit}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below:g}{unit}"
        return None


def setting(doc: str, default: Any = MISSING, **rule: Any) -> Any:
    """A dataclass field with its one-line doc and its rules (see `Rule`)."""
    metadata = {"rule": Rule(doc=doc, **rule)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections: checks every field when built and lists all problems at once.

    A section with subclasses is a choice: its `name` picks the subclass whose own `name` default equals it.
    """

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for item in fields(self):
            if hints[item.name] is float and type(getattr(self, item.name)) is int:
                object.__setattr__(self, item.name, float(getattr(self, item.name)))
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        problems = value_problems(type(self), values) or self.cross_problems()
        if problems:
            raise ConfigError(problems)

    def cross_rules(self) -> list[CrossRule]:
        """Rules between fields of this section: the field to blame, and a function that returns problems.

        A rule is one sentence: a problem of another field must not hide it (see `assessed`).
        """
        return []

    def cross_problems(self) -> list[str]:
        return [problem for _, rule in self.cross_rules() for problem in rule()]


def choices_of(section: type[Section]) -> dict[str, type[Section]]:
    """Subclasses of a choice section by their `name`, a Literal of one word; empty for a plain section."""
    found: dict[str, type[Section]] = {}
    for subclass in section.__subclasses__():
        words = get_args(hints_of(subclass).get("name"))
        if len(words) == 1:
            found[words[0]] = subclass
        # What only holds common fields of some choices is none itself.
        found |= choices_of(subclass)
    return found


def rule_of(item: Any) -> Rule:
    return item.metadata.get("rule", Rule(doc=""))


@cache
def hints_of(section: type[Section]) -> dict[str, Any]:
    """The annotated type of every field; the annotations are read once a section."""
    return get_type_hints(section)


def is_section(hint: Any) -> TypeGuard[type[Section]]:
    return isinstance(hint, type) and is_dataclass(hint) and issubclass(hint, Section)


def build(section: type[S], values: Mapping[str, Any]) -> S:
    """The typed section for nested plain values.

    Raises:
        ConfigError: lists every unknown key (with the nearest known one), wrong type and broken rule.
    """
    problems = mapping_problems(section, values)
    if problems:
        raise ConfigError(problems)
    return _construct(section, values)


def _construct(section: type[S], values: Mapping[str, Any]) -> S:
    chosen: Any = pick(section, values)
    hints = hints_of(chosen)
    arguments = {}
    for key, value in values.items():
        is_nested = is_section(hints[key]) and isinstance(value, Mapping)
        arguments[key] = _construct(hints[key], value) if is_nested else value
    return chosen(**arguments)


def pick(section: type[Section], values: Mapping[str, Any]) -> type[Section]:
    """The subclass that `values["name"]` chooses, or the section itself."""
    name = values.get("name")
    return choices_of(section).get(name, section) if isinstance(name, str) else section


def mapping_problems(section: type[Section], values: Mapping[str, Any], path: str = "") -> list[str]:
    """Every problem of nested plain values, each with its dotted key."""
    return assessed(section, values, path)[0]


def assessed(section: type[Section], values: Mapping[str, Any], path: str = "") -> tuple[list[str], Any]:
    """Every problem of nested plain values, each with its dotted key, and the section they make.

    In that section WRONG stands for each value that has a problem, so that rules on the others can still be checked.
    """
    choices = choices_of(section)
    given = values.get("name", "nothing")
    if choices and (not isinstance(given, str) or given not in choices):
        wanted = f"must be one of {', '.join(sorted(choices))}{nearest(str(given), choices)}"
        return [f"{path}name = {given}: {wanted}"], WRONG
    chosen = pick(section, values)
    known = {item.name: item for item in fields(chosen)}
    problems = [
        f"unknown key {path}{key}{nearest(key, known)}{_of_another_choice(section, chosen, key)}"
        for key in values
        if key not in known
    ]
    parts: dict[str, Any] = {}
    for key, item in known.items():
        found, parts[key] = _assessed_field(chosen, item, values, path)
        problems += found
    partial = object.__new__(chosen)
    for key, part in parts.items():
        object.__setattr__(partial, key, part)
    # All are checked before the first of their fields becomes WRONG.
    broken = [(key, problem) for key, rule in partial.cross_rules() for problem in problems_of(rule)]
    for key, problem in broken:
        problems.append(f"{path}{problem}")
        object.__setattr__(partial, key, WRONG)
    return problems, partial


def _assessed_field(section: type[Section], item: Field, values: Mapping[str, Any], path: str) -> tuple[list[str], Any]:
    """The problems of one field, and its value."""
    key, hint = item.name, hints_of(section)[item.name]
    if key not in values:
        if item.default_factory is not MISSING:
            return [], item.default_factory()
        is_missing = item.default is MISSING
        return ([f"{path}{key} is missing: {rule_of(item).doc}"], WRONG) if is_missing else ([], item.default)
    value = values[key]
    if is_section(hint):
        if isinstance(value, Mapping):
            return assessed(hint, value, f"{path}{key}.")
        return [f"{path}{key} = {value!r}: must be a group of keys"], WRONG
    problems = value_problems(section, {key: value}, path)
    return problems, WRONG if problems else value


def problems_of(rule: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What a rule finds; nothing if it needs a value that is wrong by itself."""
    try:
        return rule(*arguments)
    except WrongValue:
        return []


class WrongValue(Exception):
    """A rule used a value that has a problem of its own."""


def _refuse(*_: Any) -> Any:
    raise WrongValue


class _Wrong:
    """Stands for a wrong value; any use of it ends the rule that uses it."""

    __getattr__ = __getitem__ = __iter__ = __len__ = __contains__ = __bool__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse
    __divmod__ = __rdivmod__ = __pow__ = __rpow__ = __abs__ = __round__ = __reversed__ = _refuse
    __int__ = __float__ = __index__ = __format__ = __fspath__ = _refuse

    def __hash__(self) -> int:
        raise WrongValue

    def __str__(self) -> str:
        raise WrongValue


WRONG: Any = _Wrong()


def value_problems(section: type[Section], values: Mapping[str, Any], path: str = "") -> list[str]:
    """Wrong types and broken rules of the values given, sections left out."""
    hints = hints_of(section)
    problems = []
    for item in fields(section):
        if item.name not in values or is_section(hints[item.name]):
            continue
        value = values[item.name]
        if not matches(value, hints[item.name]):
            wanted = f"{type_words(hints[item.name])}{nearest_choice(value, hints[item.name])}"
            problems.append(f"{path}{item.name} = {value!r}: must be {wanted}")
            continue
        broken = rule_of(item).broken_by(value)
        if broken:
            problems.append(f"{path}{item.name} = {value!r}: {broken}")
    return problems


def nearest(word: str, known: Any) -> str:
    """' (did you mean X?)' for the most similar known word, or nothing."""
    found = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def nearest_choice(value: Any, hint: Any) -> str:
    return nearest(value, get_args(hint)) if get_origin(hint) is Literal and isinstance(value, str) else ""


def _of_another_choice(section: type[Section], chosen: type[Section], key: str) -> str:
    """Says which choices have the key, where the chosen one lacks it."""
    others = [n for n, c in choices_of(section).items() if c is not chosen and key in {f.name for f in fields(c)}]
    return f": it belongs to {' and '.join(others)}, and {_name_of(chosen)} is chosen" if others else ""


def _name_of(section: type[Section]) -> str:
    return " or ".join(map(str, get_args(hints_of(section).get("name")))) or section.__name__


def matches(value: Any, hint: Any) -> bool:
    """Whether a plain value has the annotated type; an int is a float, a bool is not an int."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(matches(v, get_args(hint)[0]) for v in value)
    if origin is dict:
        key_hint, value_hint = get_args(hint)
        return isinstance(value, dict) and all(
            matches(k, key_hint) and matches(v, value_hint) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is types.NoneType:
        return value is None
    return isinstance(value, hint)


def type_words(hint: Any) -> str:
    """The type as a person would say it."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(hint))
    if origin is list:
        return f"a list of {type_words(get_args(hint)[0])}"
    if origin is dict:
        return f"a map of names to {type_words(get_args(hint)[1])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "nothing" if hint in (None, types.NoneType) else str(hint))


def leaves(section: Section, path: str = "") -> Iterator[tuple[str, Any, Rule]]:
    """(dotted key, value, rule) of every field, nested sections walked."""
    for item in fields(section):
        value = getattr(section, item.name)
        if isinstance(value, Section):
            yield from leaves(value, f"{path}{item.name}.")
        else:
            yield f"{path}{item.name}", value, rule_of(item)


def to_dict(section: Section) -> dict[str, Any]:
    """Nested plain values, the inverse of `build`."""
    result: dict[str, Any] = {}
    for item in fields(section):
        value = getattr(section, item.name)
        result[item.name] = to_dict(value) if isinstance(value, Section) else value
    return result


def count_or_fraction_problem(key: str, value: CountOrFraction, of: str, minimum: int = 1) -> list[str]:
    """The problem of an int below `minimum` or a float outside (0, 1], as a list of at most one."""
    if isinstance(value, int):
        return [] if value >= minimum else [f"{key} = {value}: a count must be at least {minimum}"]
    return [] if 0 < value <= 1 else [f"{key} = {value}: a fraction of {of} must be above 0 and at most 1"]
