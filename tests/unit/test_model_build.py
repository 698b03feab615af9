"""build_model: the same numbers by seed and name, for any split, with nothing left unset."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lost.bench.live_memory import LiveBytes
from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.model import LostLinear, LostLlamaForCausalLM, build_model
from lost.utils.errors import ConfigError, LostError


def small(**settings) -> ModelConfig:
    sizes = {
        "name": "small",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 63,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "lineage_rank": 5,
    }
    return ModelConfig(**{**sizes, **settings})


LOST = LostConfig(lost_rank=5, density=0.1)


def expected_draw(seed: int, name: str, shape, std: float = 0.02) -> torch.Tensor:
    """What (seed, name) must give, written out again: these numbers are part of what a seed means."""
    number = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    return torch.empty(tuple(shape)).normal_(0, std, generator=torch.Generator().manual_seed(number))


def test_dense_values_come_from_seed_and_name():
    net = build_model(small(), DenseConfig(), seed=11)
    assert type(net) is LlamaForCausalLM
    for name, parameter in net.named_parameters():
        expected = torch.ones_like(parameter) if "norm" in name else expected_draw(11, name, parameter.shape)
        assert torch.equal(parameter, expected), name


def test_dense_logits_are_those_of_transformers():
    net = build_model(small(), DenseConfig(), seed=1).eval()
    plain = LlamaForCausalLM(LlamaConfig(**net.config.to_dict())).eval()
    ids = torch.randint(0, 97, (2, 31))
    assert not torch.equal(plain(ids).logits, net(ids).logits)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(ids).logits, net(ids).logits)


def test_lost_starts_from_the_same_dense_weights():
    """With all channels kept and original values the sparse block is W0 itself."""
    dense = build_model(small(), DenseConfig(), seed=4)
    lost = build_model(small(), replace(LOST, density=1.0), seed=4)
    weights = dict(dense.named_parameters())
    layers = {name: module for name, module in lost.named_modules() if isinstance(module, LostLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.sparse_weight, weights[f"{name}.weight"]), name
    for name, parameter in lost.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name]), name


def test_lost_factors_are_the_best_approximation_of_the_dense_weight():
    lost = build_model(small(), LOST, seed=4)
    layer = lost.model.layers[1].mlp.down_proj
    weight = expected_draw(4, "model.layers.1.mlp.down_proj.weight", (48, 63)).double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :5] * values[:5]) @ right[:5]
    product = layer.low_rank_up.double() @ layer.low_rank_down.double()
    assert (product - best).norm() / best.norm() < 1e-6


def test_the_seed_matters_and_the_process_does_not():
    one, again, other = (build_model(small(), LOST, seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    differing = [name for name, value in other.state_dict().items() if not torch.equal(value, one.state_dict()[name])]
    assert all("norm" not in name for name in differing)
    assert sum("low_rank" in name for name in differing) == 28


@pytest.mark.parametrize("score", ["l2", "random"])
def test_any_split_of_the_layers_gives_the_same_bits(score):
    """A model of one block has the block that a deeper model has, so no draw depends on what came before it."""
    form = replace(LOST, score=score, factor_init="xavier" if score == "random" else "svd")
    deep = build_model(small(num_hidden_layers=3), form, seed=2).state_dict()
    shallow = build_model(small(num_hidden_layers=1), form, seed=2).state_dict()
    assert all(torch.equal(deep[name], value) for name, value in shallow.items())


def test_the_number_of_threads_does_not_matter():
    before = torch.get_num_threads()
    states = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            states.append(build_model(small(), LOST, seed=0).state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_bfloat16_is_the_rounded_float32():
    wide = build_model(small(), LOST, seed=0).state_dict()
    narrow = build_model(small(), LOST, seed=0, dtype=torch.bfloat16)
    for name, value in narrow.state_dict().items():
        expected = wide[name] if name.endswith("sparse_index") else wide[name].to(torch.bfloat16)
        assert torch.equal(value, expected), name
    assert narrow.model.rotary_emb.inv_freq.dtype == torch.float32
    assert narrow.config.dtype == torch.bfloat16


@pytest.fixture
def unset_memory_is_nan():
    """torch fills new memory with nan (floats) or the largest integer, so that whatever nobody set is seen."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_on)


@pytest.mark.usefixtures("unset_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form",
    [
        DenseConfig(),
        LOST,
        replace(LOST, gamma_mode="learnable"),
        replace(LOST, gamma_mode="folded", selection_axis="rows"),
        replace(LOST, density=0.0),
        replace(LOST, target_modules=["mlp.*"]),
    ],
    ids=["dense", "lost", "learnable", "folded rows", "no sparse", "mlp"],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_nothing_is_left_unset(form, dtype, is_tied):
    net = build_model(small(tie_word_embeddings=is_tied), form, seed=0, dtype=dtype)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        assert value.device.type == "cpu"
        if value.is_floating_point():
            assert value.isfinite().all(), name
        else:
            assert value.max() < 64, name


def test_rotary_buffers_are_those_of_transformers():
    plain = LlamaForCausalLM(LlamaConfig(**build_model(small(), DenseConfig(), seed=0).config.to_dict()))
    net = build_model(small(rope_theta=10000.0), LOST, seed=0)
    assert torch.equal(net.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert torch.equal(net.model.rotary_emb.original_inv_freq, plain.model.rotary_emb.original_inv_freq)
    other = build_model(small(rope_theta=500.0), LOST, seed=0)
    assert not torch.equal(other.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_tied_embeddings_share_one_weight():
    for form in (DenseConfig(), LOST):
        net = build_model(small(tie_word_embeddings=True), form, seed=0)
        assert net.lm_head.weight is net.model.embed_tokens.weight
        assert torch.equal(net.lm_head.weight, expected_draw(0, "model.embed_tokens.weight", (97, 48)))


def test_the_architecture_reaches_the_model():
    model = small(rms_norm_eps=1e-3, rope_theta=77.0, max_position_embeddings=33, initializer_range=0.5)
    config = build_model(model, LOST, seed=0).config
    assert (config.rms_norm_eps, config.max_position_embeddings, config.initializer_range) == (1e-3, 33, 0.5)
    assert config.rope_parameters["rope_theta"] == 77.0
    assert (config.num_key_value_heads, config.head_dim, config.hidden_act) == (2, 12, "silu")
    assert build_model(model, DenseConfig(), seed=0).lm_head.weight.std().item() == pytest.approx(0.5, rel=0.05)


class TestTokenIds:
    def test_they_reach_the_config_and_the_generation(self):
        ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 1}
        net = build_model(small(), LOST, seed=0, tokenizer_ids=ids)
        assert (net.config.bos_token_id, net.config.eos_token_id, net.config.pad_token_id) == (None, 2, 1)
        assert net.generation_config.eos_token_id == 2
        assert net.model.embed_tokens.padding_idx == 1
        assert (net.model.embed_tokens.weight[1] == 0).all()
        assert (net.model.embed_tokens.weight[96] != 0).any()

    def test_a_pad_that_ends_documents_stays_trainable(self):
        net = build_model(small(), LOST, seed=0, tokenizer_ids={"eos_token_id": 3, "pad_token_id": 3})
        assert net.model.embed_tokens.padding_idx is None
        assert (net.model.embed_tokens.weight[3] != 0).any()

    @pytest.mark.parametrize("value", [-1, 97])
    def test_outside_the_vocabulary(self, value):
        with pytest.raises(ConfigError, match=rf"pad_token_id = {value}: must be from 0 to .* = 96"):
            build_model(small(), LOST, seed=0, tokenizer_ids={"pad_token_id": value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lost_rank": 25}, "lost_rank = 25 for model.layers.0.self_attn.k_proj"),
        ({"target_modules": ["qproj"]}, "did you mean q_proj"),
    ],
)
def test_what_does_not_fit_is_a_users_mistake(settings, message):
    with pytest.raises(LostError, match=message):
        build_model(small(), replace(LOST, **settings), seed=0)


# ---------------------------------------------------------------------------------------------------- memory


def deep() -> ModelConfig:
    return small(num_hidden_layers=12, hidden_size=64, intermediate_size=100)


def dense_block_bytes(model: ModelConfig) -> int:
    net = build_model(model, DenseConfig(), seed=0)
    return sum(layer.weight.nbytes for layer in net.model.layers.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize(
    "build",
    [
        lambda model, form, config: build_in_this_thread(model, form),  # noqa: ARG005
        lambda model, form, config: LostLlamaForCausalLM(config),  # noqa: ARG005
    ],
    ids=["build_model", "LostLlamaForCausalLM"],
)
def test_the_dense_weights_never_exist_together(build):
    """The dense block weights are 1.5 MB; the LOST model and the factorisation of one layer are far less."""
    model, form = deep(), LostConfig(lost_rank=2, density=0.02)
    lost = build_model(model, form, seed=0)
    own_bytes = sum(value.nbytes for value in lost.state_dict().values())
    with LiveBytes() as live:
        kept = build(model, form, lost.config)
    assert live.peak_bytes >= sum(value.nbytes for value in kept.state_dict().values())
    assert live.peak_bytes - own_bytes < dense_block_bytes(model) / 3


def build_in_this_thread(model: ModelConfig, form: LostConfig):
    """build_model fills layers in threads of its own, which a dispatch mode does not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lost.model.split.run_side_by_side", lambda jobs: (job() for job in jobs))
        return build_model(model, form, seed=0)


def test_the_naive_way_would_be_seen():
    """Negative control: the dense model first, then each layer replaced."""
    from lost.model import inject

    model, form = deep(), LostConfig(lost_rank=2, density=0.02)
    own_bytes = sum(value.nbytes for value in build_model(model, form, seed=0).state_dict().values())
    config = build_model(model, DenseConfig(), seed=0).config
    with LiveBytes() as live:
        inject(LlamaForCausalLM(config), form)
    assert live.peak_bytes - own_bytes > dense_block_bytes(model) * 0.8
