"""compose: choices, overrides, config files, and one message with every problem."""

import itertools
from pathlib import Path

import pytest
import yaml

from lost.config.choices import ROOTS, choices, groups
from lost.config.compose import compose
from lost.config.section import build, to_dict
from lost.utils.errors import ConfigError

# What a choice needs besides itself to be valid.
COMPANIONS = {"data=text_files": [f"data.train_files=[{__file__}]"]}
PRETRAIN_GROUPS = {group: choices("pretrain", group) for group in groups("pretrain")}


def problems_of(command: str, *overrides: str, config_file: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(command, list(overrides), config_file)
    return caught.value.problems


def test_pretrain_defaults_are_the_quickstart():
    config = compose("pretrain", [])
    assert config.experiment == "quickstart"
    assert (config.model.name, config.parameterization.name, config.data.name) == ("llama_tiny", "lost", "stdlib")
    assert config.parameterization.lost_rank == 64
    assert config.run_dir == "runs/quickstart_llama_tiny_lost_0"


@pytest.mark.parametrize(("group", "choice"), [(g, c) for g, names in PRETRAIN_GROUPS.items() for c in names])
def test_every_choice_of_every_group_is_valid(group, choice, monkeypatch):
    if choice == "ddp":
        monkeypatch.setenv("WORLD_SIZE", "1")
    override = f"{group}={choice}"
    config = compose("pretrain", [override, *COMPANIONS.get(override, [])])
    section = getattr(config, group)
    assert (section if group == "experiment" else getattr(section, "name", choice)) == choice


@pytest.mark.parametrize(
    ("model", "parameterization"), itertools.product(PRETRAIN_GROUPS["model"], PRETRAIN_GROUPS["parameterization"])
)
def test_every_model_with_every_parameterization(model, parameterization):
    config = compose("pretrain", [f"model={model}", f"parameterization={parameterization}"])
    assert (config.model.name, config.parameterization.name) == (model, parameterization)
    if parameterization == "lost":
        assert config.parameterization.lost_rank == config.model.lineage_rank


@pytest.mark.parametrize("command", ROOTS)
def test_every_command_composes_and_survives_its_dictionary(command):
    needed = {"evaluate": ["source=gpt2"], "generate": ["source=gpt2"], "export": ["source=gpt2", "to=out"]}
    needed["finetune"] = ["source=gpt2", "task=classification", "data.glue=sst2"]
    needed["convert"] = ["source=gpt2", "to=out", "parameters=0.5"]
    config = compose(command, needed.get(command, []))
    assert build(type(config), to_dict(config)) == config


@pytest.mark.parametrize("command", ["pretrain", "prepare", "plan"])
def test_typed_choice_beats_the_experiments_choice_and_value(command):
    config = compose(
        command, ["train.max_steps=7", "experiment=c4_130m", "model=llama_60m", "schedule.warmup_steps=0.5"]
    )
    assert config.model.name == "llama_60m"
    assert (config.train.max_steps, config.schedule.warmup_steps) == (7, 0.5)
    assert (config.data.name, config.train.global_batch_size) == ("c4", 512)


def test_keys_of_a_replaced_choice_go_with_it():
    config = compose("pretrain", ["experiment=c4_60m", "data=stdlib"])
    assert (config.experiment, config.data.name, config.train.global_batch_size) == ("c4_60m", "stdlib", 512)


@pytest.mark.parametrize("name", ["none", "custom"])
def test_no_experiment(name):
    config = compose("pretrain", [f"experiment={name}"])
    assert (config.experiment, config.checkpoint.every_steps) == ("custom", 100)


@pytest.mark.parametrize(("text", "value"), [("200", 200), ("1_000", 1000), ("1e3", 1000), ("+20", 20)])
def test_whole_number_forms(text, value):
    steps = compose("pretrain", [f"train.max_steps={text}"]).train.max_steps
    assert steps == value
    assert type(steps) is int


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), (".5", 0.5), ("2", 2.0), ("1_0.5", 10.5)])
def test_number_forms(text, value):
    rate = compose("pretrain", [f"optimizer.learning_rate={text}"]).optimizer.learning_rate
    assert rate == value
    assert type(rate) is float


def test_a_count_stays_a_count_and_a_fraction_a_fraction():
    fraction = compose("pretrain", ["parameterization.lost_rank=1.0"]).parameterization.lost_rank
    count = compose("pretrain", ["parameterization.lost_rank=1"]).parameterization.lost_rank
    assert (type(fraction), type(count)) == (float, int)


NASTY = [
    "",
    " ",
    "  padded  ",
    "a=b",
    "=",
    "path/with=equals/and,comma",
    "[not, a list]",
    "{not: a map}",
    "[",
    "]})",
    '"quoted"',
    "'quoted'",
    "it's",
    'say "hi", then \\"bye\\"',
    "back\\slash",
    "ends with \\",
    "\\\\",
    "${HOME}",
    "${",
    "$",
    "${oc.env:HOME}",
    "\\${x}",
    "???",
    "null",
    "true",
    "1e-3",
    "007",
    "# no comment",
    "a: b",
    "~tilde",
    "++plus",
    "--help",
    "line one\nline two\r\n\ttab",
    "ünïcödé 日本 🙂",
    "\ue0000\ue001",
    "*",
    "a,b,c",
    "%s {} {0}",
    "\x00",
]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_text_survives_as_typed_and_through_a_config_file(text, tmp_path):
    config = compose("generate", ["source=gpt2", f"prompt={text}"])
    assert config.prompt == text
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    assert compose("generate", [], str(saved)) == config


@pytest.mark.parametrize("name", ["a=b.txt", "a,b.txt", "a [1].txt", "sp ace.txt", "it's.txt", "${x}.txt", "{a}.txt"])
def test_file_names_survive_in_lists(name, tmp_path):
    path = tmp_path / name
    path.write_text("x")
    other = tmp_path / "plain.txt"
    other.write_text("x")
    config = compose("pretrain", ["data=text_files", f'data.train_files=["{path}", {other}]'])
    assert config.data.train_files == [str(path), str(other)]


def test_lists_and_maps():
    config = compose(
        "pretrain",
        [
            "data=text_files",
            f"data.train_files={__file__}",
            f"data.validation_files={{web: [{__file__}], 'a:b': [{__file__}]}}",
            "data.train_weights=[1e-1]",
            "parameterization.rank_overrides={*.q_proj: 8, down_proj: 0.5}",
            "parameterization.density_overrides.*.mlp.up_proj=0.25",
            "parameterization.target_modules=[]",
        ],
    )
    assert config.data.train_files == [__file__]
    assert config.data.validation_files == {"web": [__file__], "a:b": [__file__]}
    assert config.data.train_weights == [0.1]
    assert config.parameterization.rank_overrides == {"*.q_proj": 8, "down_proj": 0.5}
    assert config.parameterization.density_overrides == {"*.mlp.up_proj": 0.25}


def test_text_may_name_another_setting():
    config = compose("pretrain", ["run_dir=out/${model.name}/\\${seed}/${seed}", "seed=3"])
    assert config.run_dir == "out/llama_tiny/${seed}/3"


def test_added_keys_are_plain_keys():
    assert compose("pretrain", ["+train.max_steps=7", "++seed=1", "+model=llama_60m"]).train.max_steps == 7


def test_all_problems_in_one_message():
    problems = problems_of(
        "pretrain",
        "model=llama_60",
        "max_steps=3",
        "trian.seq_len=3",
        "optimizer.lerning_rate=1",
        "~seed",
        "--verbose",
        "word",
        "train.seq_len=abc",
        "parameterization.gamma=1.5",
        "data.train_files=[x]",
        "checkpoint.resume=allways",
        "schedule.warmup_steps=1.5",
        "model.num_attention_heads=7",
        "train=5",
    )
    text = "\n".join(problems)
    for expected in (
        "model=llama_60: must be one of llama_tiny, llama_60m, llama_130m, llama_350m, llama_1b, llama_7b (did you mean"
        " llama_60m?)",
        "unknown key max_steps (did you mean train.max_steps?)",
        "unknown key trian.seq_len (did you mean train.seq_len?)",
        "unknown key optimizer.lerning_rate (did you mean optimizer.learning_rate?)",
        "~seed: a setting cannot be removed",
        "unknown option --verbose",
        "'word' has no '='",
        "train.seq_len = 'abc': must be a whole number",
        "parameterization.gamma = 1.5: must be at most 1",
        "unknown key data.train_files: it belongs to text_files, and stdlib is chosen",
        "checkpoint.resume = 'allways': must be auto, never, must",
        "schedule.warmup_steps = 1.5: a fraction",
        "model.num_attention_heads = 7 does not divide hidden_size = 256",
        "train=5: train is a group of keys",
    ):
        assert expected in text
    assert len(problems) == 14


def test_unknown_choice_of_every_group_lists_the_known_ones():
    for group, known in PRETRAIN_GROUPS.items():
        (problem,) = problems_of("pretrain", f"{group}=nonsense")
        assert problem.startswith(f"{group}=nonsense: must be one of {', '.join(known)}")


def test_missing_keys_are_named_with_their_meaning():
    assert problems_of("export") == [
        "source is missing: run directory, checkpoint, export or hub id",
        "to is missing: folder to write",
    ]


class TestConfigFile:
    @pytest.fixture
    def saved(self, tmp_path) -> Path:
        config = compose("pretrain", ["model=llama_60m", "schedule=wsd", "train.max_steps=77", "seed=5"])
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        return path

    def test_resolved_config_comes_back_equal(self, saved):
        config = compose("pretrain", [], str(saved))
        assert to_dict(config) == yaml.safe_load(saved.read_text())

    def test_overrides_lie_on_top(self, saved):
        config = compose("pretrain", ["train.max_steps=9", "schedule=constant", "parameterization=dense"], str(saved))
        assert (config.train.max_steps, config.schedule.name, config.parameterization.name) == (9, "constant", "dense")
        assert (config.model.name, config.seed) == ("llama_60m", 5)

    def test_partial_file_lies_over_the_defaults(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(
            "experiment: mine\nmodel: {name: llama_60m}\noptimizer: {learning_rate: 1e-4}\ntrain: {max_steps: 1e2}\n"
        )
        config = compose("pretrain", [], str(path))
        assert (config.model.hidden_size, config.parameterization.lost_rank) == (512, 128)
        assert (config.optimizer.learning_rate, config.train.max_steps) == (1e-4, 100)
        assert config.run_dir == "runs/mine_llama_60m_lost_0"

    def test_a_model_of_ones_own(self, saved, tmp_path):
        content = yaml.safe_load(saved.read_text())
        content["model"] |= {"name": "mine", "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
        content["parameterization"]["lost_rank"] = 5
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(content))
        assert compose("pretrain", [], str(path)).model.hidden_size == 96

    def test_unknown_keys_of_a_file(self, tmp_path):
        path = tmp_path / "bad.yaml"
        path.write_text("train: {max_stepz: 3}\nxyz: 1\n7: x\n")
        assert problems_of("pretrain", config_file=str(path)) == [
            "unknown key xyz",
            "unknown key 7",
            "unknown key train.max_stepz (did you mean max_steps?)",
        ]

    @pytest.mark.parametrize("content", ["- a\n", "a: [", "just text", ""])
    def test_what_is_no_map_of_keys(self, content, tmp_path):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        (problem,) = problems_of("pretrain", config_file=str(path))
        assert str(path) in problem

    def test_a_folder(self, tmp_path):
        (problem,) = problems_of("pretrain", config_file=str(tmp_path))
        assert "is a folder: name its config.yaml" in problem

    def test_missing_file(self):
        assert problems_of("pretrain", config_file="/no/such.yaml") == [
            "--config-file /no/such.yaml: there is no such file"
        ]

    def test_an_experiment_does_not_go_with_a_file(self, saved):
        (problem,) = problems_of("pretrain", "experiment=c4_60m", config_file=str(saved))
        assert "experiment=c4_60m with --config-file" in problem


def test_max_tokens_alone_is_the_length_of_the_run():
    train = compose("pretrain", ["train.max_tokens=1_000_000"]).train
    assert (train.max_steps, train.num_steps) == (0, 245)
    both = compose("pretrain", ["train.max_tokens=1_000_000", "train.max_steps=7"]).train
    assert both.num_steps == 7


def test_an_unknown_key_of_a_known_group_lists_the_keys_there():
    with pytest.raises(ConfigError, match=r"unknown key optimizer\.lr: the keys there are .*optimizer\.learning_rate"):
        compose("pretrain", ["optimizer.lr=1"])
