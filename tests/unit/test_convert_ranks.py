"""Ranks by energy and by budget against exhaustive search."""

import itertools

import numpy as np
import pytest
import torch

from lost.convert.ranks import LayerSize, ranks_by_budget, ranks_by_energy, saving_problems
from lost.utils.errors import ConfigError

LAYERS = (LayerSize("a", 9, 12, 1), LayerSize("b", 20, 9, 0), LayerSize("c", 11, 11, 2, num_more=1))


def spectra(seed=0):
    generator = np.random.default_rng(seed)
    return {
        layer.name: torch.from_numpy(np.sort(generator.exponential(size=layer.full_rank) ** 2)[::-1].copy())
        for layer in LAYERS
    }


def test_sizes():
    layer = LayerSize("x", 20, 9, 3, num_more=1)
    assert layer.num_parameters(4) == 4 * 29 + 3 * 20 + 1
    assert layer.num_dense == 180
    assert layer.num_parameters(layer.largest_saving_rank) < 180 <= layer.num_parameters(layer.largest_saving_rank + 1)
    # A rank that costs exactly what dense does saves nothing.
    even = LayerSize("even", 6, 3, 0)
    assert even.num_parameters(2) == even.num_dense
    assert even.largest_saving_rank == 1


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.97, 1.0])
def test_energy_is_the_smallest_rank_that_keeps_it(energy):
    squares = spectra()
    found = ranks_by_energy(LAYERS, squares, energy, require_saving=False)
    for layer in LAYERS:
        values = squares[layer.name].numpy()
        kept = [values[:rank].sum() / values.sum() for rank in range(1, layer.full_rank + 1)]
        wanted = next(rank for rank, share in enumerate(kept, 1) if share >= energy - 1e-12)
        assert found[layer.name] == wanted
    saving = ranks_by_energy(LAYERS, squares, energy, require_saving=True)
    assert saving == {
        layer.name: found[layer.name] for layer in LAYERS if layer.num_parameters(found[layer.name]) < layer.num_dense
    }


def objective(squares, ranks):
    """Sum over the layers of the share of energy kept, counted by the layer's weights."""
    kept = {name: float(values[: ranks[name]].sum() / values.sum()) for name, values in squares.items()}
    return sum(kept[layer.name] * layer.num_dense for layer in LAYERS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [230, 290, 340])
def test_budget_is_kept_and_near_the_best_choice(seed, budget):
    squares = spectra(seed)
    found = ranks_by_budget(LAYERS, squares, budget + 1000, num_other=1000, require_saving=True)
    spent = sum(layer.num_parameters(found[layer.name]) for layer in LAYERS)
    assert spent <= budget
    choices = []
    for ranks in itertools.product(*(range(1, layer.largest_saving_rank + 1) for layer in LAYERS)):
        named = dict(zip("abc", ranks, strict=True))
        if sum(layer.num_parameters(named[layer.name]) for layer in LAYERS) <= budget:
            choices.append(objective(squares, named))
    assert all(1 <= found[layer.name] <= layer.largest_saving_rank for layer in LAYERS)
    # Whole triplets leave a rest smaller than one of them: the best choice may use it.
    dearest = max(
        layer.num_dense * float(squares[layer.name][found[layer.name]] / squares[layer.name].sum())
        for layer in LAYERS
        if found[layer.name] < layer.largest_saving_rank
    )
    assert max(choices) - dearest <= objective(squares, found) + 1e-12
    # Negative control: the same budget spent in the order of the layers is worse than that.
    naive, left = {layer.name: 1 for layer in LAYERS}, budget - sum(layer.num_parameters(1) for layer in LAYERS)
    for layer in LAYERS:
        while naive[layer.name] < layer.largest_saving_rank and left >= layer.cost_of_triplet:
            naive[layer.name] += 1
            left -= layer.cost_of_triplet
    assert objective(squares, naive) <= objective(squares, found)


def test_a_flat_layer_gets_less_than_a_steep_one():
    flat, steep = LayerSize("flat", 40, 40, 0), LayerSize("steep", 40, 40, 0)
    squares = {"flat": torch.ones(40).double(), "steep": torch.exp(-torch.arange(40).double() / 3)}
    found = ranks_by_budget([flat, steep], squares, 20 * 80, require_saving=True)
    assert sum(found.values()) == 20
    # Where a triplet of the steep one holds less than 1 / 40 of its energy the flat one's come first.
    share = squares["steep"] / squares["steep"].sum()
    assert found["steep"] == max(1, int((share > 1 / 40).sum()))


def test_a_budget_that_cannot_be_met_says_what_can():
    smallest = 1000 + sum(layer.num_parameters(1) for layer in LAYERS)
    with pytest.raises(ConfigError, match=f"at least {smallest}"):
        ranks_by_budget(LAYERS, spectra(), smallest - 1, num_other=1000, require_saving=True)
    found = ranks_by_budget(LAYERS, spectra(), smallest, num_other=1000, require_saving=True)
    assert set(found.values()) == {1}


def test_more_than_enough_stops_where_layers_get_no_smaller():
    found = ranks_by_budget(LAYERS, spectra(), 10**9, require_saving=True)
    assert found == {layer.name: layer.largest_saving_rank for layer in LAYERS}
    found = ranks_by_budget(LAYERS, spectra(), 10**9, require_saving=False)
    assert found == {layer.name: layer.full_rank for layer in LAYERS}


def test_ranks_that_save_nothing_are_named():
    assert saving_problems(LAYERS, {"a": 4, "b": 5, "c": 4}) == []
    (problem,) = saving_problems(LAYERS, {"a": 5, "b": 7, "c": 1})
    assert "a at rank 5" in problem
    assert "at most 4" in problem
    assert "1 more layers" in problem
    (problem,) = saving_problems([LayerSize("x", 10, 10, 10)], {"x": 1})
    assert "kept channels alone" in problem
