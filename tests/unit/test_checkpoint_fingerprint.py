"""What may not change on resume is named, with both values; what may change is not."""

import dataclasses
from dataclasses import dataclass

import pytest

from lost.checkpoint import check_same, differences, fixed_keys
from lost.config.model import DenseConfig, LostConfig, ModelConfig, ParameterizationConfig
from lost.config.section import Section, setting, to_dict
from lost.config.training import AdamWConfig, TrainConfig
from lost.utils.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Parts(Section):
    """A small run config of real sections."""

    model: ModelConfig = setting("model")
    parameterization: ParameterizationConfig = setting("form")
    train: TrainConfig = setting("length")
    optimizer: AdamWConfig = setting("optimizer")


def parts(parameterization: ParameterizationConfig | None = None, **train) -> Parts:
    model = ModelConfig(
        name="tiny",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        lineage_rank=4,
    )
    return Parts(
        model=model,
        parameterization=parameterization or LostConfig(),
        train=TrainConfig(max_steps=3, **train),
        optimizer=AdamWConfig(learning_rate=1e-3),
    )


def found(old: Section, new: Section) -> list[str]:
    return differences(to_dict(old), to_dict(new), fixed_keys(new))


def test_fixed_keys_are_those_of_the_schema():
    keys = fixed_keys(parts())
    assert {"model.hidden_size", "train.seq_len", "train.global_batch_size", "parameterization.lost_rank"} <= set(keys)
    assert not {"model.name", "train.micro_batch_size", "train.max_hours", "optimizer.learning_rate"} & set(keys)


def test_equal_configs_have_no_differences():
    assert found(parts(), parts()) == []


def test_each_changed_fixed_key_is_named_with_both_values():
    new = parts(seq_len=128, global_batch_size=8)
    new = dataclasses.replace(new, model=dataclasses.replace(new.model, hidden_size=32))
    assert found(parts(), new) == [
        "model.hidden_size: checkpoint 16, now 32",
        "train.seq_len: checkpoint 256, now 128",
        "train.global_batch_size: checkpoint 16, now 8",
    ]


def test_what_may_change_is_not_a_difference():
    new = parts(micro_batch_size=2, max_hours=5.0)
    new = dataclasses.replace(new, optimizer=AdamWConfig(learning_rate=5e-4))
    assert found(parts(), new) == []


def test_another_choice_is_one_line():
    assert found(parts(), parts(DenseConfig())) == ["parameterization.name: checkpoint lost, now dense"]
    assert found(parts(DenseConfig()), parts()) == ["parameterization.name: checkpoint dense, now lost"]


def test_maps_lists_and_new_keys():
    old, new = parts(), parts(LostConfig(rank_overrides={"layers.0": 3}))
    assert found(old, new) == ["parameterization.rank_overrides: checkpoint {}, now {'layers.0': 3}"]
    assert differences({"a": [1, 2]}, {"a": (1, 2)}, ["a"]) == []
    assert differences({"a": [1, 2]}, {"a": [2, 1]}, ["a"]) == ["a: checkpoint [1, 2], now [2, 1]"]
    assert differences({"a": {}}, {"a": {"b": 1}}, ["a.b"]) == ["a.b: checkpoint has none, now 1"]
    assert differences({"a": ""}, {"a": "x"}, ["a"]) == ["a: checkpoint '', now x"]


def test_check_same_lists_all_and_says_what_to_do():
    check_same(to_dict(parts()), to_dict(parts()), fixed_keys(parts()), "step_00000001")
    with pytest.raises(CheckpointError) as error:
        check_same(to_dict(parts()), to_dict(parts(seq_len=64)), fixed_keys(parts()), "step_00000001")
    for part in ("step_00000001", "train.seq_len: checkpoint 256, now 64", "choose another run_dir"):
        assert part in str(error.value)
