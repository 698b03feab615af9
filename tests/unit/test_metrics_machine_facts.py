"""Versions, peak memory and messages: what a run says about the machine it ran on."""

import json
import logging
import mmap
import multiprocessing
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.logging import RichHandler

from lost.utils import logging as lost_logging
from lost.utils import versions as versions_module
from lost.utils.memory import peak_memory_gib, peak_resident_bytes
from lost.utils.versions import versions

REPOSITORY = Path(versions_module.__file__).parents[2]


def test_versions_are_facts_in_json():
    facts = json.loads(json.dumps(versions()))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["transformers"] == metadata.version("transformers")
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["devices"]["cpu"]
    assert len(facts["devices"]["gpus"]) == torch.cuda.device_count()
    assert Path(sys.argv[0]).name in facts["command_line"] or "pytest" in facts["command_line"]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package folder in an empty repository, taken for ours."""
    folder = tmp_path / "repository" / "lost"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(versions_module, "_PACKAGE_FOLDER", folder)
    try:
        git(folder.parent, "init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    return folder


def test_commit_and_dirty_flag_of_the_packages_repository(package):
    git(package, "add", ".")
    git(package, "commit", "-q", "-m", "first")
    facts = versions()
    assert facts["commit"] == git(package, "rev-parse", "HEAD")
    assert facts["is_dirty"] is False
    (package / "__init__.py").write_text("changed = True")
    assert versions()["is_dirty"] is True


def test_a_package_installed_inside_another_repository_has_no_commit(package):
    (package.parent / "other.txt").write_text("")
    git(package.parent, "add", "other.txt")
    git(package, "commit", "-q", "-m", "of somebody else")
    facts = versions()
    assert (facts["commit"], facts["is_dirty"]) == (None, None)


def test_without_git_there_is_no_commit(package, monkeypatch, tmp_path):
    git(package, "add", ".")
    git(package, "commit", "-q", "-m", "first")
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = versions()
    assert (facts["commit"], facts["is_dirty"]) == (None, None)


def test_an_image_names_its_commit_where_there_is_no_git(package, monkeypatch):
    monkeypatch.setenv("LOST_COMMIT", "0123abc")
    git(package, "add", ".")
    git(package, "commit", "-q", "-m", "first")
    assert versions()["commit"] not in ("0123abc", None)
    monkeypatch.setenv("PATH", "")
    facts = versions()
    assert (facts["commit"], facts["is_dirty"]) == ("0123abc", None)


def touch_memory(size_bytes: int, peaks) -> None:
    """Peaks before, with and after a block of memory whose every page is written."""
    before = peak_resident_bytes()
    # Pages of its own: malloc may hand out memory that earlier tests have touched and freed.
    block = mmap.mmap(-1, size_bytes)
    for start in range(0, size_bytes, mmap.PAGESIZE):
        block[start] = 1
    during = peak_resident_bytes()
    block.close()
    peaks.put((before, during, peak_resident_bytes(), peak_memory_gib()))


def test_peak_memory_sees_what_is_touched_and_never_falls():
    # In a new process: here other tests may have peaked higher than now.
    context = multiprocessing.get_context("fork")
    peaks, size = context.Queue(), 200 * 2**20
    process = context.Process(target=touch_memory, args=(size, peaks))
    process.start()
    before, during, after, gib = peaks.get(timeout=300)
    process.join()
    assert during - before == pytest.approx(size, rel=0.1)
    # The kernel adds up its per-thread counters only now and then.
    assert after > during - 2**20
    assert gib == pytest.approx(after / 2**30, rel=0.01)


@pytest.fixture
def _restored_logger():
    logger = logging.getLogger("lost")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = handlers, level, propagate


@pytest.mark.usefixtures("_restored_logger")
def test_plain_messages_have_time_and_level_and_other_processes_only_warn(capsys):
    for is_main in (True, False):
        lost_logging.setup(is_main)
        lost_logging.setup(is_main)
        logger = lost_logging.get_logger("lost.train.trainer")
        logger.info("saved")
        logger.warning("odd")
        text = capsys.readouterr().err
        assert text.count(" INFO saved\n") == is_main
        assert text.count(" WARNING odd\n") == 1


@pytest.mark.usefixtures("_restored_logger")
def test_a_terminal_gets_rich_messages_on_the_shared_console(monkeypatch):
    terminal = Console(force_terminal=True, stderr=True)
    monkeypatch.setattr(lost_logging, "console", lambda: terminal)
    lost_logging.setup()
    (handler,) = logging.getLogger("lost").handlers
    assert isinstance(handler, RichHandler)
    assert handler.console is terminal


def test_loggers_are_ours():
    assert lost_logging.get_logger("lost.data.rows").name == "lost.data.rows"
    assert lost_logging.get_logger("__main__").name == "lost.__main__"
