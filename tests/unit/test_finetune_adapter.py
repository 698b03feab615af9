"""LOST adapters and LoRA beside dense and LOST layers: the start, the formula, merging, what is trained."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lost.assemble.adapter import fingerprint_of, merged
from lost.config.finetune import FullMethodConfig, LoraMethodConfig, LostAdapterMethodConfig
from lost.config.model import LostConfig
from lost.finetune.methods import apply_method
from lost.model.adapter import LostAdapter, adapter_targets
from lost.model.inject import inject
from lost.model.lost_linear import LostLinear
from lost.testing.tiny import tiny_llama
from lost.train.engine import trained_names, trained_tensors
from lost.utils.errors import ConfigError, LostError

IDS = torch.randint(0, 258, (2, 9), generator=torch.Generator().manual_seed(3))


def lost_llama():
    model = tiny_llama()
    inject(model, LostConfig(lost_rank=5, density=0.1))
    return model


def shaken(model, seed=0):
    """The model with random trained weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def adapted(model, **settings):
    method = LostAdapterMethodConfig(rank=3, density=0.1, **settings)
    return apply_method(model, method, [], seed=1)


@pytest.mark.parametrize("make", [tiny_llama, lost_llama])
def test_a_zero_start_is_the_model_itself(make):
    expected = logits(make())
    model = adapted(make())
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(shaken(model)), expected, atol=1e-3)


def test_an_svd_start_is_the_model_itself_up_to_rounding():
    expected = logits(tiny_llama().double())
    model = adapted(tiny_llama().double(), init="svd")
    assert torch.allclose(logits(model), expected, atol=1e-10)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, LostAdapter)
    # The factors are those of the largest singular values of W, and W itself is not what is left.
    original = tiny_llama().double().get_submodule("model.layers.0.mlp.up_proj").weight
    values = torch.linalg.svdvals(layer.delta.low_rank_up @ layer.delta.low_rank_down)[:3]
    assert torch.allclose(values, torch.linalg.svdvals(original)[:3])
    assert not torch.allclose(layer.base.weight, original, atol=1e-3)


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_the_formula(activation):
    model = shaken(adapted(tiny_llama(), alpha=12.0, gamma=0.6, activation=activation))
    layer = model.get_submodule("model.layers.1.self_attn.k_proj")
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    act = {"identity": lambda h: h, "silu": nn.functional.silu}[activation]
    delta = layer.delta
    low_rank = act(x @ delta.low_rank_down.T) @ delta.low_rank_up.T
    sparse = x[:, delta.sparse_index] @ delta.sparse_weight.T
    expected = x @ layer.base.weight.T + (12.0 / 3) * (0.6 * low_rank + 0.4 * sparse)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("init", ["zero", "svd"])
def test_merging_gives_a_plain_model_of_the_same_function(init):
    model = shaken(adapted(tiny_llama(), init=init))
    expected = logits(model)
    plain, left = merged(model)
    assert left == []
    assert not any(isinstance(module, LostAdapter | LostLinear) for module in plain.modules())
    assert torch.allclose(logits(plain), expected, atol=1e-4)


def test_what_cannot_be_merged_stays():
    for model in (adapted(lost_llama()), adapted(tiny_llama(), activation="relu")):
        expected = logits(shaken(model))
        same, left = merged(model)
        assert len(left) == 14
        assert torch.equal(logits(same), expected)


@pytest.mark.parametrize("make", [tiny_llama, lost_llama])
def test_lora_beside_both_kinds_of_layers(make):
    pytest.importorskip("peft")
    before = make()
    model = apply_method(copy.deepcopy(before), LoraMethodConfig(rank=2, alpha=6.0), [], seed=0)
    assert torch.equal(logits(model), logits(before))
    shaken(model)
    layer = model.base_model.model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(5))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = before.get_submodule("model.layers.0.mlp.down_proj")(x) + 3.0 * x @ a.T @ b.T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    after = logits(model)
    plain, left = merged(model)
    assert torch.allclose(logits(plain), after, atol=1e-4)
    assert len(left) == (14 if make is lost_llama else 0)


def test_only_the_adapter_and_the_head_are_trained_and_kept():
    model = adapted(lost_llama())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".delta." in name for name in trained)
    # The kept channels belong to the adapter, those of the frozen LOST layers do not.
    assert all(".delta." in name for name in trained_names(model))
    assert "model.layers.0.self_attn.q_proj.delta.sparse_index" in trained_names(model)
    whole = apply_method(lost_llama(), FullMethodConfig(), [], seed=0)
    assert trained_names(whole) == set(whole.state_dict())


@pytest.mark.parametrize("init", ["zero", "svd"])
def test_stored_tensors_bring_the_function_back(init):
    model = shaken(adapted(tiny_llama(), init=init))
    stored = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    method = LostAdapterMethodConfig(rank=3, density=0.1, init=init)
    again = apply_method(tiny_llama(), method, [], seed=99, stored=stored)
    assert torch.equal(logits(again), logits(model))
    del stored["model.layers.0.self_attn.q_proj.delta.low_rank_up"]
    with pytest.raises(LostError, match=r"q_proj lacks low_rank_up"):
        apply_method(tiny_llama(), method, [], seed=0, stored=stored)


def test_mistakes():
    with pytest.raises(ConfigError, match=r"qq_proj names no linear layer; nearest: .*q_proj"):
        adapter_targets(tiny_llama(), ["qq_proj"])
    with pytest.raises(ConfigError, match=r"init = svd: .* is no dense layer"):
        adapted(lost_llama(), init="svd")
    with pytest.raises(LostError, match=r"rank = 25 is above the smaller width of .*, 24"):
        apply_method(tiny_llama(), LostAdapterMethodConfig(rank=25), [], seed=0)
    assert set(adapter_targets(tiny_llama(), ["q_proj", "lm_head"])) == {
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)),
        "lm_head",
    }


@pytest.mark.parametrize("method", [LostAdapterMethodConfig, LoraMethodConfig])
def test_a_tied_head_takes_no_adapter(method):
    tied = tiny_llama(tie_word_embeddings=True)
    config = method(rank=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"weight of lm_head is that of model\.embed_tokens too"):
        apply_method(tied, config, [], 0)
    assert not any(isinstance(module, LostAdapter) for module in tied.modules())
    apply_method(tiny_llama(tie_word_embeddings=False), config, [], 0)


def test_a_fingerprint_knows_the_weights_whatever_their_dtype():
    model = tiny_llama()
    assert fingerprint_of(model) == fingerprint_of(tiny_llama().bfloat16())
    assert fingerprint_of(model) != fingerprint_of(tiny_llama(seed=1))
    assert fingerprint_of(model, ["lm_head"]) != fingerprint_of(model)


def test_blocks_without_a_linear_layer_take_no_adapter():
    """GPT-2's are transformers' Conv1D."""
    sizes = {
        "vocab_size": 50,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    for method in (LostAdapterMethodConfig(), LoraMethodConfig()):
        with pytest.raises(ConfigError, match=r"the blocks of GPT2LMHeadModel have no linear layer .*use method=full"):
            apply_method(model, method, [], 0)
