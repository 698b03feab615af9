"""The KV cache with room: the values of transformers' own, through everything that generation does to a cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from lost.model.cache import ROOM, RoomyLayer, roomy_cache
from lost.testing.tiny import tiny_llama


def both_caches():
    model = tiny_llama()
    return DynamicCache(config=model.config), roomy_cache(model)


def add(caches, num_tokens, seed, batch=2):
    """The same random tokens for both caches; whether both hold the same then."""
    generator = torch.Generator().manual_seed(seed)
    new = [torch.randn(batch, 3, num_tokens, 5, generator=generator) for _ in range(2)]
    (keys, values), (own_keys, own_values) = (cache.update(*new, 0) for cache in caches)
    assert keys.shape[-2] == caches[1].get_seq_length()
    return torch.equal(keys, own_keys) and torch.equal(values, own_values)


def test_tokens_are_written_behind_the_others_without_a_copy():
    caches = both_caches()
    assert add(caches, 7, 0)
    layer = caches[1].layers[0]
    place = layer.keys.data_ptr()
    for seed in range(1, 40):
        assert add(caches, 1, seed)
    assert layer.keys.data_ptr() == place
    # More than there is room for: elsewhere, with all that was there.
    assert add(caches, ROOM, 41)
    assert layer.keys.data_ptr() != place
    assert add(caches, 1, 42)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.reset(),
    ],
)
def test_what_is_done_to_the_cache_is_done_to_the_room(change):
    caches = both_caches()
    assert add(caches, 6, 0)
    assert add(caches, 2, 1)
    for cache in caches:
        change(cache)
    assert add(caches, 1, 2)
    assert add(caches, 4, 3)


def test_another_batch_is_another_memory():
    caches = both_caches()
    assert add(caches, 6, 0)
    for cache in caches:
        cache.batch_repeat_interleave(2)
    assert add(caches, 1, 1, batch=4)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([0]))
    # The first of the batch begins where the room begins, and is not the room.
    assert add(caches, 3, 2, batch=1)


def test_a_view_of_the_first_of_a_batch_is_not_the_room():
    caches = both_caches()
    assert add(caches, 6, 0)
    for cache in caches:
        cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:1], cache.layers[0].values[:1]
    assert add(caches, 3, 1, batch=1)


def test_a_copy_goes_its_own_way():
    caches = both_caches()
    assert add(caches, 6, 0)
    copies = copy.deepcopy(caches)
    assert add(copies, 2, 1)
    assert add(caches, 2, 2)
    assert not torch.equal(caches[1].layers[0].keys, copies[1].layers[0].keys)


def test_who_gets_one():
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(vocab_size=9, num_key_value_heads=1, sliding_window=4, **sizes))
    cache = roomy_cache(windowed)
    assert cache is not None
    assert not isinstance(cache.layers[0], RoomyLayer)
    assert roomy_cache(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))) is None
    static = tiny_llama()
    assert isinstance(roomy_cache(static).layers[0], RoomyLayer)
    static.generation_config.cache_implementation = "static"
    assert roomy_cache(static) is None
