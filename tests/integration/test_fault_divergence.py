"""Steps whose loss is not finite or far too high, in real runs: skipped, and on request taken back with their rows."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lost.assemble.run
import lost.train.trainer
from lost.data import TokenRows
from lost.testing.bad_steps import batches_without, carry_out_both
from lost.testing.forked import carry_out
from lost.testing.processes import run_processes
from lost.testing.runs import losses, lost_here, read_metrics, tiny_run, write_corpus

MICRO_STEPS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def command(run_dir, corpus, *keys):
    """Two bad steps in a row are too many, unless `keys` say otherwise."""
    own = [] if any(key.startswith("train.max_skipped_steps") for key in keys) else ["train.max_skipped_steps=2"]
    return tiny_run(run_dir, corpus, "train.on_divergence=rollback", "checkpoint.every_steps=4", *own, *keys)


def final(run_dir):
    return {name: value.numpy().tobytes() for name, value in load_file(run_dir / "final/model.safetensors").items()}


def counters(run_dir, step):
    return json.loads((run_dir / f"checkpoints/step_{step:08d}/state.json").read_text())["counters"]


class Poison:
    """Multiplies the loss of some batches, known by their contents, and breaks off at some forward pass."""

    def __init__(self, monkeypatch, of_steps=()):
        self.factors: dict[bytes, float] = {}
        self.of_steps = of_steps
        self.seen: list[bytes] = []
        self.break_at = math.inf
        self._original = lost.train.trainer.forward_loss_sum
        monkeypatch.setattr(lost.train.trainer, "forward_loss_sum", self._forward)

    def _forward(self, run, batch):
        key = batch["input_ids"].numpy().tobytes()
        self.seen.append(key)
        if len(self.seen) == self.break_at:
            raise KeyboardInterrupt
        return self._original(run, batch) * self.factors.get(key, 1.0)

    def of_step(self, step: int) -> bytes:
        """The first micro-batch of a step of an undisturbed run."""
        return self.of_steps[(step - 1) * MICRO_STEPS]


@pytest.fixture(scope="module")
def batches_of_steps(tmp_path_factory, corpus) -> list[bytes]:
    """The micro-batches of a clean run of 16 steps, in order."""
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        watched = Poison(monkeypatch)
        assert lost_here(*tiny_run(run_dir, corpus, "train.max_steps=16", "evaluation.every_steps=0")) == 0
    assert len(set(watched.seen)) == 16 * MICRO_STEPS
    return watched.seen


@pytest.fixture
def poison(monkeypatch, batches_of_steps):
    return Poison(monkeypatch, batches_of_steps)


@pytest.mark.parametrize("runtime", ["single", "fsdp2"])
def test_going_back_gives_the_run_that_never_saw_the_bad_rows(tmp_path, corpus, monkeypatch, poison, runtime):
    options = ("evaluation.every_steps=5", f"runtime={runtime}")
    for step in (6, 7):
        poison.factors[poison.of_step(step)] = math.nan
    assert lost_here(*command(tmp_path / "run", corpus, *options)) == 0
    assert counters(tmp_path / "run", 12)["left_out"] == [[6, 7]]
    assert counters(tmp_path / "run", 12)["num_rollbacks"] == 1

    monkeypatch.setattr(lost.assemble.run, "batches_of", batches_without({6, 7}))
    assert lost_here(*command(tmp_path / "never", corpus, *options)) == 0
    assert final(tmp_path / "run") == final(tmp_path / "never")
    ours = read_metrics(tmp_path / "run")
    assert [line for line in ours if "went_back_from" not in line] == read_metrics(tmp_path / "never")
    assert [line for line in ours if "went_back_from" in line] == [
        {"step": 4, "went_back_from": 7, "num_rollbacks": 1},
    ]


ZERO = [("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")]


@pytest.fixture(scope="module")
def zero_runs(tmp_path_factory, corpus) -> Path:
    """Runs of ZeRO on two processes, of which the second has NaNs in steps 6 and 7, and such that never saw them."""
    folder = tmp_path_factory.mktemp("zero")
    pairs = []
    for stage, precision in ZERO:
        keys = [
            f"runtime={stage}",
            f"runtime.precision={precision}",
            "train.micro_batch_size=2",
            "evaluation.every_steps=0",
        ]
        names = (f"{stage}_{precision}", f"{stage}_{precision}_never")
        pairs.append(tuple(command(folder / name, corpus, *keys) for name in names))
    results = run_processes(carry_out_both, folder / "group", pairs, {6, 7})
    assert results == [[0] * 2 * len(ZERO)] * 2
    return folder


@pytest.mark.parametrize("case", ZERO, ids="-".join)
def test_with_zero_too_it_is_the_run_that_never_saw_the_bad_rows(zero_runs, case):
    run, never = zero_runs / "_".join(case), zero_runs / f"{'_'.join(case)}_never"
    assert counters(run, 12)["left_out"] == [[6, 7]]
    assert counters(never, 12)["left_out"] == []
    assert [line for line in read_metrics(run) if "went_back_from" not in line] == read_metrics(never)
    assert final(run) == final(never)


@pytest.mark.parametrize("moment", [7.5, 9.5], ids=["just after", "after a later checkpoint"])
def test_a_run_that_breaks_off_around_going_back_comes_to_the_same(tmp_path, corpus, poison, moment):
    for step in (6, 7):
        poison.factors[poison.of_step(step)] = math.nan
    assert lost_here(*command(tmp_path / "run", corpus)) == 0
    # In forward passes: 7 steps, then on from step 5.
    already = len(poison.seen)
    poison.break_at = already + int((moment + 3) * MICRO_STEPS)
    assert lost_here(*command(tmp_path / "broken", corpus)) == 130
    assert lost_here(*command(tmp_path / "broken", corpus)) == 0
    assert read_metrics(tmp_path / "broken") == read_metrics(tmp_path / "run")
    assert final(tmp_path / "broken") == final(tmp_path / "run")


def test_the_next_rows_may_be_bad_too(tmp_path, corpus, monkeypatch, poison):
    for step in (6, 7, 8, 9):
        poison.factors[poison.of_step(step)] = math.nan
    assert lost_here(*command(tmp_path / "run", corpus)) == 0
    assert counters(tmp_path / "run", 12)["left_out"] == [[6, 9]]
    assert counters(tmp_path / "run", 12)["num_rollbacks"] == 2
    monkeypatch.setattr(lost.assemble.run, "batches_of", batches_without({6, 7, 8, 9}))
    assert lost_here(*command(tmp_path / "never", corpus)) == 0
    assert final(tmp_path / "run") == final(tmp_path / "never")


@pytest.mark.parametrize(
    ("bad", "keys", "reason"),
    [
        ((6, 7), ["train.on_divergence=stop"], "the rows of the skipped steps are in"),
        ((6, 7, 8, 9), ["train.max_rollbacks=1"], "has gone back 1 times already (train.max_rollbacks = 1)"),
        ((2, 3), [], "holds no checkpoint of a step before 2"),
    ],
    ids=["as told", "too often", "nowhere to go back to"],
)
def test_a_run_that_cannot_go_back_stops_with_a_diagnosis(tmp_path, corpus, capsys, poison, bad, keys, reason):
    for step in bad:
        poison.factors[poison.of_step(step)] = math.nan
    capsys.readouterr()
    assert lost_here(*command(tmp_path / "run", corpus, *keys)) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "2 steps in a row were skipped (train.max_skipped_steps = 2)" in message
    assert reason in message
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert reason in status["reason"]
    steps = json.loads((tmp_path / "run/divergence.json").read_text())["steps"]
    assert [facts["fault"] for facts in steps[-2:]] == ["not finite"] * 2
    assert all("rows" not in facts for facts in steps if not facts["fault"])
    assert_rows_are_those_of(steps[-1]["rows"], poison, bad[-1], corpus)


def assert_rows_are_those_of(rows, poison, step, corpus):
    """The rows read by their ids are the batch that was poisoned."""
    seen = poison.of_steps[(step - 1) * MICRO_STEPS : step * MICRO_STEPS]
    train = max((TokenRows(path.parent) for path in (corpus.parent / "cache").rglob("tokens_00000.bin")), key=len)
    assert b"".join(seen) == train.read(rows)["input_ids"].numpy().tobytes()


def test_a_loss_spike_is_skipped_like_a_loss_that_is_not_finite(tmp_path, corpus, poison):
    keys = ["train.max_steps=16", "train.loss_spike_factor=2"]
    results = {}
    for name, factor, extra in (("spike", 9.0, []), ("nan", math.nan, []), ("off", 9.0, ["train.loss_spike_factor=0"])):
        poison.factors[poison.of_step(13)] = factor
        assert lost_here(*command(tmp_path / name, corpus, *keys, *extra)) == 0
        results[name] = final(tmp_path / name)
        assert counters(tmp_path / name, 16)["skipped_steps"] == (name != "off")
    assert results["spike"] == results["nan"] != results["off"]
    # One of its two micro-batches counted nine times: about five times the loss, and written as it was.
    ordinary, spike = losses(tmp_path / "spike")[11], losses(tmp_path / "spike")[12]
    assert 4 * ordinary < spike < 6 * ordinary
    assert losses(tmp_path / "nan")[12] is None


def test_two_processes_decide_as_one_does(tmp_path, corpus):
    """Nothing is learnt, so that losses go up and down, and every one a little above the median is called a spike."""
    keys = ["train.max_steps=30", "optimizer.learning_rate=0", "checkpoint.every_steps=2", "evaluation.every_steps=0"]
    keys += ["train.loss_spike_factor=1.001", "train.max_skipped_steps=1", "train.max_rollbacks=99"]
    assert lost_here(*command(tmp_path / "one", corpus, *keys)) == 0
    carry_out(tmp_path / "output", command(tmp_path / "two", corpus, *keys), count=2)
    one, two = counters(tmp_path / "one", 30), counters(tmp_path / "two", 30)
    assert one["num_rollbacks"] >= 1
    for key in ("left_out", "num_rollbacks", "skipped_steps", "tokens_seen"):
        assert one[key] == two[key], key
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
