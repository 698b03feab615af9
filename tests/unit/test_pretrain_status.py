"""Whose reason status.json keeps when several processes of a run fail."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lost.assemble.pretrain import status_of_failures
from lost.checkpoint import read_status, write_status
from lost.train.runtime import Runtime
from lost.train.state import TrainState
from lost.utils.errors import LostProcessError, TrainingError


def fail(run_dir, error: BaseException, *, is_main: bool) -> dict[str, Any]:
    """status.json after a process of the run failed with `error` in step 14."""
    runtime = cast(Runtime, SimpleNamespace(is_main=is_main))
    with pytest.raises(type(error)), status_of_failures(run_dir, runtime, TrainState(step=14)):
        raise error
    status = read_status(run_dir)
    assert status is not None
    return status


def test_the_first_process_says_why_it_failed(tmp_path):
    write_status(tmp_path, "running", 12)
    status = fail(tmp_path, TrainingError("No space left on device"), is_main=True)
    assert (status["state"], status["step"], status["reason"]) == ("failed", 14, "No space left on device")
    assert fail(tmp_path, OSError("gone"), is_main=True)["reason"] == "OSError: gone"


def test_another_process_speaks_for_a_first_one_that_was_lost(tmp_path):
    write_status(tmp_path, "running", 12)
    assert fail(tmp_path, LostProcessError("process 0 is silent"), is_main=False)["reason"] == "process 0 is silent"


def test_the_reason_that_the_first_process_gave_stays(tmp_path):
    write_status(tmp_path, "failed", 14, "No space left on device")
    status = fail(tmp_path, LostProcessError("process 0 is silent"), is_main=False)
    assert status["reason"] == "No space left on device"


def test_any_other_failure_of_another_process_is_left_to_the_first(tmp_path):
    write_status(tmp_path, "running", 12)
    assert fail(tmp_path, TrainingError("loss is NaN"), is_main=False)["state"] == "running"


def test_an_unreadable_status_does_not_hide_the_error(tmp_path):
    (tmp_path / "status.json").write_text("{")
    runtime = cast(Runtime, SimpleNamespace(is_main=False))
    with pytest.raises(LostProcessError, match="silent"), status_of_failures(tmp_path, runtime, TrainState()):
        raise LostProcessError("process 0 is silent")
