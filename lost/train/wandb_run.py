"""The wandb mirror of metrics.jsonl: offline by default, and online without ever waiting for a network."""

import importlib.util
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lost.config.schema import LoggingConfig
from lost.utils.errors import ConfigError
from lost.utils.logging import get_logger

logger = get_logger(__name__)

Mode = Literal["online", "offline"]
_DEFAULT_API = "https://api.wandb.ai"
_REACHABLE_SECONDS = 3.0
_LOGIN_SECONDS = 30.0
_FINISH_SECONDS = 60.0


class WandbRun:
    """A started wandb run."""

    def __init__(self, run: Any):
        self._run = run

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends a line's values under its step; values that are null are left out."""
        values = {key: value for key, value in line.items() if key != "step" and value is not None}
        self._run.log(values, step=line["step"])

    def finish(self) -> None:
        """Ends the run; gives up waiting for uploads after a minute (`wandb sync` sends them later)."""
        finishing = threading.Thread(target=self._run.finish, daemon=True)
        finishing.start()
        finishing.join(_FINISH_SECONDS)
        if finishing.is_alive():
            logger.warning(
                "wandb did not finish uploading within %.0f s; `wandb sync` can send the rest", _FINISH_SECONDS
            )


def start_wandb(run_dir: Path, config: LoggingConfig, run_config: Mapping[str, Any]) -> WandbRun | None:
    """Starts (or, in a resumed run directory, goes on with) the wandb run that `config` asks for.

    logging=offline writes files below run_dir and needs no network; without the wandb package it says so and does
    nothing. logging=wandb goes online; where the server cannot be reached or nobody is logged in it says so and goes
    offline.

    Raises:
        ConfigError: logging=wandb and the package is not installed.
    """
    if config.name == "none":
        return None
    if importlib.util.find_spec("wandb") is None:
        if config.name == "wandb":
            raise ConfigError("logging=wandb needs the package wandb: pip install wandb, or use logging=none")
        logger.warning("wandb is not installed: metrics go to metrics.jsonl and plots only (logging=none says so too)")
        return None
    mode: Mode = "offline"
    if config.name == "wandb":
        obstacle = _obstacle()
        if obstacle is None:
            mode = "online"
        else:
            logger.warning("wandb goes offline: %s; `wandb sync` can send the run later", obstacle)
    return _start(run_dir, config.project, run_config, mode)


def _start(run_dir: Path, project: str, run_config: Mapping[str, Any], mode: Mode) -> WandbRun:
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=_LOGIN_SECONDS)
    arguments: dict[str, Any] = {
        "project": project,
        "name": run_dir.name,
        "id": _run_id(run_dir),
        "resume": "allow" if mode == "online" else None,
        "dir": str(run_dir),
        "config": dict(run_config),
        "settings": settings,
    }
    try:
        return WandbRun(wandb.init(mode=mode, **arguments))
    except wandb.Error as error:
        if mode == "offline":
            raise
        logger.warning("wandb goes offline: %s; `wandb sync` can send the run later", error)
        return WandbRun(wandb.init(mode="offline", **{**arguments, "resume": None}))


def _run_id(run_dir: Path) -> str:
    """The run's wandb id, kept in the run directory, so that a resumed run is the same run for wandb."""
    path = run_dir / "wandb" / "run_id.txt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _obstacle() -> str | None:
    """Why wandb cannot go online here, or None."""
    import wandb

    wished = os.environ.get("WANDB_MODE", "online")
    if wished != "online":
        return f"WANDB_MODE={wished} is set"
    api = os.environ.get("WANDB_BASE_URL", _DEFAULT_API)
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if not _is_reachable(proxy or api):
        return f"{proxy or api} cannot be reached within {_REACHABLE_SECONDS:.0f} s"
    if not wandb.api.api_key:
        return "nobody is logged in (`wandb login`, or set WANDB_API_KEY)"
    return None


def _is_reachable(url: str) -> bool:
    """Whether a connection opens in time. In a thread, because looking a name up has no time limit of its own."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname, port), timeout=_REACHABLE_SECONDS).close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_REACHABLE_SECONDS)
    return answered.is_set()
