"""inject: what it replaces in transformers models and plain modules, what it keeps, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lost
from lost.config.model import LostConfig
from lost.model.inject import inject
from lost.model.lost_linear import LostLinear
from lost.model.targets import Projections
from lost.utils.errors import ConfigError, LostError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
IDS = torch.arange(24).reshape(2, 12)


def qwen2(**options) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, **options))


def gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def randomise_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)


def settings(**options) -> LostConfig:
    return LostConfig(**{"lost_rank": 0.25, "density": 0.1, **options})


def replaced(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, LostLinear)]


def linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (qwen2, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (gpt_neox, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_transformers_family(make, ends):
    model = make()
    randomise_biases(model)
    biases = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("bias")}
    before = sum(p.numel() for p in model.parameters())
    report = lost.inject(model, settings())
    assert {name.rsplit(".")[-1] for name in report.names} == ends
    assert report.names == replaced(model)
    assert len(report.names) == 2 * len(ends)
    # The head alone is left dense.
    assert [name.rsplit(".")[-1] for name in linears(model)] in (["lm_head"], ["embed_out"])
    assert report.num_parameters_before == before
    assert report.num_parameters_after == sum(p.numel() for p in model.parameters()) < before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in biases.items())
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.generate(IDS[:, :3], max_new_tokens=3, do_sample=False).shape == (2, 6)


@pytest.mark.parametrize("make", [qwen2, gpt_neox])
def test_full_rank_conversion_keeps_the_logits(make):
    """The factorised weights are those of the model, layer by layer, biases included."""
    model = make().double()
    randomise_biases(model)
    expected = model(input_ids=IDS).logits
    inject(model, settings(lost_rank=1.0, gamma=1, activation="identity"))
    assert torch.allclose(model(input_ids=IDS).logits, expected, rtol=1e-9, atol=1e-9)


def test_report_counts_each_layer():
    model = qwen2()
    report = inject(model, settings())
    key = next(layer for layer in report.layers if layer.name == "model.layers.0.self_attn.k_proj")
    assert (key.in_features, key.out_features, key.lost_rank, key.num_kept) == (32, 16, 4, 3)
    assert key.num_parameters_before == 32 * 16 + 16
    assert key.num_parameters_after == 4 * (32 + 16) + 16 * 3 + 16
    assert key.activation == "silu"
    difference = sum(layer.num_parameters_before - layer.num_parameters_after for layer in report.layers)
    assert report.num_parameters_before - report.num_parameters_after == difference
    assert "model.layers.0.self_attn.k_proj: 32 -> 16, rank 4, kept 3" in str(report)
    assert "14 linears replaced" in str(report)


def test_meta_swaps_without_values():
    with torch.device("meta"):
        model = qwen2()
    report = inject(model, settings())
    assert len(report.names) == 14
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.model.layers.buffers()} == {"meta"}


# ----------------------------------------------------------------------------------------- plain modules


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Sequential(nn.Linear(30, 30), nn.Tanh()), nn.Linear(30, 5))


def test_plain_module_needs_targets():
    with pytest.raises(ConfigError, match=r"a plain Sequential are not known.*\[all_linear\].*0, 2\.0, 3"):
        inject(plain(), settings())


def test_all_linear():
    model = plain()
    assert inject(model, settings(target_modules=["all_linear"])).names == ["0", "2.0", "3"]
    model(torch.randn(7, 20)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("patterns", "names"),
    [(["0"], ["0", "2.0"]), (["2.0"], ["2.0"]), (["2.*", "3"], ["2.0", "3"]), (["*"], ["0", "2.0", "3"])],
)
def test_patterns_match_the_end_of_the_name(patterns, names):
    model = plain()
    assert inject(model, settings(target_modules=patterns)).names == names
    assert replaced(model) == names


def test_patterns_match_whole_parts_only():
    """o_proj is not the end of foo_proj as a name, though it is as text."""
    model = nn.ModuleDict({"foo_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8)})
    assert inject(model, settings(target_modules=["o_proj"])).names == ["o_proj"]


def test_all_linear_leaves_the_output_head_dense():
    model = qwen2()
    inject(model, settings(target_modules=["all_linear"]))
    assert linears(model) == ["lm_head"]
    inject(model, settings(target_modules=["lm_head"]))
    assert linears(model) == []


def test_family_targets_of_an_unknown_family():
    projections = Projections(attention=("0",), mlp=("3",))
    model = plain()
    report = inject(model, settings(activation_modules="mlp"), family_targets=projections)
    assert [layer.activation for layer in report.layers] == ["identity", "identity", "silu"]


def test_attention_out_projection_of_torch_is_left_alone():
    """nn.MultiheadAttention reads its weight directly."""
    model = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    report = inject(model, settings(target_modules=["all_linear"]))
    assert report.names == ["linear1", "linear2"]
    model(torch.randn(2, 3, 16), torch.randn(2, 4, 16)).sum().backward()


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_torch_encoder_works_in_evaluation_too(is_wrapped):
    """Its fast path reads linear1.weight."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if is_wrapped else layer
    inject(model, settings(target_modules=["all_linear"]))
    x = torch.randn(2, 5, 16)
    model.train().requires_grad_(False)
    for child in model.modules():
        if isinstance(child, nn.Dropout | nn.MultiheadAttention):
            child.p = child.dropout = 0.0
    expected = model(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), expected, atol=1e-6)


# ---------------------------------------------------------------------------------- options by module name


def test_overrides_by_pattern_the_last_match_wins():
    model = qwen2()
    overrides = {"self_attn.*": 5, "layers.1.self_attn.q_proj": 0.5}
    report = inject(model, settings(lost_rank=8, rank_overrides=overrides, density_overrides={"down_proj": 0}))
    ranks = {layer.name.removeprefix("model.layers."): layer.lost_rank for layer in report.layers}
    assert ranks["0.self_attn.q_proj"] == ranks["1.self_attn.k_proj"] == 5
    assert ranks["1.self_attn.q_proj"] == 16
    assert ranks["0.mlp.up_proj"] == 8
    assert {layer.num_kept for layer in report.layers if layer.name.endswith("down_proj")} == {0}
    assert {layer.num_kept for layer in report.layers if not layer.name.endswith("down_proj")} == {3}


@pytest.mark.parametrize("which", ["all", "attention", "mlp"])
@pytest.mark.parametrize("make", [qwen2, gpt_neox])
def test_activation_modules(which, make):
    model = make()
    for layer in inject(model, settings(activation_modules=which, activation="gelu")).layers:
        is_attention = "attn" in layer.name or "attention" in layer.name
        has_activation = which == "all" or (which == "attention") == is_attention
        assert layer.activation == ("gelu" if has_activation else "identity")
        assert model.get_submodule(layer.name).activation == layer.activation


def test_drawn_options_depend_on_seed_and_name_only():
    options = settings(target_modules=["q_proj"], factor_init="cola")
    first, again, other = qwen2(), qwen2(), qwen2()
    inject(first, options)
    inject(again, settings(factor_init="cola"))
    inject(other, options, seed=1)
    name = "model.layers.1.self_attn.q_proj.low_rank_down"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], first.state_dict()[name.replace("1", "0", 1)])


# ------------------------------------------------------------------------------------------------ kept, shared


def test_flags_and_dtype_are_kept():
    model = qwen2().to(torch.bfloat16).eval()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.train()
    inject(model, settings())
    for index, block in enumerate(model.model.layers):
        for name, child in block.named_modules():
            if isinstance(child, LostLinear):
                assert child.low_rank_up.dtype == torch.bfloat16
                assert {p.requires_grad for p in child.parameters()} == {index == 1}
                assert child.training == (index == 1 and name.startswith("mlp"))


def test_shared_linear_stays_shared():
    linear = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(linear, nn.ReLU()), "b": linear})
    report = inject(model, settings(target_modules=["b"]))
    assert report.names == ["a.0"]
    assert model["b"] is model["a"][0]
    assert isinstance(model["b"], LostLinear)


def test_shared_linear_in_one_list_at_two_places():
    block = nn.Sequential(nn.Linear(16, 16))
    model = nn.ModuleList([block, block])
    assert inject(model, settings(target_modules=["all_linear"])).names == ["0.0"]
    assert model[0][0] is model[1][0]


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"target_modules: q_prj names no linear.*nearest: model\.layers\.0\.self_attn\.q_proj",
        ),
        ({"target_modules": ["q_proj", "mlp"]}, "target_modules: mlp names no linear"),
        ({"rank_overrides": {"up_prj": 3}}, r"rank_overrides: up_prj names no linear.*model\.layers\.0\.mlp\.up_proj"),
        ({"density_overrides": {"lm_head": 0.5}}, "density_overrides: lm_head names no linear"),
        ({"lost_rank": 17}, r"model\.layers\.1\.self_attn\.k_proj: lost_rank = 17 .* = 16"),
        ({"rank_overrides": {"up_proj": 33}}, r"model\.layers\.0\.mlp\.up_proj: lost_rank = 33 .* = 32"),
        ({"target_modules": ["lm_head"]}, r"lm_head\.weight is tied with model\.embed_tokens\.weight"),
    ],
)
def test_mistakes_are_named_and_change_nothing(options, words):
    model = qwen2(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LostError, match=words):
        inject(model, settings(**options))
    assert list(model.state_dict()) == list(before)
    assert replaced(model) == []


def test_tied_head_is_refused_on_meta_too():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    with pytest.raises(ConfigError, match="tied"):
        inject(model, settings(target_modules=["lm_head"]))


def test_two_linears_with_one_weight_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ConfigError, match=r"a\.weight is tied with b\.weight"):
        inject(model, settings(target_modules=["all_linear"]))


def test_nothing_to_replace():
    with pytest.raises(ConfigError, match=r"no nn\.Linear inside this ReLU"):
        inject(nn.ReLU(), settings(target_modules=["all_linear"]))
    with pytest.raises(ConfigError, match=r"LostLinear\.from_linear"):
        inject(nn.Linear(3, 4), settings(target_modules=["all_linear"]))


def test_role_of_unknown_projections_is_refused():
    with pytest.raises(ConfigError, match="activation_modules = mlp"):
        inject(plain(), settings(target_modules=["all_linear"], activation_modules="mlp"))
