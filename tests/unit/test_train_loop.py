"""fit and train_step on a tiny model in this process: exact loss weighting, skipping, stopping, cadence."""

import copy
import itertools
import json
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lost.config.runtime import CheckpointConfig, LoggingConfig, RuntimeConfig, TrainEvaluationConfig
from lost.config.training import AdamWConfig, ConstantScheduleConfig, TrainConfig
from lost.train.engine import build_engine
from lost.train.metrics import MetricsLogger, Progress
from lost.train.profile import StepProfiler
from lost.train.runtime import start_runtime
from lost.train.state import TrainState
from lost.train.stop import StopRequest
from lost.train.trainer import Run, fit, train_step
from lost.utils.errors import TrainingError

VOCAB, SEQ_LEN = 13, 9


class Bigram(nn.Module):
    """Logits of the next token from the present one; `poison` in the ids makes them nan."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))

    def forward(self, input_ids, use_cache, poison=None):
        assert use_cache is False
        logits = self.table[input_ids]
        if poison is not None:
            logits = logits * poison.view(-1, 1, 1)
        return types.SimpleNamespace(logits=logits)


def batch(seed, rows=4, poison=None):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, SEQ_LEN), generator=generator)
    labels = ids.clone()
    # Rows of very different length: a mean of means would give another loss.
    for row in range(rows):
        labels[row, 2 + int(torch.randint(0, SEQ_LEN - 2, (), generator=generator)) :] = -100
    made = {"input_ids": ids, "labels": labels}
    if poison is not None:
        made["poison"] = torch.full((rows,), float(poison))
    return made


def split(whole, parts):
    size = len(whole["input_ids"]) // parts
    return [{k: v[i * size : (i + 1) * size] for k, v in whole.items()} for i in range(parts)]


def make_run(tmp_path, batches, model=None, *, max_steps=4, max_skipped_steps=3, every_steps=2, max_hours=0.0):
    config = types.SimpleNamespace(
        train=TrainConfig(max_steps=max_steps, max_grad_norm=0.5, max_skipped_steps=max_skipped_steps),
        optimizer=AdamWConfig(learning_rate=0.05),
        schedule=ConstantScheduleConfig(warmup_steps=0),
        evaluation=TrainEvaluationConfig(every_steps=every_steps),
        checkpoint=CheckpointConfig(every_steps=3),
        logging=LoggingConfig(name="none", group_norms_every_steps=2),
    )
    runtime = start_runtime(RuntimeConfig(device="cpu"))
    model = model or Bigram()
    return Run(
        config=config,
        runtime=runtime,
        engine=build_engine(model, RuntimeConfig(device="cpu"), config.optimizer, runtime, fill=lambda _: None),
        batches=iter(batches),
        metrics=MetricsLogger(tmp_path, config.logging),
        progress=Progress(max_steps, is_main=False),
        stop=StopRequest(max_hours),
        profiler=StepProfiler(0, tmp_path),
        flops_per_token=10.0,
        peak_flops=1e9,
    )


def reference_step(model, whole):
    """Loss and gradient norm by the plain definition, in float64."""
    table = model.table.detach().double().requires_grad_()
    losses = F.cross_entropy(
        table[whole["input_ids"][:, :-1]].flatten(0, 1), whole["labels"][:, 1:].flatten(), reduction="none"
    )
    valid = whole["labels"][:, 1:].flatten() != -100
    loss = losses[valid].mean()
    loss.backward()
    return loss.item(), table.grad.norm().item()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_loss_and_gradient_are_means_over_all_tokens_of_the_step(tmp_path, parts):
    whole = batch(0)
    model = Bigram()
    loss, grad_norm = reference_step(model, whole)
    result = train_step(make_run(tmp_path, [split(whole, parts)], model), 1)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(grad_norm, rel=1e-6)
    assert result.num_tokens == int((whole["labels"][:, 1:] != -100).sum())


def test_a_mean_of_means_would_be_seen():
    """Negative control of the test above: the data tells the two apart."""
    whole = batch(0)
    means = [reference_step(Bigram(), part)[0] for part in split(whole, 4)]
    loss, _ = reference_step(Bigram(), whole)
    assert abs(sum(means) / 4 - loss) > 1e-3 * loss


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(tmp_path, bad):
    run = make_run(tmp_path, [[batch(0, poison=1)], [batch(1, poison=bad)], [batch(2, poison=1)]], max_steps=3)
    state = TrainState()
    tables = []
    original = run.engine.optimizer.step
    run.engine.optimizer.step = lambda: (original(), tables.append(run.engine.model.table.detach().clone()))[0]
    fit(run, state, evaluate=dict, save=lambda _: None, save_final=lambda: None)
    assert len(tables) == 2
    assert torch.isfinite(run.engine.model.table).all()
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (3, 1, 0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses[2] is None
    assert isinstance(losses[1], float)
    assert isinstance(losses[3], float)


def test_too_many_such_steps_in_a_row_stop_the_run(tmp_path):
    batches = [[batch(0, poison=1)]] + [[batch(i, poison="nan")] for i in range(1, 9)]
    state = TrainState()
    with pytest.raises(TrainingError, match=r"step 4: 3 steps in a row.*max_skipped_steps = 3"):
        fit(
            make_run(tmp_path, batches, max_steps=9),
            state,
            evaluate=dict,
            save=lambda _: None,
            save_final=lambda: None,
        )


def test_a_run_without_one_good_step_fails_however_short_it_is(tmp_path):
    batches = [[batch(i, poison="nan")] for i in range(2)]
    with pytest.raises(TrainingError, match=r"step 2: 2 steps in a row.*max_skipped_steps = 3"):
        fit(
            make_run(tmp_path, batches, max_steps=2),
            TrainState(),
            evaluate=dict,
            save=lambda _: None,
            save_final=lambda: pytest.fail("a run that learnt nothing has no final weights"),
        )


def test_a_good_step_between_bad_ones_starts_the_count_anew(tmp_path):
    pattern = [1, "nan", "nan", 1, "nan", "nan", 1]
    state = TrainState()
    run = make_run(tmp_path, [[batch(i, poison=p)] for i, p in enumerate(pattern)], max_steps=7)
    assert fit(run, state, evaluate=dict, save=lambda _: None, save_final=lambda: None)
    assert state.skipped_steps == 4


def test_when_evaluation_saving_and_the_end_come(tmp_path):
    events = []
    run = make_run(tmp_path, ([batch(i)] for i in itertools.count()), max_steps=7)
    fit(
        run,
        TrainState(),
        evaluate=lambda: events.append("evaluate") or {"eval/loss": 1.0},
        save=lambda state: events.append(f"save {state.step}"),
        save_final=lambda: events.append("final"),
    )
    # Every 2 steps, before and after; saved every 3 and at the end, after the evaluation of that step.
    assert events == [
        *["evaluate", "evaluate", "save 3", "evaluate", "evaluate", "save 6", "evaluate", "save 7", "final"]
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4, 6, 7]
    assert [line["step"] for line in lines if "weight_norm/table" in line] == [2, 4, 6]


def test_a_request_to_stop_saves_and_leaves(tmp_path):
    run = make_run(tmp_path, ([batch(i)] for i in itertools.count()), max_steps=50, max_hours=1e-9)
    saved = []
    finished = fit(
        run,
        TrainState(),
        evaluate=dict,
        save=lambda state: saved.append(copy.copy(state)),
        save_final=lambda: pytest.fail("final"),
    )
    assert not finished
    assert [state.step for state in saved] == [1]
    assert "max_hours" in run.stop.reason


def test_the_same_batches_give_the_same_losses_bit_for_bit(tmp_path):
    def losses():
        run = make_run(tmp_path, [[batch(i)] for i in range(5)])
        return [train_step(run, step).loss for step in range(1, 6)]

    assert losses() == losses()
