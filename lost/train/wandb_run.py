"""The wandb mirror of metrics.jsonl: offline by default, and online without ever waiting long for a network."""

import functools
import importlib.util
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lost.config.runtime import LoggingConfig
from lost.utils.errors import ConfigError
from lost.utils.logging import get_logger

logger = get_logger(__name__)

Mode = Literal["online", "offline"]
_DEFAULT_API = "https://api.wandb.ai"
_ANSWER_SECONDS = 5.0
_LOGIN_SECONDS = 30.0
_FINISH_SECONDS = 60.0


class WandbRun:
    """A started wandb run. A failure of wandb is reported once and ends the mirror, never the training.

    wandb's failures have no common base class (its own errors, those of its service process, those of sockets), hence
    the broad excepts in this file.
    """

    def __init__(self, run: Any):
        self._run = run

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends a line's values under its step; values that are null are left out."""
        if self._run is None:
            return
        values = {key: value for key, value in line.items() if key != "step" and value is not None}
        try:
            self._run.log(values, step=line["step"])
        except Exception as error:
            logger.warning("wandb failed at step %s, metrics.jsonl goes on alone: %s", line["step"], error)
            self._run = None

    def finish(self) -> None:
        """Ends the run; gives up waiting for uploads after a minute (`wandb sync` sends them later)."""
        if self._run is None:
            return
        if not _ends_in_time(functools.partial(_finish, self._run), _FINISH_SECONDS):
            logger.warning(
                "wandb still uploads after %.0f s and is left alone; `wandb sync` sends the rest", _FINISH_SECONDS
            )
        self._run = None


def start_wandb(run_dir: Path, config: LoggingConfig, run_config: Mapping[str, Any]) -> WandbRun | None:
    """Starts (or, in a resumed run directory, goes on with) the wandb run that `config` asks for.

    logging=offline writes files below run_dir and needs no network; where wandb is not installed or does not start it
    says so and does nothing. logging=wandb goes online; where the server does not answer, nobody is logged in or the
    login fails it says so and goes offline.

    Raises:
        ConfigError: logging=wandb and the package is not installed.
    """
    if config.name == "none":
        return None
    if importlib.util.find_spec("wandb") is None:
        if config.name == "wandb":
            raise ConfigError("logging=wandb needs the package wandb: pip install wandb, or use logging=none")
        logger.warning("wandb is not installed: metrics go to metrics.jsonl and plots only")
        return None
    if config.name == "wandb":
        obstacle = _obstacle()
        if obstacle is None:
            try:
                return _start(run_dir, config.project, run_config, "online")
            except Exception as error:
                obstacle = str(error)
                # The failed start keeps the run's id taken until wandb's service process is gone.
                _ends_in_time(_teardown, _ANSWER_SECONDS)
        logger.warning("wandb goes offline: %s. `wandb sync` can send the run later", obstacle)
    try:
        return _start(run_dir, config.project, run_config, "offline")
    except Exception as error:
        logger.warning("wandb did not start, metrics go to metrics.jsonl and plots only: %s", error)
        return None


def _start(run_dir: Path, project: str, run_config: Mapping[str, Any], mode: Mode) -> WandbRun:
    import wandb

    run = wandb.init(
        mode=mode,
        project=project,
        name=run_dir.name,
        id=_run_id(run_dir),
        # Offline runs cannot be resumed: their files are joined by the id when they are sent.
        resume="allow" if mode == "online" else None,
        dir=str(run_dir),
        config=dict(run_config),
        settings=wandb.Settings(silent=True, console="off", init_timeout=_LOGIN_SECONDS),
    )
    return WandbRun(run)


def _finish(run: Any) -> None:
    try:
        run.finish()
    except Exception as error:
        logger.warning("wandb did not finish its run: %s", error)


def _teardown() -> None:
    import wandb

    wandb.teardown()


def _run_id(run_dir: Path) -> str:
    """The run's wandb id, kept in the run directory, so that a resumed run is the same run for wandb."""
    path = run_dir / "wandb" / "run_id.txt"
    if not path.is_file() or not path.read_text().strip():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _obstacle() -> str | None:
    """Why wandb cannot go online here, or None."""
    wished = os.environ.get("WANDB_MODE", "online")
    if wished != "online":
        return f"WANDB_MODE={wished} is set"
    api = os.environ.get("WANDB_BASE_URL", _DEFAULT_API)
    if not _answers(api):
        return f"{api} does not answer within {_ANSWER_SECONDS:.0f} s"
    if not _is_logged_in():
        return "nobody is logged in or the key was refused (`wandb login`, or set WANDB_API_KEY)"
    return None


def _is_logged_in() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False, timeout=int(_ANSWER_SECONDS)))
    except wandb.Error:
        return False


def _answers(url: str) -> bool:
    """Whether the server sends any HTTP answer in time, through the proxy of the environment if there is one."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError):
            return
        answered.set()

    # In a thread, because looking a name up has no time limit of its own.
    _ends_in_time(ask, _ANSWER_SECONDS)
    return answered.is_set()


def _ends_in_time(action: Callable[[], None], seconds: float) -> bool:
    """Runs an action that may hang; leaves it behind after `seconds`."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
