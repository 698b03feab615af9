"""The exceptions that a user's mistake raises. Each message names the value, the rule and the fix."""

from collections.abc import Sequence


class LostError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback."""


class ConfigError(LostError, ValueError):
    """One or more wrong settings, all listed in one message.

    Args:
        problems: one sentence a problem, or one string.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the configuration:\n"
        super().__init__(head + "\n".join(p if count == 1 else f"  - {p}" for p in self.problems))


class DataError(LostError):
    """A data source that cannot be read as asked."""


class InterruptedDataError(DataError):
    """Reading or tokenising broke off for a reason outside the data: what is done so far stays for the next start."""


class CheckpointError(LostError):
    """A checkpoint that is missing, damaged or made by a run that differs."""


class ShapeError(LostError, ValueError):
    """A tensor or module whose shape breaks a rule."""


class TrainingError(LostError):
    """Training that cannot go on, for instance after too many non-finite steps."""


class LostProcessError(TrainingError):
    """Processes of a run that no longer answer each other. Each says so, since the first may be the silent one."""


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
