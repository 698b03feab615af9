"""What is said about processes that no longer answer, and which errors count as such."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import lost.train.watch as watch_module
from lost.testing.runs import wait_until
from lost.train.state import TrainState
from lost.train.watch import Watch, words_about_others
from lost.utils.errors import LostProcessError


def words(before, after, own=0, count=None, own_step=7):
    return words_about_others(before, after, own=own, count=count or len(after), own_step=own_step)


def test_who_stands_still_is_silent_and_who_is_elsewhere_is_named():
    before = {0: ("7", "4"), 1: ("6", "3"), 2: ("7", "4"), 3: ("9", "4")}
    after = {0: ("7", "6"), 1: ("6", "3"), 2: ("7", "6"), 3: ("9", "6")}
    assert words(before, after) == "process 1 is silent since step 6, process 3 is at step 9"


def test_a_process_that_gave_up_is_not_the_silent_one():
    entries = {0: ("7", "gave_up"), 1: ("7", "2"), 2: ("7", "gave_up")}
    assert words(entries, entries) == "process 1 is silent since step 7"


def test_who_never_began_is_named_and_long_lists_are_cut():
    after = {0: ("1", "2")}
    assert words(after, after, count=2, own_step=1) == "process 1 never began"
    text = words(after, after, count=20, own_step=1)
    assert "process 8 never began, and 11 more are missing" in text
    assert "process 9" not in text


def test_all_alive_in_one_step_says_so():
    assert words({1: ("7", "1")}, {1: ("7", "2")}, count=2) == "all of them are alive and in the same step"


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("error", "is_of_the_group"),
    [
        (RuntimeError("[/a/gloo/b.cc:8] Connection closed by peer [::1]:7. This is typically a crash."), True),
        (RuntimeError("[/a/third_party/gloo/x.cc:1] Timed out waiting 5ms for recv operation to complete"), True),
        (dist.DistBackendError("some collective"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
@pytest.mark.usefixtures("group")
def test_only_failures_of_the_group_are_renamed(error, is_of_the_group):
    watch = Watch(TrainState(step=3), 0, 0.1, on_stuck=lambda _: None)
    with pytest.raises(Exception) as raised, watch.naming():  # noqa: PT011
        raise error
    assert isinstance(raised.value, LostProcessError) == is_of_the_group
    if is_of_the_group:
        assert str(raised.value).startswith("process 0 lost the others in step 3: ")
        assert "third_party" not in str(raised.value)
    else:
        assert raised.value is error


@pytest.mark.usefixtures("group")
def test_a_step_that_takes_too_long_is_reported_once(monkeypatch):
    state, messages, now = TrainState(step=3), [], [0.0]
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    store = dist.PrefixStore("lost_steps", dist.distributed_c10d._get_default_store())  # pyright: ignore

    def wait_for_beats():
        """Until a whole round of the watching thread lies behind us."""
        first = int(store.get("process_0").split()[1])
        wait_until(lambda: int(store.get("process_0").split()[1]) >= first + 2, 60, lambda: messages)

    with Watch(state, 0, 10, messages.append, beat_seconds=0.005) as watch:
        for _ in range(5):
            now[0] += 8
            wait_for_beats()
            watch.touch()
        assert messages == []
        now[0] += 9.6
        wait_until(lambda: messages, 60, lambda: messages)
        assert messages[0].startswith("process 0 has been in step 3 for 10 s: ")
        now[0] += 20
        wait_for_beats()
        assert len(messages) == 1
        state.step = 4
        wait_for_beats()
        assert len(messages) == 1
        now[0] += 9.6
        wait_until(lambda: len(messages) == 2, 60, lambda: messages)
        assert messages[1].startswith("process 0 has been in step 4 for ")


@pytest.mark.usefixtures("group")
def test_the_thread_has_ended_when_the_watch_has():
    before = set(threading.enumerate())
    with Watch(TrainState(step=3), 0, 60, on_stuck=lambda _: None):
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
