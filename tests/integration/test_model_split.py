"""Initial values shared between two real processes are those of one, bit for bit, replicated and sharded."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.model import build_model, inject
from lost.model.split import Piece, Processes, deal, own_tensors, shared_values, write
from lost.testing.processes import run_processes
from lost.testing.split_models import TOKENS, dense_module, fail_on_one, fill_models, inject_model
from lost.utils.errors import LostError

LOST = LostConfig(lost_rank=5, density=0.1)
MODEL = ModelConfig(
    name="small",
    vocab_size=97,
    hidden_size=36,
    intermediate_size=63,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    lineage_rank=5,
)
TIED = replace(MODEL, tie_word_embeddings=True)
CASES = {
    "lost": (MODEL, LOST, torch.float32),
    "bfloat16": (MODEL, LOST, torch.bfloat16),
    "no sparse block": (MODEL, replace(LOST, density=0.0), torch.float32),
    "learnable gamma": (MODEL, replace(LOST, gamma_mode="learnable"), torch.float32),
    "learnable gamma, bfloat16": (MODEL, replace(LOST, gamma_mode="learnable"), torch.bfloat16),
    "folded rows, drawn": (
        MODEL,
        replace(LOST, gamma_mode="folded", selection_axis="rows", score="random", factor_init="cola"),
        torch.float32,
    ),
    "some layers": (MODEL, replace(LOST, target_modules=["mlp.*"], rank_overrides={"up_proj": 1}), torch.float32),
    "tied": (TIED, LOST, torch.float32),
    "dense": (MODEL, DenseConfig(), torch.float32),
    "dense tied": (TIED, DenseConfig(), torch.bfloat16),
}


@pytest.fixture(scope="module", params=[(), (2,), (2, 1)], ids=["replicated", "sharded", "hybrid"])
def filled(request, tmp_path_factory):
    """(shape of the mesh, results of the two processes)."""
    return request.param, run_processes(fill_models, tmp_path_factory.mktemp("filled"), CASES, request.param)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_bits_of_one(filled, case):
    mesh_shape, results = filled
    model, form, dtype = CASES[case]
    alone = build_model(model, form, seed=5, dtype=dtype)
    state, buffers = alone.state_dict(), dict(alone.named_buffers())
    for result in (process[case] for process in results):
        assert result["state"].keys() == state.keys()
        for key, value in state.items():
            assert result["state"][key].dtype == value.dtype
            assert torch.equal(result["state"][key], value), key
        assert result["buffers"].keys() == buffers.keys()
        assert all(torch.equal(result["buffers"][key], value) for key, value in buffers.items())
        if result["logits"] is not None:
            torch.testing.assert_close(result["logits"], alone(TOKENS).logits, rtol=1e-5, atol=1e-6)
        for key, value in alone.named_parameters():
            parts = [process[case]["local_numel"][key] for process in results]
            num_copies = 1 if mesh_shape == (2,) else 2
            assert sum(parts) == value.numel() * num_copies, key
            assert num_copies == 1 or parts[0] == parts[1]


def test_sharded_parts_are_uneven_and_empty(filled):
    """Otherwise the test above would miss the sizes that are hard."""
    mesh_shape, results = filled
    if mesh_shape == (2,):
        first, second = (process["learnable gamma"]["local_numel"] for process in results)
        assert any(second[key] == 0 < first[key] for key in first)
        assert any(0 < second[key] < first[key] for key in first)


@pytest.mark.parametrize("case", CASES)
def test_each_layer_is_factorised_once_and_each_process_does_half(filled, case):
    _, results = filled
    counts = [process[case]["num_factorisations"] for process in results]
    num_layers = {"some layers": 6, "dense": 0, "dense tied": 0}.get(case, 14)
    assert sum(counts) == num_layers
    assert min(counts) >= num_layers // 2 - 1


def test_conversion_of_a_dense_model_is_shared(tmp_path):
    alone = dense_module()
    inject(alone, replace(LOST, target_modules=["all_linear"], score="random"))
    results = run_processes(inject_model, tmp_path, replace(LOST, target_modules=["all_linear"], score="random"))
    for result in results:
        assert result["state"].keys() == alone.state_dict().keys()
        assert all(torch.equal(result["state"][key], value) for key, value in alone.state_dict().items())
    assert sorted(result["num_factorisations"] for result in results) == [1, 2]


def test_an_error_of_one_process_reaches_all(tmp_path):
    """The other process must not wait for a layer that never comes."""
    told = run_processes(fail_on_one, tmp_path, MODEL, LOST)
    assert told[1] == "no such spectrum ☃"
    assert told[0] == "process 1 could not compute initial values: LostError: no such spectrum ☃"


# ------------------------------------------------------------------------------------------------ without processes


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50])
def test_dealing_gives_every_piece_away_once_and_evenly(count):
    generator = torch.Generator().manual_seed(count)
    costs = torch.randint(0, 100, (40,), generator=generator).tolist()
    order = deal(costs, count)
    assert sorted(piece for piece, _ in order) == list(range(40))
    work = [sum(costs[piece] for piece, owner in order if owner == index) for index in range(count)]
    assert max(work) - min(work) <= max(costs)
    assert order == deal(list(costs), count)


def test_the_order_is_that_in_which_pieces_are_ready():
    assert deal([1, 9, 3, 3, 3], 2) == [(2, 1), (3, 1), (1, 0), (4, 1), (0, 0)]


def test_values_of_another_module_are_a_mistake_of_ours():
    linear = nn.Linear(3, 2)
    piece = Piece(linear, 1, lambda: {"weight": torch.zeros(2, 3)}, torch.device("cpu"))
    with pytest.raises(AssertionError, match=r"\['weight'\] for \['bias', 'weight'\]"):
        list(shared_values([piece], Processes()))


def test_write_casts_and_keeps_the_parameter():
    linear = nn.Linear(3, 2, dtype=torch.bfloat16)
    before = linear.weight
    full = torch.randn(2, 3, dtype=torch.float64)
    write(own_tensors(linear)["weight"], full)
    assert linear.weight is before
    assert torch.equal(linear.weight, full.to(torch.bfloat16))


def test_an_error_alone_is_the_error_itself():
    def fail():
        raise LostError("no")

    with pytest.raises(LostError, match=r"^no$"):
        list(shared_values([Piece(nn.Linear(1, 1), 1, fail, torch.device("cpu"))], Processes()))
