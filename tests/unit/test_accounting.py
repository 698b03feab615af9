"""Parameters and FLOPs from the config alone, against the table of the method, the real models and torch's counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lost.accounting import count_parameters, flops_per_token, forward_flops
from lost.accounting.costs import linear_costs
from lost.cli.plan import packaged_model
from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.model.build import build_meta_model, build_model
from lost.utils.errors import ConfigError

SIZES = ["llama_tiny", "llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b"]

# Millions of parameters (dense, LOST density .01, .05) as the papers' architectures give them; 7B to 1 M.
TABLE = {
    "llama_tiny": (5.26, 3.37, None),
    "llama_60m": (58.07, 43.02, 44.01),
    "llama_130m": (134.11, 94.78, 98.21),
    "llama_350m": (367.97, 188.18, 200.28),
    "llama_1b": (1339.08, 621.14, 669.52),
    "llama_7b": (6738.42, 2885, 3144),
}


def lost_of(model: ModelConfig, **settings) -> LostConfig:
    return LostConfig(**{"lost_rank": model.lineage_rank, **settings})


def small(**settings) -> ModelConfig:
    sizes = {
        "name": "small",
        "vocab_size": 300,
        "hidden_size": 60,
        "intermediate_size": 101,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "lineage_rank": 7,
    }
    return ModelConfig(**{**sizes, **settings})


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_the_papers(name):
    model = packaged_model(name)
    dense, lost, lost_denser = TABLE[name]
    tolerance = 1.0 if name == "llama_7b" else 0.01
    assert count_parameters(model, DenseConfig()) / 1e6 == pytest.approx(dense, abs=tolerance / 2 + 1e-9)
    assert count_parameters(model, lost_of(model)) / 1e6 == pytest.approx(lost, abs=tolerance / 2 + 1e-9)
    if lost_denser:
        counted = count_parameters(model, lost_of(model, density=0.05)) / 1e6
        assert counted == pytest.approx(lost_denser, abs=tolerance / 2 + 1e-9)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("is_dense", [True, False])
def test_the_models_themselves_have_as_many(name, is_dense):
    model = packaged_model(name)
    form = DenseConfig() if is_dense else lost_of(model)
    net = build_meta_model(model, form)
    assert sum(parameter.numel() for parameter in net.parameters()) == count_parameters(model, form)


VARIANTS = {
    "plain": {},
    "learnable gamma": {"gamma_mode": "learnable"},
    "folded gamma": {"gamma_mode": "folded"},
    "rows": {"selection_axis": "rows", "density": 0.1},
    "no sparse block": {"density": 0.0},
    "rank as a fraction": {"lost_rank": 0.3},
    "some modules": {"target_modules": ["mlp.*", "layers.1.self_attn.q_proj"]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "all_linear": {"target_modules": ["all_linear"]},
    "overrides": {
        "rank_overrides": {"down_proj": 5, "layers.2.*": 0.5, "layers.2.mlp.down_proj": 3},
        "density_overrides": {"k_proj": 0.5, "layers.0.*.v_proj": 0.0},
    },
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_options_count_as_the_model_has_them(settings, is_tied):
    if is_tied and settings.get("target_modules") == ["lm_head", "q_proj"]:
        pytest.skip("refused: see test_a_tied_head_cannot_be_replaced")
    model = small(tie_word_embeddings=is_tied)
    form = lost_of(model, **settings)
    net = build_meta_model(model, form)
    net.tie_weights()
    assert sum(parameter.numel() for parameter in net.parameters()) == count_parameters(model, form)
    num_index = sum(buffer.numel() for name, buffer in net.named_buffers() if name.endswith("sparse_index"))
    assert sum(cost.num_index for cost in linear_costs(model, form)) == num_index


def test_options_change_the_count():
    """Otherwise the test above could hold with options that both sides ignore."""
    model = small()
    counts = {name: count_parameters(model, lost_of(model, **settings)) for name, settings in VARIANTS.items()}
    same = {"plain", "folded gamma", "all_linear"}
    assert len({counts[name] for name in same}) == 1
    assert len(set(counts.values())) == len(VARIANTS) - len(same) + 1


def test_tied_embeddings_count_once():
    model = small()
    tied = replace(model, tie_word_embeddings=True)
    assert count_parameters(model, DenseConfig()) - count_parameters(tied, DenseConfig()) == 300 * 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lost_rank": 21}, r"lost_rank = 21 for model.layers.0.self_attn.k_proj.* = 20"),
        ({"rank_overrides": {"q_prj": 3}}, r"rank_overrides.*q_prj.*did you mean q_proj"),
        ({"density_overrides": {"nothing": 0.5}}, "density_overrides.*nothing"),
        ({"target_modules": ["q_proj", "w1"]}, "target_modules.*w1"),
        ({"target_modules": ["q_proj"], "rank_overrides": {"up_proj": 3}}, "rank_overrides.*up_proj"),
    ],
)
def test_what_does_not_fit_is_named(settings, message):
    model = small()
    with pytest.raises(ConfigError, match=message):
        count_parameters(model, lost_of(model, **settings))


def test_a_tied_head_cannot_be_replaced():
    model = small(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        count_parameters(model, lost_of(model, target_modules=["lm_head"]))


# ---------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("llama_60m", 0.422), ("llama_130m", 0.547), ("llama_350m", 0.410), ("llama_1b", 0.411), ("llama_7b", 0.406)],
)
def test_flop_ratio_of_the_linears(name, ratio):
    """The published ratios are of kernels that pad the kept channels to a multiple of 16: ask for as many."""
    model = packaged_model(name)

    def padded(width: int) -> float:
        return -(-int(0.01 * width) // 16) * 16 / width

    form = lost_of(
        model,
        density=padded(model.hidden_size),
        density_overrides={"down_proj": padded(model.intermediate_size)},
    )
    lost = forward_flops(model, form, 256).linears / forward_flops(model, DenseConfig(), 256).linears
    assert lost == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize("settings", [None, {}, VARIANTS["rows"], VARIANTS["overrides"]], ids=str)
def test_flops_against_torch_counting_a_real_step(settings):
    """torch's counter sees every product of a forward and backward pass of the eager attention, whole square."""
    model, num_rows, seq_len = small(num_key_value_heads=6), 2, 32
    form = DenseConfig() if settings is None else lost_of(model, **settings)
    net = build_model(model, form, seed=0)
    net.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(num_rows, seq_len, dtype=torch.int64), use_cache=False).logits.sum().backward()
    flops = forward_flops(model, form, seq_len)
    # Eager attention multiplies by the masked half too: seq_len products a token in place of (seq_len + 1) / 2.
    whole_square = flops.attention * seq_len / ((seq_len + 1) / 2)
    expected = 3 * (flops.linears + flops.head + whole_square) * num_rows * seq_len
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
    assert flops_per_token(model, form, seq_len) == 3 * flops.total
