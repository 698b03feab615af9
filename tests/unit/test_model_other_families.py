"""lost_mistral, lost_qwen2, ...: every registered family saves, loads, generates and swaps its own projections."""

import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lost.config.model import LostConfig
from lost.config.section import to_dict
from lost.model import LostLinear
from lost.model.families import register
from lost.model.other_families import OTHER_FAMILIES, register_other_families
from lost.utils.errors import ConfigError

LOST = {"name": "lost", "lost_rank": 5, "density": 0.1, "activation": "identity"}
# Linears of one block; the fused families have fewer.
NUM_PROJECTIONS = {"gpt_neox": 4, "phi": 6, "phi3": 4}


def config_of(family, **parameterization):
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = sizes | {"vocab_size": 97, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    return AutoConfig.for_model(
        f"lost_{family}", **keys, pad_token_id=0, initializer_range=0.2, parameterization=LOST | parameterization
    )


def perturbed(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_a_family_saves_loads_and_generates(tmp_path, family):
    torch.manual_seed(0)
    net = perturbed(AutoModelForCausalLM.from_config(config_of(family)))
    ids = torch.randint(1, 97, (2, 11))
    assert sum(isinstance(module, LostLinear) for module in net.modules()) == 2 * NUM_PROJECTIONS.get(family, 7)
    net.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(net)
    assert type(loaded).__name__.startswith("Lost")
    assert loaded.config.parameterization == to_dict(LostConfig(**LOST))
    assert torch.equal(loaded(ids).logits, net(ids).logits)
    assert torch.isfinite(net(ids).logits).all()
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    same = getattr(net, net.base_model_prefix)(ids).last_hidden_state
    assert torch.equal(backbone(ids).last_hidden_state, same)
    texts = [
        loaded.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache).tolist() for cache in (True, False)
    ]
    assert texts[0] == texts[1]


def test_the_layers_are_read_in_the_forward_pass():
    """A sparse block that is changed changes the logits: the swapped layers are the ones in use."""
    net = perturbed(AutoModelForCausalLM.from_config(config_of("qwen3")))
    ids = torch.randint(1, 97, (1, 7))
    before = net(ids).logits
    with torch.no_grad():
        net.model.layers[1].mlp.down_proj.sparse_weight.add_(1.0)
    assert not torch.allclose(net(ids).logits, before, atol=1e-3)


def test_classes_pickle_and_register_twice():
    register()
    register_other_families()
    config = config_of("mistral")
    assert type(pickle.loads(pickle.dumps(config))) is type(config)
    assert AutoModelForCausalLM.from_config(config).config.model_type == "lost_mistral"


def test_a_wrong_parameterization_is_named():
    with pytest.raises(ConfigError, match="densty"):
        config_of("qwen2", densty=0.1)
    with pytest.raises(ConfigError, match="q_porj"):
        AutoModelForCausalLM.from_config(config_of("qwen2", target_modules=["q_porj"]))
