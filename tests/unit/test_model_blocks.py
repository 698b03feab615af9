"""lost_llama's attention and MLP: which layers share operators, and that nothing else differs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from lost.config.model import DenseConfig, LostConfig
from lost.model import LostLlamaConfig, LostLlamaForCausalLM, build_model
from lost.model.blocks import LostLlamaAttention
from lost.testing.lost_groups import SMALL
from lost.testing.numerics import assert_close as assert_within
from lost.train.wrap import blocks, set_kernels, set_recompute

LOST = LostConfig(lost_rank=5, density=0.1)
FORMS = {
    "default": LOST,
    "learnable gamma": replace(LOST, gamma_mode="learnable"),
    "folded": replace(LOST, gamma_mode="folded"),
    "rows": replace(LOST, selection_axis="rows"),
    "no sparse block": replace(LOST, density=0.0),
    "ranks of their own": replace(LOST, rank_overrides={"k_proj": 3, "up_proj": 7}, density_overrides={"q_proj": 0.3}),
    "one of three": replace(LOST, target_modules=["q_proj", "mlp.*"]),
}
DOWN, UP = torch.ops.lost.group_down.default, torch.ops.lost.group_up.default


def model(form=LOST, **changes):
    net = build_model(replace(SMALL, **changes), form, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return net


def ids(num_rows=2, seq_len=19):
    return torch.randint(0, 97, (num_rows, seq_len), generator=torch.Generator().manual_seed(5))


def loss_and_gradients(net, kernels):
    set_kernels(net, kernels)
    net.zero_grad()
    loss = net(ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def assert_same(ours, expected, name):
    """A learnable gamma is float32 in a float64 model, and so is its gradient."""
    assert_within(ours, expected, "float32" if name.endswith("gamma") else "initialisation", name)


class Calls(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_pass(net):
    with Calls() as calls, torch.no_grad():
        net(ids(), use_cache=False)
    return calls.counts[DOWN], calls.counts[UP]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_the_definition(form, attention):
    net = model(form)
    net.set_attn_implementation(attention)
    expected = loss_and_gradients(net, "reference")
    for name, value in loss_and_gradients(net, "grouped").items():
        assert_same(value, expected[name], name)


def test_the_definition_sees_another_model():
    """Negative control: one index of one layer moved by one channel."""
    net = model()
    expected = loss_and_gradients(net, "reference")["loss"]
    net.model.layers[1].self_attn.v_proj.sparse_index.sub_(1)
    assert abs(loss_and_gradients(net, "grouped")["loss"] - expected) > 1e-6


def test_layers_that_read_one_input_share_operators():
    net = model()
    # Two blocks of q/k/v, o, gate/up and down.
    assert calls_of_a_pass(net) == (2 * 4, 2 * 4)
    set_kernels(net, "reference")
    assert calls_of_a_pass(net) == (0, 0)


def test_layers_that_cannot_share_are_called_by_themselves():
    assert calls_of_a_pass(model(FORMS["one of three"])) == (2 * 3, 2 * 3)
    net = model()
    seen = []
    net.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: seen.append("k_proj"))
    net.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append("up_proj"))
    assert calls_of_a_pass(net) == (6 + 5, 6 + 5)
    assert seen == ["k_proj", "up_proj"]


def test_parameters_have_the_names_of_single_layers():
    names = set(model().state_dict())
    assert "model.layers.1.self_attn.k_proj.low_rank_down" in names
    assert "model.layers.1.mlp.up_proj.sparse_index" in names
    dense = {name.removesuffix(".weight") for name in model(DenseConfig()).state_dict()}
    suffixes = (".low_rank_down", ".low_rank_up", ".sparse_weight", ".sparse_index", ".weight")
    assert {name.removesuffix(suffix) for name in names for suffix in suffixes if name.endswith(suffix)} == dense


def test_dense_models_are_transformers_own():
    net = model(DenseConfig())
    assert type(net) is LlamaForCausalLM
    assert type(net.model.layers[0].self_attn) is LlamaAttention


def test_attention_weights_can_be_asked_for():
    net = model()
    net.set_attn_implementation("eager")
    assert type(net.model.layers[0].self_attn) is LostLlamaAttention
    weights = net(ids(), output_attentions=True, use_cache=False).attentions
    assert len(weights) == 2
    assert torch.allclose(weights[0].sum(-1), torch.ones(2, 4, 19, dtype=torch.float64))


def test_biases_of_the_architecture():
    config = LostLlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=63,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_bias=True,
        mlp_bias=True,
        parameterization={"name": "lost", "lost_rank": 5, "density": 0.1},
    )
    torch.manual_seed(0)
    net = LostLlamaForCausalLM(config).double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(0, 0.1) if name.endswith("bias") else None
    expected = loss_and_gradients(net, "reference")
    for name, value in loss_and_gradients(net, "grouped").items():
        assert_same(value, expected[name], name)


@pytest.mark.parametrize("recompute", ["none", "p1", "p3", "block"])
def test_blocks_compile_into_one_graph_without_breaks(recompute):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = model()
    expected = loss_and_gradients(net, "reference")
    set_kernels(net, "grouped")
    set_recompute(net, recompute, is_traced=True)
    for block in blocks(net):
        block.compile(backend="aot_eager")
    for name, value in loss_and_gradients(net.train(), "grouped").items():
        assert_same(value, expected[name], name)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
