"""The wandb mirror never needs a network, never waits long for one, and never ends a run."""

import importlib.util
import json
import logging
import os
import socket
import threading

import pytest

from lost.config.runtime import LoggingConfig
from lost.train import wandb_run
from lost.train.metrics import MetricsLogger
from lost.utils.errors import ConfigError

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@pytest.fixture(autouse=True)
def _no_login(monkeypatch, tmp_path):
    """No credentials, no settings of this user, and messages that pytest can see."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setattr(logging.getLogger("lost"), "propagate", True)


@pytest.fixture
def silent_server():
    """An address that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(20)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_logging_none_starts_nothing(tmp_path):
    assert wandb_run.start_wandb(tmp_path, LoggingConfig(name="none"), {}) is None
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_offline_goes_on_and_online_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert wandb_run.start_wandb(tmp_path, LoggingConfig(name="offline"), {}) is None
    assert "wandb is not installed" in caplog.text
    with pytest.raises(ConfigError, match="pip install wandb"):
        wandb_run.start_wandb(tmp_path, LoggingConfig(name="wandb"), {})


def test_obstacles_to_going_online_are_named(monkeypatch, silent_server):
    monkeypatch.setattr(wandb_run, "_ANSWER_SECONDS", 0.3)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for url in (nobody, silent_server, "http://name.invalid", "no address at all"):
            monkeypatch.setenv("WANDB_BASE_URL", url)
            # The silent server would be waited for for ever.
            assert wandb_run._obstacle() == f"{url} does not answer within 0 s"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run._obstacle() == "WANDB_MODE=offline is set"


def test_a_server_that_answers_is_no_obstacle_by_itself(monkeypatch):
    monkeypatch.setattr(wandb_run, "_answers", lambda _: True)
    monkeypatch.setattr(wandb_run, "_is_logged_in", lambda: False)
    obstacle = wandb_run._obstacle()
    assert obstacle is not None
    assert "nobody is logged in" in obstacle
    monkeypatch.setattr(wandb_run, "_is_logged_in", lambda: True)
    assert wandb_run._obstacle() is None


class BrokenRun:
    """A wandb run whose service process has died."""

    num_calls = 0

    def log(self, *_, **__):
        self.num_calls += 1
        raise ConnectionResetError("Connection lost")

    def finish(self):
        raise ConnectionResetError("Connection lost")


def test_a_failing_mirror_is_reported_once_and_dropped(caplog):
    broken = BrokenRun()
    run = wandb_run.WandbRun(broken)
    for step in range(1, 4):
        run.log({"step": step, "loss": 1.0})
    run.finish()
    assert broken.num_calls == 1
    assert caplog.text.count("wandb failed at step 1, metrics.jsonl goes on alone") == 1
    wandb_run.WandbRun(broken).finish()
    assert "wandb did not finish its run: Connection lost" in caplog.text


class SlowRun:
    """A wandb run that uploads until it is released."""

    def __init__(self):
        self.released, self.has_finished = threading.Event(), threading.Event()

    def finish(self):
        self.released.wait()
        self.has_finished.set()


def test_finishing_does_not_wait_for_ever(monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "_FINISH_SECONDS", 0.2)
    run = SlowRun()
    wandb_run.WandbRun(run).finish()
    assert not run.has_finished.is_set()
    assert "`wandb sync` sends the rest" in caplog.text
    run.released.set()
    assert run.has_finished.wait(60)


class RecordingRun:
    """Keeps what it is told."""

    def __init__(self):
        self.calls = []

    def log(self, values, step):
        self.calls.append((step, values))


def test_values_go_under_their_step_without_nulls():
    recorder = RecordingRun()
    wandb_run.WandbRun(recorder).log({"step": 7, "loss": None, "grad_norm": 2.0})
    assert recorder.calls == [(7, {"grad_norm": 2.0})]


@needs_wandb
@pytest.mark.parametrize("name", ["offline", "wandb"])
def test_a_run_without_a_network_writes_wandb_files_into_run_dir(tmp_path, monkeypatch, silent_server, caplog, name):
    import wandb

    # The silent server stands for a network that swallows everything: offline must not ask it, online must give up.
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_run, "_ANSWER_SECONDS", 0.3)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    run_dir = tmp_path / "run"
    try:
        for first_step in (1, 3):
            with MetricsLogger(run_dir, LoggingConfig(name=name), run_config={"model": {"hidden_size": 8}}) as metrics:
                for step in (first_step, first_step + 1):
                    metrics.log({"step": step, "loss": 1.0 / step})
    finally:
        wandb.teardown()
    assert caplog.text.count("wandb goes offline") == (2 if name == "wandb" else 0)
    run_id = (run_dir / "wandb" / "run_id.txt").read_text()
    folders = [path for path in (run_dir / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert folders
    # wandb appends -1 to the name where two starts fall into the same second.
    assert all(f"-{run_id}" in folder.name for folder in folders)
    assert all((folder / f"run-{run_id}.wandb").stat().st_size > 0 for folder in folders)
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert list(work.iterdir()) == []


@needs_wandb
def test_a_wandb_that_does_not_start_is_reported(tmp_path, monkeypatch, caplog):
    import wandb

    def fail(**_):
        raise wandb.Error("no service")

    monkeypatch.setattr(wandb, "init", fail)
    with MetricsLogger(tmp_path, LoggingConfig(name="offline")) as metrics:
        metrics.log({"step": 1})
    assert "wandb did not start, metrics go to metrics.jsonl and plots only: no service" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
