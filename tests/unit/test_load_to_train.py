"""`lost pretrain source=`: the model that training goes on from, and the models that it cannot describe."""

import pytest
import torch

from lost.assemble.source import Start, start_of
from lost.config.compose import compose
from lost.export import save_folder
from lost.model import build_model
from lost.model.build import materialise
from lost.model.split import Processes
from lost.testing.runs import TINY_MODEL
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import ConfigError


def made_by(start: Start, dtype: torch.dtype):
    """The model of step 0, as a single process builds it."""
    model = start.make_meta_model(dtype, start.tokenizer)
    materialise(model, start.config.parameterization, "cpu")
    start.fill(model, Processes())
    return model


def config_for(source, tmp_path):
    return compose("pretrain", [f"source={source}", f"run_dir={tmp_path / 'new'}", "train.seq_len=32"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_export_gives_its_model_and_sections(tmp_path, dtype):
    overrides = [*TINY_MODEL, "run_dir=unused", "parameterization.gamma_mode=learnable", "model.rope_theta=500.0"]
    original = compose("pretrain", overrides)
    model = build_model(original.model, original.parameterization, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.123456789)
    source = save_folder(model, tiny_tokenizer(), tmp_path / "export", "card")
    start = start_of(config_for(source, tmp_path))
    assert start.config.parameterization == original.parameterization
    assert start.config.model.rope_theta == 500.0
    assert start.config.model.hidden_size == original.model.hidden_size
    made = made_by(start, dtype)
    for name, value in model.state_dict().items():
        keeps = name.endswith("gamma") or not value.is_floating_point()
        assert torch.equal(made.state_dict()[name], value if keeps else value.to(dtype)), name
    # Rounded to bfloat16 the frequencies would be other positions.
    assert torch.equal(made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 6}, "head_dim = 6"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope_parameters"),
    ],
)
def test_what_the_config_cannot_say_is_refused(tmp_path, changes, named):
    source = save_folder(tiny_llama(**changes), tiny_tokenizer(), tmp_path / "export", "card")
    with pytest.raises(ConfigError, match=named) as caught:
        start_of(config_for(source, tmp_path))
    assert len(caught.value.problems) == 1


def test_a_dense_export_is_accepted(tmp_path):
    model = tiny_llama()
    start = start_of(config_for(save_folder(model, tiny_tokenizer(), tmp_path / "export", "card"), tmp_path))
    made = made_by(start, torch.float32)
    assert all(torch.equal(made.state_dict()[name], value) for name, value in model.state_dict().items())
