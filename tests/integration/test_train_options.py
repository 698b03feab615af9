"""Whole runs in this process: precisions, recompute, compile, profiling, resume, sources, stopping, bad starts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lost.checkpoint import CheckpointManager
from lost.testing.runs import losses, lost_here, read_metrics, tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, corpus):
    """12 steps in float32, saved at 4, 8 and 12."""
    run_dir = tmp_path_factory.mktemp("baseline") / "run"
    assert lost_here(*tiny_run(run_dir, corpus)) == 0
    return run_dir


def run(tmp_path, corpus, *overrides):
    run_dir = tmp_path / "run"
    assert lost_here(*tiny_run(run_dir, corpus, *overrides)) == 0
    return run_dir


def largest_difference(run_dir, other):
    return max(abs(a - b) / abs(b) for a, b in zip(losses(run_dir), losses(other), strict=True))


def test_what_a_run_leaves(baseline):
    names = {path.name for path in baseline.iterdir()}
    assert {
        *{"config.yaml", "versions.json", "metrics.jsonl", "status.json", "checkpoints", "final", "plots"},
        *{"sample.txt", "data.json", "tokenizer"},
    } <= names
    assert {path.name for path in (baseline / "plots").iterdir()} == {
        *{"loss.png", "learning_rate.png", "throughput.png"}
    }
    assert [path.name for path in CheckpointManager(baseline / "checkpoints").complete()] == [
        *["step_00000008", "step_00000012"]
    ]
    lines = read_metrics(baseline)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 5, 10, 12]
    assert {"eval/perplexity", "eval/perplexity_lineage", "eval/tokens"} <= set(lines[0])
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert lines[-1]["eval/perplexity_lineage"] < lines[-1]["eval/perplexity"]


def test_bf16_is_near_float32_and_not_equal(baseline, corpus, tmp_path):
    run_dir = run(tmp_path, corpus, "runtime.precision=bf16")
    assert 0 < largest_difference(run_dir, baseline) < 5e-3
    weights = load_file(run_dir / "final" / "model.safetensors")
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}


def test_pure_bf16_keeps_everything_in_bf16(baseline, corpus, tmp_path):
    run_dir = run(tmp_path, corpus, "runtime.precision=pure_bf16")
    assert 0 < largest_difference(run_dir, baseline) < 2e-2
    tensors, _ = CheckpointManager(run_dir / "checkpoints").load(run_dir / "checkpoints" / "step_00000012")
    moments = {key: t.dtype for key, t in tensors["optimizer"].items() if "exp_avg" in key}
    assert set(moments.values()) == {torch.bfloat16}
    assert {t.dtype for t in tensors["model"].values() if t.is_floating_point()} == {torch.bfloat16}


def test_recompute_gives_the_same_losses(baseline, corpus, tmp_path):
    assert largest_difference(run(tmp_path, corpus, "runtime.recompute=block"), baseline) < 1e-6


def test_compiled_blocks_give_the_same_losses(corpus, tmp_path):
    keys = ["model.num_hidden_layers=1", "train.max_steps=3"]
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    assert lost_here(*tiny_run(eager, corpus, *keys)) == 0
    assert lost_here(*tiny_run(compiled, corpus, *keys, "runtime.compile=true")) == 0
    assert largest_difference(compiled, eager) < 1e-5


def test_gradient_accumulation_gives_the_same_losses(baseline, corpus, tmp_path):
    assert largest_difference(run(tmp_path, corpus, "train.micro_batch_size=1"), baseline) < 1e-5


def test_profile_writes_a_trace_of_the_steps(corpus, tmp_path):
    run_dir = run(tmp_path, corpus, "runtime.profile_steps=2", "train.max_steps=6")
    trace = json.loads((run_dir / "profile" / "trace_process_0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}


def test_a_run_that_was_stopped_goes_on_bit_for_bit(baseline, corpus, tmp_path):
    """max_hours stops it after every step, at 5 before an evaluation; the same command goes on each time."""
    run_dir = tmp_path / "run"
    for _ in range(6):
        assert lost_here(*tiny_run(run_dir, corpus, "train.max_hours=1e-9")) == 0
        assert json.loads((run_dir / "status.json").read_text())["state"] == "preempted"
    assert len(losses(run_dir)) == 6
    assert lost_here(*tiny_run(run_dir, corpus)) == 0
    assert read_metrics(run_dir) == read_metrics(baseline)
    ours, theirs = (load_file(d / "final" / "model.safetensors") for d in (run_dir, baseline))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_finished_run_says_so_again(baseline, corpus, capsys):
    before = (baseline / "metrics.jsonl").read_bytes()
    assert lost_here(*tiny_run(baseline, corpus)) == 0
    assert "Finished" in capsys.readouterr().out
    assert (baseline / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_with_other_settings_says_so(baseline, corpus, capsys):
    assert lost_here(*tiny_run(baseline, corpus, "optimizer.learning_rate=0.5")) == 2
    assert "optimizer.learning_rate: finished with 0.003, now 0.5" in capsys.readouterr().err


def test_a_final_model_is_not_replaced_by_a_run_that_starts_anew(corpus, tmp_path, capsys):
    run_dir = run(tmp_path, corpus, "train.max_steps=2")
    shutil.rmtree(run_dir / "checkpoints")
    assert lost_here(*tiny_run(run_dir, corpus, "train.max_steps=4")) == 2
    assert f"source={run_dir}" in capsys.readouterr().err


def test_fewer_steps_than_the_checkpoint_has_is_an_error(baseline, corpus, capsys):
    assert lost_here(*tiny_run(baseline, corpus, "train.max_steps=6")) == 2
    assert "is after step 12" in capsys.readouterr().err


def test_few_training_lines_still_make_a_summary(corpus, tmp_path, capsys):
    run_dir = run(tmp_path, corpus, "train.max_steps=3", "logging.every_steps=100")
    assert [line["step"] for line in read_metrics(run_dir) if "loss" in line] == [3]
    assert "validation perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.seq_len=16", "train.seq_len: checkpoint 32, now 16"),
        ("model.hidden_size=64", "model.hidden_size: checkpoint 32, now 64"),
        ("parameterization.gamma=0.5", "parameterization.gamma: checkpoint 0.7, now 0.5"),
        ("seed=3", "seed: checkpoint 0, now 3"),
    ],
)
def test_what_must_not_change_on_resume_is_named(baseline, corpus, capsys, override, named):
    assert lost_here(*tiny_run(baseline, corpus, override)) == 2
    assert named in capsys.readouterr().err


def test_other_data_on_resume_is_named(corpus, tmp_path, capsys):
    copied = tmp_path / "corpus.jsonl"
    copied.write_bytes(corpus.read_bytes())
    command = tiny_run(tmp_path / "run", copied, "train.max_steps=6")
    assert lost_here(*command, "train.max_hours=1e-9") == 0
    copied.write_text(copied.read_text().replace("a", "b"))
    assert lost_here(*command) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_more_steps_go_on_from_a_finished_run(corpus, tmp_path):
    run_dir = run(tmp_path, corpus, "schedule=constant", "train.max_steps=4")
    assert lost_here(*tiny_run(run_dir, corpus, "schedule=constant", "train.max_steps=6")) == 0
    assert len(losses(run_dir)) == 6


def test_resume_must_and_never(baseline, corpus, tmp_path, capsys):
    assert lost_here(*tiny_run(tmp_path / "none", corpus, "checkpoint.resume=must")) == 2
    assert "checkpoint.resume=must" in capsys.readouterr().err
    assert lost_here(*tiny_run(baseline, corpus, "checkpoint.resume=never")) == 2
    assert str(baseline) in capsys.readouterr().err


def test_pretraining_goes_on_from_an_export(baseline, corpus, tmp_path):
    source = baseline / "final"
    run_dir = tmp_path / "run"
    # The architecture is the source's: the model keys need not be repeated.
    keys = [key for key in tiny_run(run_dir, corpus) if not key.startswith(("model", "parameterization"))]
    assert lost_here(*keys, f"source={source}", "train.max_steps=2") == 0
    first, last = read_metrics(run_dir)[0], read_metrics(baseline)[-1]
    # Same weights and same validation set: the loss before the first step is the source's last.
    assert first["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert (run_dir / "tokenizer" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_such_a_run_goes_on_when_its_source_is_gone(baseline, corpus, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(baseline / "final", source)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"

    def keys(run_dir):
        common = [key for key in tiny_run(run_dir, corpus) if not key.startswith(("model", "parameterization"))]
        return [*common, f"source={source}", "train.max_steps=4"]

    assert lost_here(*keys(unbroken)) == 0
    assert lost_here(*keys(broken), "train.max_hours=1e-9") == 0
    shutil.rmtree(source)
    assert lost_here(*keys(broken)) == 0
    assert read_metrics(broken) == read_metrics(unbroken)


def test_several_validation_sets_are_named(corpus, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    other = write_corpus(folder, num_documents=9, seed=5)
    sets = f"data.validation_files={{own: [{corpus}], other: [{other}]}}"
    line = read_metrics(run(tmp_path, corpus, sets, "train.max_steps=2"))[-1]
    own, other_loss = line["eval/own/loss"], line["eval/other/loss"]
    weights = line["eval/own/tokens"], line["eval/other/tokens"]
    assert line["eval/tokens"] == sum(weights)
    expected = (own * weights[0] + other_loss * weights[1]) / sum(weights)
    assert line["eval/loss"] == pytest.approx(expected, rel=1e-12)


def test_dense_is_transformers_own_llama(corpus, tmp_path):
    keys = [key for key in tiny_run(tmp_path / "run", corpus) if not key.startswith("parameterization")]
    assert lost_here(*keys, "parameterization=dense", "train.max_steps=2") == 0
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("row_keys", [["data.row_maker=padded"], ["data.isolate_documents=true"]])
def test_other_rows_train_too(corpus, tmp_path, row_keys):
    run_dir = run(tmp_path, corpus, "train.max_steps=4", *row_keys)
    assert losses(run_dir)[-1] < losses(run_dir)[0]
