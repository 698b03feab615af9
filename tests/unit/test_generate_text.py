"""Text from a prompt: what the model is given, what comes out, and what is refused."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from lost.assemble.generation import generate, prompt_ids
from lost.config.model import LostConfig, ModelConfig
from lost.config.runtime import DeviceConfig
from lost.config.schema import GenerateConfig
from lost.model import build_model
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import ConfigError


def settings(**changes):
    return GenerateConfig(source="unused", runtime=DeviceConfig(), **changes)


def random_lost_model():
    """Two LOST blocks with an initialization wide enough that greedy text does not repeat one token."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 60, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    config = ModelConfig(name="tiny", lineage_rank=8, initializer_range=0.4, **sizes, **heads)
    return build_model(config, LostConfig(lost_rank=6, density=0.2), seed=1).eval()


@pytest.mark.parametrize("make_model", [tiny_llama, random_lost_model])
def test_greedy_text_is_the_same_with_and_without_cache_and_by_hand(make_model):
    model, tokenizer = make_model(), tiny_tokenizer()
    prompt = "def f(x, *args):\n    return [x] # 'é'"
    ids = tokenizer(prompt).input_ids
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    texts = [
        generate(model, tokenizer, settings(prompt=prompt, max_new_tokens=20, do_sample=False, use_cache=use_cache))
        for use_cache in (True, False)
    ]
    assert texts == [expected, expected]
    assert len(set(ids[-20:])) > 5


def test_sampling_is_by_seed_and_its_keys_take_effect():
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def text(**changes):
        return generate(model, tokenizer, settings(prompt="abc", max_new_tokens=30, **changes))

    greedy = text(do_sample=False)
    assert text(seed=5) == text(seed=5)
    assert text(seed=5) != text(seed=6)
    assert text(top_k=1) == text(top_p=1e-6) == text(temperature=1e-4, top_k=0) == greedy
    assert text(temperature=50.0, top_k=0) != greedy


def test_stream_is_the_text(capsys):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    text = generate(model, tokenizer, settings(prompt="a, [b] {c}=d\n", max_new_tokens=25), streamer)
    assert text.startswith("a, [b] {c}=d\n")
    assert len(text) > len("a, [b] {c}=d\n")
    assert capsys.readouterr().out == text + "\n"


class Ids(BaseStreamer):
    """Collects the ids of the prompt and of every new token."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


def test_text_ends_at_eos():
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def ids():
        collected = Ids()
        generate(model, tokenizer, settings(prompt="abc", max_new_tokens=9, do_sample=False), collected)
        return collected.ids

    whole = ids()
    assert len(whole) == 3 + 9
    third = whole[3 + 2]
    assert third not in whole[3 : 3 + 2]
    for eos in (third, [255, third]):
        model.generation_config.eos_token_id = eos
        assert ids() == whole[: 3 + 3]


def test_an_empty_prompt_starts_where_a_document_starts():
    tokenizer = tiny_tokenizer()
    assert prompt_ids(tokenizer, "") == [tokenizer.eos_token_id]
    text = generate(tiny_llama(), tokenizer, settings(max_new_tokens=7))
    assert "<eos>" not in text
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert prompt_ids(tokenizer, "") == [tokenizer.bos_token_id]
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither BOS nor EOS"):
        prompt_ids(tokenizer, "")


def test_an_eos_that_the_tokenizer_appends_is_not_given_to_the_model():
    """t5's tokenizer ends every text with EOS, after which a model begins a new document."""
    tokenizer = tiny_tokenizer()
    plain = tokenizer("abc").input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("abc").input_ids == [*plain, 1]
    assert prompt_ids(tokenizer, "abc") == plain
    assert prompt_ids(tokenizer, "") == [1]
    # What the tokenizer puts in front belongs to the prompt.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    assert prompt_ids(tokenizer, "abc") == [0, *plain]


def test_what_does_not_fit_is_refused():
    model, tokenizer = tiny_llama(), tiny_tokenizer()  # 64 positions
    fits = settings(prompt="x" * 44, max_new_tokens=20, do_sample=False)
    assert len(generate(model, tokenizer, fits)) > 44
    with pytest.raises(ConfigError, match=r"45 tokens \+ max_new_tokens = 20 .* = 64: shorten the prompt to 44 tokens"):
        generate(model, tokenizer, settings(prompt="x" * 45, max_new_tokens=20))
    with pytest.raises(ConfigError, match="64: lower max_new_tokens"):
        generate(model, tokenizer, settings(prompt="x", max_new_tokens=64))
    tokenizer.add_tokens(["ZZZ"])
    with pytest.raises(ConfigError, match=r"token id 258, the model's vocabulary ends at 257"):
        generate(model, tokenizer, settings(prompt="aZZZ", max_new_tokens=2))


def test_sampling_keys_without_sampling_are_refused():
    with pytest.raises(ConfigError, match=r"(?s)temperature = 0\.5 .*do_sample = false.*top_k = 7 "):
        settings(do_sample=False, temperature=0.5, top_k=7)
    assert settings(do_sample=False, temperature=0.8, top_k=50, top_p=1.0)
    assert settings(do_sample=True, temperature=0.5)
