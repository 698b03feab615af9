"""The front door: `lost <command> [group=choice] [key=value] [--config-file FILE]`.

Exit status: 0 success; 2 a mistake of the user's (one message, no traceback); 1 a failure while running; 130 Ctrl-C.
A command raises TrainingError for what goes wrong after its work began, any other LostError for a mistake.
"""

import importlib
import os
import sys
from types import ModuleType

from lost.cli.commands import COMMANDS, POSITIONAL
from lost.config.section import nearest
from lost.utils.errors import ConfigError, LostError, LostProcessError, TrainingError
from lost.utils.launcher import tied_to_launcher


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with tied_to_launcher():
            return _dispatch(arguments)
    except TrainingError as error:
        return _stopped(arguments, error, 1)
    except LostError as error:
        return _stopped(arguments, error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`lost --help | head`); keep Python from saying so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("--version", "-V"):
        from lost import __version__

        print(f"lost {__version__}")
        return 0
    if command in ("--help", "-h"):
        from lost.cli.help import print_overview

        print_overview()
        return 0
    if command not in COMMANDS:
        raise ConfigError(
            f"unknown command {command}{nearest(command, COMMANDS)}: must be one of {', '.join(COMMANDS)}"
        )
    if "--help" in rest or "-h" in rest:
        from lost.cli.help import print_command

        print_command(command)
        return 0
    overrides, config_file = _parse_arguments(command, rest)
    from lost.cli.checks import LAYER_RULES
    from lost.cli.reach import require_reachable
    from lost.cli.run_defaults import run_defaults
    from lost.config.compose import compose

    config = compose(command, overrides, config_file, LAYER_RULES, run_defaults(command, overrides))
    require_reachable(command, config)
    return module_of(command).run(config)


def module_of(command: str) -> ModuleType:
    """The module whose `run(config)` carries out a command; imported only now, because it loads torch."""
    return importlib.import_module(f"lost.cli.{command}")


def _parse_arguments(command: str, arguments: list[str]) -> tuple[list[str], str | None]:
    """Overrides and the value of --config-file."""
    overrides: list[str] = []
    config_file = None
    remaining = iter(arguments)
    for position, argument in enumerate(remaining):
        if argument.startswith("--config-file="):
            config_file = argument.partition("=")[2]
        elif argument == "--config-file":
            config_file = next(remaining, None)
            if config_file is None:
                raise ConfigError("--config-file needs a file, for instance --config-file <run_dir>/config.yaml")
        elif position == 0 and command in POSITIONAL and "=" not in argument and not argument.startswith("-"):
            overrides.append(f"{POSITIONAL[command]}={argument}")
        else:
            overrides.append(argument)
    return overrides, config_file


def _stopped(arguments: list[str], error: LostError, status: int) -> int:
    """Prints the message, once for all processes of a launch (unless they have lost each other)."""
    if os.environ.get("RANK", "0") == "0" or isinstance(error, LostProcessError):
        words = " ".join(["lost", *(word for word in arguments[:1] if word in COMMANDS)])
        hint = f"\n'{words} --help' lists what there is." if isinstance(error, ConfigError) else ""
        print(f"{words}: {error}{hint}", file=sys.stderr)
    return status
