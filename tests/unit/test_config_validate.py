"""Rules between sections: each breaks with its value, its rule and a fix, and holds on the other side of the limit."""

import copy

import pytest

from lost.cli.checks import LAYER_RULES
from lost.config.choices import ROOTS
from lost.config.compose import compose
from lost.config.section import hints_of, is_section, pick, to_dict
from lost.config.validate import all_problems
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


# Mistakes in one section that earlier hid each other, and the start of every problem that they are.
TOGETHER = {
    "rank and density": (
        ["parameterization.lost_rank=5000", "parameterization.density=2"],
        ["parameterization.density = 2.0:", "parameterization.lost_rank = 5000 for model.layers.0.self_attn.q_proj"],
    ),
    "rank and an unknown key": (
        ["parameterization.lost_rank=5000", "parameterization.nothing=1"],
        ["unknown key parameterization.nothing", "parameterization.lost_rank = 5000 for"],
    ),
    "rank, heads and vocabulary": (
        ["parameterization.lost_rank=5000", "model.num_attention_heads=7", "model.vocab_size=0"],
        ["model.vocab_size = 0:", "model.num_attention_heads = 7 does not", "parameterization.lost_rank = 5000 for"],
    ),
    "rank and both widths but one": (
        ["parameterization.lost_rank=5000", "model.hidden_size=0"],
        ["model.hidden_size = 0:", "parameterization.lost_rank = 5000 for model.layers.0.mlp.gate_proj"],
    ),
    "patterns and a gamma": (
        ["parameterization.gamma=-1", "parameterization.target_modules=[q_pro]"],
        ["parameterization.gamma = -1.0:", "parameterization.target_modules: the pattern q_pro"],
    ),
    "overrides of both kinds": (
        [
            "parameterization.rank_overrides.q_pro=4",
            "parameterization.density_overrides.k_pro=0.1",
            "parameterization.lost_rank=two",
        ],
        [
            "parameterization.lost_rank = 'two':",
            "parameterization.rank_overrides: the pattern q_pro",
            "parameterization.density_overrides: the pattern k_pro",
        ],
    ),
    "heads and rows": (
        ["model.num_attention_heads=7", "train.seq_len=2000", "schedule.warmup_steps=999"],
        ["model.num_attention_heads = 7", "train.seq_len = 2000", "schedule.warmup_steps = 999"],
    ),
    "batch, length of the run and gradient norm": (
        ["train.global_batch_size=12", "train.max_grad_norm=-1", "schedule.warmup_steps=999"],
        ["train.max_grad_norm = -1.0:", "train.global_batch_size = 12", "schedule.warmup_steps = 999"],
    ),
    "decay and warm-up": (
        ["schedule=wsd", "schedule.decay_steps=300", "schedule.warmup_steps=-1", "schedule.final_fraction=2"],
        ["schedule.final_fraction = 2.0:", "schedule.warmup_steps = -1:", "schedule.decay_steps = 300 steps is above"],
    ),
    "files and weights": (
        [
            "data=text_files",
            "data.train_files=[/no/such]",
            "data.train_weights=[0,1]",
            "data.validation_files=[/no/other]",
            "data.isolate_documents=true",
            "data.row_maker=padded",
        ],
        [
            "data.isolate_documents = true",
            "data.train_weights has 2 entries",
            "data.train_weights = [0.0, 1.0]: every",
            "data.train_files: /no/such does not exist",
            "data.validation_files: /no/other does not exist",
        ],
    ),
    "number of layers, rank and a layer's pattern": (
        [
            "model.num_hidden_layers=0",
            "parameterization.rank_overrides={layers.30.self_attn.q_proj: 9999, q_prj: 8}",
            "parameterization.target_modules=[mlp, layers.30.self_attn.q_proj]",
        ],
        [
            "model.num_hidden_layers = 0:",
            "parameterization.target_modules: the pattern mlp ",
            "parameterization.rank_overrides: the pattern q_prj ",
            "parameterization.lost_rank = 9999 for model.layers.30.self_attn.q_proj",
        ],
    ),
    "evaluation and profile": (
        ["evaluation.max_tokens=3", "evaluation.every_steps=-1", "runtime.profile_steps=500", "runtime.device=tpu"],
        [
            "runtime.device = 'tpu':",
            "evaluation.every_steps = -1:",
            "runtime.profile_steps = 500",
            "evaluation.max_tokens = 3 is",
        ],
    ),
}
# A wrong value, and rules that read it: what they would find is no second mistake.
ALONE = {
    "a rank that is no fraction": ["parameterization.lost_rank=1.5"],
    "a rank that is no number": ["parameterization.lost_rank=many"],
    "a pattern that is no list": ["parameterization.target_modules=3"],
    "no key and value heads": ["model.num_key_value_heads=0"],
    "a hidden size below zero": ["model.hidden_size=-64"],
    "a hidden size without even heads": ["model.hidden_size=1028"],
    "no blocks": ["model.num_hidden_layers=0"],
    "a row that is no number": ["train.seq_len=long"],
    "no rows": ["train.micro_batch_size=0"],
    "neither steps nor tokens": ["train.max_steps=0"],
    "a density that is no number": ["parameterization.density=x", "parameterization.gamma=0"],
    "a form that is none": ["parameterization=los"],
    "a warm-up that is no number": ["schedule=wsd", "schedule.warmup_steps=soon"],
    "rows that no device can split": ["train.global_batch_size=12"],
    "files that are no list": ["data=text_files", "data.train_files=3"],
}


def every_problem(*overrides: str) -> list[str]:
    """As the command line finds them: with the rules on layers."""
    try:
        compose("pretrain", list(overrides), more_rules=LAYER_RULES)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("case", TOGETHER)
def test_mistakes_of_one_section_are_listed_together(case):
    overrides, starts = TOGETHER[case]
    found = every_problem(*overrides)
    assert [start for start in starts if not any(problem.startswith(start) for problem in found)] == [], found
    assert len(found) == len(starts), found


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [
        (["runtime.recompute=p1"], False),
        (["runtime.recompute=block", "runtime.compile=true"], False),
        (["runtime.recompute=p2"], True),
        (["runtime.recompute=p3"], True),
        (["runtime.recompute=p1", "runtime.compile=true"], True),
    ],
)
def test_levels_that_zero3_cannot_have(overrides, is_refused):
    found = every_problem("runtime=zero3", *overrides)
    assert [problem.startswith("runtime.recompute = p") for problem in found] == [True] * is_refused
    assert every_problem("runtime=zero2", *overrides) == []


@pytest.mark.parametrize("case", ALONE)
def test_a_wrong_value_brings_no_second_message(case):
    found = every_problem(*ALONE[case])
    assert len(found) == 1, found


def keys_and_paths(values, section, path=()):
    """Each key that can be wrong and its path, names of choices left out."""
    for key, hint in hints_of(pick(section, values)).items():
        if is_section(hint):
            yield from keys_and_paths(values[key], hint, (*path, key))
        elif key != "name":
            yield ".".join((*path, key)), (*path, key)


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("pretrain", ["schedule=wsd", "data=text_files", f"data.train_files=[{__file__}]", "logging=none"]),
        ("pretrain", ["schedule=linear", "data=c4"]),
        ("pretrain", ["parameterization=dense", "train.max_tokens=100000", "schedule=constant"]),
        ("evaluate", ["source=."]),
        ("generate", ["source=.", "do_sample=false", "temperature=0.8"]),
        ("export", ["source=.", "to=new"]),
        ("plan", []),
        ("bench", ["what=step"]),
        ("bench", []),
    ],
)
def test_each_key_alone_can_be_wrong(command, overrides):
    """No rule breaks on a wrong value, reports it again, or takes the default instead."""
    section, _ = ROOTS[command]
    right = to_dict(compose(command, overrides))
    assert all_problems(command, section, right, LAYER_RULES) == []
    keys = dict(keys_and_paths(right, section))
    assert len(keys) >= len(hints_of(section))
    for key, path in keys.items():
        values = copy.deepcopy(right)
        place = values
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = {3: "of no type of ours"}
        (problem,) = all_problems(command, section, values, LAYER_RULES)
        assert problem.startswith(f"{key} = {{3: "), problem


def test_a_mistake_of_our_own_in_a_rule_is_not_hidden():
    def broken(model):
        return model.no_such_key

    with pytest.raises(AttributeError):
        compose("pretrain", ["model.vocab_size=0"], more_rules=[broken])


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
