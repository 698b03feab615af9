"""Text typed on the command line -> the plain value that the key's type asks for.

Text keys take every character as it is. A text that does not fit its type comes back as text, so that the schema's
own check names it together with all other problems.
"""

import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from lost.config.section import Section, hints_of, is_section, matches, pick

_WHOLE = re.compile(r"[+-]?\d+(_\d+)*")
_TRUE_FALSE = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_QUOTES = "\"'"
_BRACKETS = {"[": "]", "{": "}"}


def parse(text: str, hint: Any) -> Any:
    """The value of `text` for a key of type `hint`, or `text` itself where it does not fit.

    Numbers may be written 1e-3 or 1_000, a whole number also 1e9; lists [a, b] (one entry may stand alone), maps
    {name: value}; an entry in quotes may hold commas and brackets.
    """
    origin = get_origin(hint)
    if hint is str:
        return text
    if origin in (Union, types.UnionType):
        return _parse_union(text, get_args(hint))
    if origin is Literal:
        return next((option for option in get_args(hint) if str(option) == text), text)
    if origin is list:
        return _parse_list(text, get_args(hint)[0])
    if origin is dict:
        return _parse_map(text, get_args(hint)[1])
    if hint is bool:
        return _TRUE_FALSE.get(text.strip().lower(), text)
    if hint in (int, float):
        return _parse_number(text, hint)
    if hint is types.NoneType:
        return None if text.strip().lower() in ("null", "none") else text
    return text


def _parse_union(text: str, options: tuple[Any, ...]) -> Any:
    stripped = text.strip()
    # A bare word also reads as a list of one entry, so the map has to be asked first.
    if stripped.startswith("{"):
        options = tuple(sorted(options, key=lambda option: get_origin(option) is not dict))
    for option in options:
        # With `int | float` the form decides: 1 is a count, 1.0 a fraction.
        if option is int and not _WHOLE.fullmatch(stripped):
            continue
        value = parse(text, option)
        if matches(value, option):
            return value
    return text


def _parse_number(text: str, hint: type) -> Any:
    try:
        if hint is int and _WHOLE.fullmatch(text.strip()):
            return int(text)
        number = float(text)
    except ValueError:
        return text
    return int(number) if hint is int and number.is_integer() else number


def _parse_list(text: str, hint: Any) -> Any:
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        return [parse(unquoted(entry), hint) for entry in split(stripped[1:-1], ",")]
    return [parse(text, hint)] if stripped else []


def _parse_map(text: str, hint: Any) -> Any:
    stripped = text.strip()
    if not (stripped.startswith("{") and stripped.endswith("}")):
        return text
    result = {}
    for entry in split(stripped[1:-1], ","):
        name, *rest = split(entry, ":", at_most=1)
        if not rest:
            return text
        result[unquoted(name)] = parse(unquoted(rest[0]), hint)
    return result


def split(text: str, separator: str, at_most: int = -1) -> list[str]:
    """Splits at separators outside quotes and brackets; blank text has no parts.

    A quote opens only at the start of a part, so that an apostrophe inside a word is a plain character.
    """
    parts, start, closers, quote = [], 0, [], ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and text[start:position].strip(" [{") == "":
            quote = character
        elif character in _BRACKETS:
            closers.append(_BRACKETS[character])
        elif closers and character == closers[-1]:
            closers.pop()
        elif character == separator and not closers and len(parts) != at_most:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text.strip() else []


def unquoted(text: str) -> str:
    """The text without surrounding blanks and one pair of surrounding quotes."""
    stripped = text.strip()
    has_quotes = len(stripped) >= 2 and stripped[0] in _QUOTES and stripped[-1] == stripped[0]
    return stripped[1:-1] if has_quotes else stripped


def fitted(section: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """The nested values of a YAML file in the types that the keys ask for: text `1e-3` and whole floats as numbers."""
    hints = hints_of(pick(section, values))
    return {key: _fitted(value, hints[key]) if key in hints else value for key, value in values.items()}


def _fitted(value: Any, hint: Any) -> Any:
    if is_section(hint):
        return fitted(hint, value) if isinstance(value, dict) else value
    if isinstance(value, str):
        return parse(value, hint)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
