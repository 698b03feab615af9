"""runtime.recompute=p0..p3: what a block keeps at the real widths, gradients and losses that stay the same."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from lost.accounting import state_bytes
from lost.accounting.costs import linear_costs
from lost.accounting.memory import REMADE_LEVELS, block_activation_bytes
from lost.bench.live_memory import bytes_kept_by
from lost.cli.plan import packaged_model
from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.model import build_model
from lost.model.build import build_meta_model, empty_model
from lost.model.lost_linear import LostLinear
from lost.testing.numerics import assert_close, relative_rms_error
from lost.testing.runs import losses, lost_here, tiny_run, write_corpus
from lost.train.recompute import LEVELS
from lost.train.wrap import set_kernels, set_recompute

# kB a token and block in bfloat16. Counted by hand: residuals, h, q, k, v, attention, gate, up (p1), and so on.
PUBLISHED = {
    "llama_60m": {"p0": 18.3, "p1": 13.5, "p2": 8.0, "p3": 3.9, "block": 1.0},
    "llama_350m": {"p0": 36.5, "p1": 26.9, "p2": 15.9, "p3": 7.8, "block": 2.0},
    "llama_1b": {"p0": 72.8, "p1": 53.7, "p2": 31.9, "p3": 15.5, "block": 4.1},
}
PLAIN = torch.autocast("cpu", enabled=False)
OWN_FORMS = {
    "lost": LostConfig(lost_rank=8),
    "rows": LostConfig(lost_rank=8, selection_axis="rows", gamma_mode="learnable"),
    "attention only": LostConfig(lost_rank=8, target_modules=["self_attn.*"]),
    "one of a group": LostConfig(lost_rank=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    "dense": DenseConfig(),
}


def without_values(model: ModelConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """A LOST model in training whose weights are whatever was in memory, which is enough to count bytes."""
    net = empty_model(model, LostConfig(lost_rank=model.lineage_rank), dtype=dtype).train()
    for layer in net.modules():
        if isinstance(layer, LostLinear):
            layer.sparse_index.copy_(torch.arange(layer.num_kept))
    for parameter in net.parameters():
        parameter.data.fill_(0.01)
    return net


def small(**changes) -> ModelConfig:
    sizes = {
        "name": "small",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "lineage_rank": 8,
    }
    return ModelConfig(**{**sizes, **changes})


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_block_keeps_what_was_published(name, is_traced):
    model = replace(packaged_model(name), num_hidden_layers=1, vocab_size=64)
    measured = {}
    for level, published in PUBLISHED[name].items():
        net = without_values(model, torch.bfloat16)
        set_recompute(net, level, is_traced=is_traced)
        measured[level] = bytes_kept_by(net, PLAIN, 1, 64) / 1000
        assert measured[level] == pytest.approx(published, rel=0.1), level
    # Negative control: neighbours are further apart than the tolerance.
    assert all(
        high > 1.3 * low for high, low in zip(list(measured.values()), list(measured.values())[1:], strict=False)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("name", ["llama_60m", "llama_350m"])
def test_the_plan_is_what_is_measured(name, precision):
    """State to the byte, activations of every level within 10 %, at the real widths."""
    whole = packaged_model(name)
    form = LostConfig(lost_rank=whole.lineage_rank)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    weights = sum(parameter.nbytes for parameter in build_meta_model(whole, form, dtype=dtype).parameters())
    state = state_bytes(whole, form, precision)
    assert state.total - state.buffers == 4 * weights
    model = replace(whole, num_hidden_layers=1, vocab_size=64)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    for level in ["p0", "p1", "p2", "p3"]:
        net = without_values(model, dtype)
        set_recompute(net, level)
        planned = block_activation_bytes(model, linear_costs(model, form)[:7], precision, level)
        assert planned == pytest.approx(bytes_kept_by(net, autocast, 1, 64), rel=0.1), level


def gradients(model: ModelConfig, form, level: str, *, kernels: str = "auto", is_compiled: bool = False, **options):
    net = build_model(model, form, seed=0, dtype=options.get("dtype", torch.float64)).train()
    set_kernels(net, kernels)
    set_recompute(net, level, is_traced=is_compiled or options.get("is_traced", False))
    if is_compiled:
        torch.compiler.reset()
        for block in net.model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    ids = torch.randint(model.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.get("is_autocast", False)):
        loss = net(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("form", OWN_FORMS.values(), ids=OWN_FORMS)
@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("level", [*LEVELS, "block"])
def test_gradients_are_those_without(level, is_traced, form, kernels):
    plain = gradients(small(), form, "none", kernels=kernels)
    again = gradients(small(), form, level, kernels=kernels, is_traced=is_traced)
    if is_traced or level not in REMADE_LEVELS:
        assert all(torch.equal(plain[name], again[name]) for name in plain)
        return
    # Sums of a residual's gradient have another order.
    for name, value in again.items():
        assert_close(value, plain[name], "float64", name)


@pytest.mark.parametrize("form", [OWN_FORMS["lost"], OWN_FORMS["dense"]], ids=["lost", "dense"])
@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_under_autocast_are_those_without(level, is_traced, form):
    options = {"dtype": torch.float32, "is_autocast": True}
    plain = gradients(small(), form, "none", **options)
    again = gradients(small(), form, level, **options, is_traced=is_traced)
    if is_traced or level not in REMADE_LEVELS:
        assert all(torch.equal(plain[name], again[name]) for name in plain)
        return
    # Sums of a residual's gradient have another order; those of three or two dense layers' are taken in bfloat16.
    limit = 1e-6 if isinstance(form, LostConfig) else 1e-2
    for name, value in again.items():
        assert relative_rms_error(value, plain[name]) < limit, name


@pytest.mark.parametrize(("form", "level"), [("lost", "p1"), ("lost", "p3"), ("dense", "p1")])
def test_gradients_of_compiled_blocks_are_those_without(level, form):
    plain = gradients(small(), OWN_FORMS[form], "none")
    again = gradients(small(), OWN_FORMS[form], level, is_compiled=True)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-10, atol=1e-14)


def test_losses_of_a_run_are_those_without(tmp_path):
    corpus = write_corpus(tmp_path)
    found = {}
    for level in ("none", "p1", "p3"):
        keys = tiny_run(tmp_path / level, corpus, "train.max_steps=6", "evaluation.every_steps=0")
        assert lost_here(*keys, f"runtime.recompute={level}") == 0
        found[level] = losses(tmp_path / level)
    # Sums of a residual's gradient have another order.
    assert found["p1"] == pytest.approx(found["none"], rel=1e-6)
    assert found["p3"] == found["none"]
