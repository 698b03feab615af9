"""`lost --help` and `lost <command> --help`: what exists, from the schema and the packaged YAML. No torch, no Hydra."""

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lost.cli.commands import COMMANDS, POSITIONAL
from lost.config.choices import ROOTS, choices, default_values, groups, read_yaml
from lost.config.section import Section, choices_of, hints_of, is_section, rule_of, type_words

# Columns of text that goes to a file or a pipe.
PIPE_WIDTH = 120


def print_overview() -> None:
    """The commands, one line each, and how to go on."""
    _print_as_text(_write_overview)


def print_command(command: str) -> None:
    """The groups of a command with their choices, then every setting."""
    _print_as_text(lambda console: _write_command(console, command))


def _print_as_text(write: Callable[[Console], None]) -> None:
    """Prints what `write` renders, styled on a terminal, without the blanks that fill up table cells."""
    is_wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if is_wide else PIPE_WIDTH)
    with console.capture() as capture:
        write(console)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def _write_overview(console: Console) -> None:
    console.print("[bold]lost[/] <command> \\[group=choice] \\[key=value] \\[--config-file FILE]\n", highlight=False)
    table = _table()
    for name, line in COMMANDS.items():
        table.add_row(f"[bold]{name}[/]", line)
    console.print(Padding(table, (0, 0, 1, 2)))
    _print_groups(console, "pretrain", "Groups of pretrain, prepare and plan")
    for line in (
        "lost <command> --help   its groups, choices and settings with defaults and units",
        "lost --version          the version",
        "several processes       torchrun --standalone --nproc-per-node N -m lost <command> ...",
        "exit status             0 done, 2 a mistake in what was asked, 1 a failure while running",
    ):
        console.print(escape(line), highlight=False)


def _write_command(console: Console, command: str) -> None:
    word = f" \\[{POSITIONAL[command]}]" if command in POSITIONAL else ""
    console.print(
        f"[bold]lost {command}[/]{word} \\[group=choice] \\[key=value] \\[--config-file FILE]", highlight=False
    )
    console.print(f"{COMMANDS[command]}\n", highlight=False)
    if groups(command):
        _print_groups(console, command, "Groups")
    section, _ = ROOTS[command]
    values = default_values(command)
    own = [item.name for item in fields(section) if not is_section(hints_of(section)[item.name])]
    if own:
        console.print("[bold]Settings[/] (key, type, default, meaning)", highlight=False)
        _print_keys(console, section, own, values, "")
    for key, hint in hints_of(section).items():
        if is_section(hint):
            _print_section(console, command, key, hint, values.get(key, {}))
    console.print(
        "--config-file FILE lies over the defaults and under what is typed: a run's own config.yaml repeats the run.\n"
        "Text may hold any character; ${key} in it stands for another setting. Lists: \\[a,b]; maps: {name: value}.",
        highlight=False,
    )


def _table() -> Table:
    return Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))


def _print_groups(console: Console, command: str, title: str) -> None:
    console.print(f"[bold]{title}[/] (* = default)", highlight=False)
    table = _table()
    chosen = groups(command)
    for group in chosen:
        names = [f"[bold]{name}*[/]" if name == chosen[group] else name for name in choices(command, group)]
        table.add_row(f"{group}=", " | ".join(names))
    console.print(Padding(table, (0, 0, 1, 2)))


def _print_section(console: Console, command: str, key: str, hint: type[Section], values: dict[str, Any]) -> None:
    """The keys of the default choice, then those that only other choices have."""
    variants = choices_of(hint)
    default = variants.get(values.get("name", ""), hint)
    title = f"[bold]{key}[/]  {escape(_first_line(hint))}"
    console.print(f"{title} [dim]({key}={values['name']})[/]" if variants else title, highlight=False)
    shown = [item.name for item in fields(default) if not (item.name == "name" and key in groups(command))]
    _print_keys(console, default, shown, values, f"{key}.")
    for name, variant in variants.items():
        if variant is default or name not in choices(command, key):
            continue
        own = read_yaml(f"{key}/{name}")
        more = [
            item.name
            for item in fields(variant)
            if item.name != "name" and (item.name not in shown or own.get(item.name) != values.get(item.name))
        ]
        console.print(f"  [dim]with[/] [bold]{key}={name}[/]  {escape(_first_line(variant))}", highlight=False)
        _print_keys(console, variant, more, own, f"{key}.")


def _print_keys(console: Console, section: type[Section], names: list[str], values: dict[str, Any], path: str) -> None:
    hints = hints_of(section)
    table = _table()
    table.add_column(no_wrap=True, min_width=24)
    table.add_column(max_width=26)
    table.add_column(max_width=24, overflow="fold")
    table.add_column()
    for item in fields(section):
        if item.name not in names:
            continue
        rule = rule_of(item)
        unit = f" \\[{rule.unit}]" if rule.unit else ""
        table.add_row(
            f"{path}{item.name}",
            escape(_type_text(hints[item.name])),
            escape(_default_text(values.get(item.name, "???"))),
            f"{escape(rule.doc)}{unit}",
        )
    console.print(Padding(table, (0, 0, 1, 2)))


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _type_text(hint: Any) -> str:
    """The type in few words: choices as a | b."""
    if get_origin(hint) is Literal:
        return " | ".join(str(option) for option in get_args(hint))
    words = "count or fraction" if hint == int | float else type_words(hint)
    return words.replace("a whole number or a number", "count or fraction").removeprefix("a ")


def _default_text(value: Any) -> str:
    """The default as it would be typed; interpolations name the key they follow."""
    if value == "???":
        return "required"
    if value == "":
        return "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        is_reference = value.startswith("${") and value.count("${") == 1 and value.endswith("}")
        return f"= {value[2:-1].lstrip('.')}" if is_reference else value
    return str(value)
