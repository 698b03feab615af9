"""Rules between sections: each breaks with its value, its rule and a fix, and holds on the other side of the limit."""

import pytest

from lost.config.compose import compose
from lost.utils.errors import ConfigError


def problems(*overrides: str, command: str = "pretrain") -> list[str]:
    try:
        compose(command, list(overrides))
    except ConfigError as error:
        return error.problems
    return []


BROKEN_AND_HELD = {
    "row longer than the model": (
        ["train.seq_len=1025"],
        "train.seq_len = 1025 tokens is above model.max_position_embeddings = 1024",
        ["train.seq_len=1024"],
    ),
    "batch not divisible": (
        ["train.global_batch_size=12"],
        "train.global_batch_size = 12 is not divisible by micro_batch_size = 8",
        ["train.global_batch_size=24"],
    ),
    "warm-up longer than the run": (
        ["schedule.warmup_steps=201"],
        "schedule.warmup_steps = 201 steps is above the 200 steps of the run",
        ["schedule.warmup_steps=200"],
    ),
    "warm-up longer than the tokens": (
        ["train.max_tokens=40960", "schedule.warmup_steps=11"],
        "schedule.warmup_steps = 11 steps is above the 10 steps of the run",
        ["train.max_tokens=40960", "schedule.warmup_steps=10"],
    ),
    "decay longer than the run": (
        ["schedule=wsd", "schedule.decay_steps=300"],
        "schedule.decay_steps = 300 steps is above the 200 steps of the run",
        ["schedule=wsd", "schedule.decay_steps=180"],
    ),
    "warm-up and decay together": (
        ["schedule=wsd", "schedule.warmup_steps=0.5", "schedule.decay_steps=101"],
        "schedule.warmup_steps = 100 + schedule.decay_steps = 101 is above the 200 steps of the run",
        ["schedule=wsd", "schedule.warmup_steps=0.5", "schedule.decay_steps=100"],
    ),
    "profile longer than the run": (
        ["runtime.profile_steps=198"],
        "runtime.profile_steps = 198 steps begin after 3, and the run has 200",
        ["runtime.profile_steps=197"],
    ),
    "less than a row of evaluation": (
        ["evaluation.max_tokens=255"],
        "evaluation.max_tokens = 255 is less than one row of 256 tokens",
        ["evaluation.max_tokens=256"],
    ),
    "vocabulary smaller than the bytes": (
        ["model.vocab_size=257"],
        "model.vocab_size = 257: a trained tokenizer needs at least 258 tokens",
        ["model.vocab_size=258"],
    ),
    "no training files": (
        ["data=text_files", f"data.validation_files=[{__file__}]"],
        "data.train_files is empty",
        ["data=text_files", f"data.train_files=[{__file__}]"],
    ),
    "a file that is not there": (
        ["data=text_files", f"data.train_files=[{__file__[:-3]}.txt]"],
        f"does not exist (did you mean {__file__.rpartition('/')[2]}?)",
        ["data=text_files", f"data.train_files=[{__file__[:-3]}*]"],
    ),
    "a validation set that is not there": (
        ["data=text_files", f"data.train_files=[{__file__}]", "data.validation_files={web: [/no/such/file]}"],
        "data.validation_files.web: /no/such/file does not exist, nor does its folder /no/such",
        ["data=text_files", f"data.train_files=[{__file__}]", f"data.validation_files={{web: [{__file__}]}}"],
    ),
    "a tokenizer folder that is not there": (
        ["data.tokenizer=./no/such"],
        "data.tokenizer = './no/such' does not exist",
        ["data.tokenizer=t5-base"],
    ),
    "a source that is not there": (
        ["source=/no/such", "run_dir=new"],
        "source = '/no/such' does not exist",
        ["source=org/name", "run_dir=new"],
    ),
    "a run directory that is a file": ([f"run_dir={__file__}"], "is a file: name a folder", ["run_dir=new"]),
    "no run directory": (["run_dir="], "run_dir is empty", ["run_dir=new"]),
    "resume": (
        ["checkpoint.resume=never again"],
        "(did you mean never?)",
        ["checkpoint.resume=never"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_AND_HELD)
def test_rule(case):
    broken, message, held = BROKEN_AND_HELD[case]
    (problem,) = problems(*broken)
    assert message in problem
    assert problems(*held) == []


def test_rules_of_different_sections_are_listed_together():
    found = problems("train.seq_len=2000", "schedule.warmup_steps=999", "run_dir=", "parameterization.density=2")
    assert len(found) == 4


def test_a_broken_section_hides_only_its_own_rules():
    found = problems("model.num_attention_heads=7", "train.seq_len=2000", "schedule.warmup_steps=999")
    assert [problem.split()[0] for problem in found] == ["model.num_attention_heads", "schedule.warmup_steps"]


class TestProcesses:
    @pytest.fixture(autouse=True)
    def two_processes(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")

    def test_the_batch_is_split_over_processes(self):
        (problem,) = problems("train.global_batch_size=24")
        assert "train.micro_batch_size = 8 x 2 processes = 16" in problem
        assert problems("train.global_batch_size=24", "train.micro_batch_size=4") == []

    def test_single_takes_one_process(self):
        assert problems("runtime=single") == ["runtime=single with 2 processes: use runtime=ddp or start one process"]
        assert problems("runtime=ddp") == []


def test_ddp_needs_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (problem,) = problems("runtime=ddp")
    assert "torchrun" in problem
    assert problems("runtime=ddp", command="plan") == []


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_source_is_needed(command):
    assert "source is empty" in problems("source=", command=command)[0]


def test_export_does_not_overwrite_its_source(tmp_path):
    assert "is the source itself" in problems(f"source={tmp_path}", f"to={tmp_path}/.", command="export")[0]
    assert "to is empty" in problems(f"source={tmp_path}", "to=", command="export")[0]


def test_bench_limits():
    (problem,) = problems("parameterization.lost_rank=101", "in_features=100", command="bench")
    assert "lost_rank = 101 is above min(in_features, out_features) = 100" in problem
    assert problems("parameterization.lost_rank=100", "in_features=100", command="bench") == []
    assert "seq_len = 1025" in problems("what=step", "seq_len=1025", command="bench")[0]
    assert "parameterization=dense: must be one of lost" in problems("parameterization=dense", command="bench")[0]
