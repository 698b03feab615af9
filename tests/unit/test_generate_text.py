"""Text from a prompt: what the model is given, what comes out, and what is refused."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from lost.assemble.generation import generate_all
from lost.assemble.prompts import chat_prompt, prompt_ids, prompts_of
from lost.config.model import LostConfig, ModelConfig
from lost.config.runtime import DeviceConfig
from lost.config.use import GenerateConfig
from lost.model import build_model
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import ConfigError, LostError


def settings(**changes):
    return GenerateConfig(source="unused", runtime=DeviceConfig(), **changes)


def generate(model, tokenizer, config, streamer=None):
    """The prompt and its continuation."""
    (found,) = generate_all(model, tokenizer, prompts_of(config, tokenizer), config, lambda _: streamer)
    return found.texts[0]


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


def test_sampling_settings_of_the_model_are_not_those_of_the_command():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    plain = generate(model, tokenizer, settings(prompt="abc", max_new_tokens=30))
    # Each alone would leave the likeliest token only.
    model.generation_config.update(do_sample=True, min_p=1.0, typical_p=1e-6, top_k=1, top_p=1e-6, temperature=1e-4)
    assert generate(model, tokenizer, settings(prompt="abc", max_new_tokens=30)) == plain


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


CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_batch_gives_what_each_prompt_gives_alone(tmp_path):
    """Padding in front changes nothing: prompts of several lengths, LOST and dense, in batches that do not divide."""
    prompts = ["a", "def f(x):\n\treturn", "é漢", "xyz xyz xyz xyz", "0"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": {p!r}}}\n'.replace("'", '"') for p in prompts) + "\n", encoding="utf-8")
    for make_model in (tiny_llama, random_lost_model):
        model, tokenizer = make_model(), tiny_tokenizer()
        options = {"max_new_tokens": 12, "do_sample": False}
        alone = [generate(model, tokenizer, settings(prompt=prompt, **options)) for prompt in prompts]
        config = settings(prompt_file=str(path), micro_batch_size=3, **options)
        read = prompts_of(config, tokenizer)
        assert [prompt.shown for prompt in read] == prompts
        found = list(generate_all(model, tokenizer, read, config))
        assert [entry.texts for entry in found] == [[text] for text in alone]
        assert [prompt + entry.completions[0] for prompt, entry in zip(prompts, found, strict=True)] == alone
        assert len(set(alone)) == len(prompts)


def test_options_of_transformers_take_effect():
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def text(**changes):
        config = settings(prompt="abc", max_new_tokens=25, **changes)
        return generate(model, tokenizer, config)

    greedy, sampled = text(do_sample=False), text(temperature=3.0, top_k=0)
    assert text(do_sample=False, repetition_penalty=5.0) != greedy
    assert text(do_sample=False, num_beams=4) != greedy
    assert text(min_p=1.0, top_k=0) == greedy
    assert text(typical_p=0.05, temperature=3.0, top_k=0) != sampled
    place = next(i for i in range(4, len(greedy)) if greedy[i].isascii() and greedy[i] not in greedy[3:i])
    stop = greedy[place]
    assert text(do_sample=False, stop_strings=[stop]) == greedy[: place + 1]
    collected = Ids()
    config = settings(prompt="abc", max_new_tokens=25, do_sample=False, no_repeat_ngram_size=1)
    generate(model, tokenizer, config, collected)
    assert len(set(collected.ids)) == len(collected.ids) == 3 + 25
    model.generation_config.eos_token_id = tokenizer(stop).input_ids[0]
    ended = text(do_sample=False)
    assert ended == greedy[: place + 1]
    assert len(text(do_sample=False, min_new_tokens=20)) > len(ended)


def test_several_texts_of_one_prompt():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    config = settings(prompt="abc", max_new_tokens=9, num_return_sequences=3)
    (found,) = generate_all(model, tokenizer, prompts_of(config, tokenizer), config)
    assert len(set(found.completions)) == 3
    assert found.texts == [f"abc{completion}" for completion in found.completions]


def test_a_chat_is_the_template_and_only_the_answer_is_text():
    model, tokenizer = tiny_llama(), chat_tokenizer()
    config = settings(prompt="hello", chat=True, system="be short", max_new_tokens=6, do_sample=False)
    (prompt,) = prompts_of(config, tokenizer)
    expected = "[system]be short<eos>[user]hello<eos>[assistant]"
    assert tokenizer.decode(prompt.ids) == expected
    by_hand = generate(model, tokenizer, settings(prompt=expected, max_new_tokens=6, do_sample=False))
    answer = generate(model, tokenizer, config)
    assert by_hand == expected.replace("<eos>", "") + answer
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert tokenizer.decode(chat_prompt(messages, config, tokenizer).ids) == "[system]s<eos>[user]u<eos>[assistant]"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2: must be"),
        ("a.jsonl", '{"prompt": "a", "messages": []}\n', "line 1: must be"),
        ("a.jsonl", '\n{"prompt"\n', "line 2: no JSON"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: must be"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "no chat template"),
    ],
)
def test_prompt_files_with_mistakes(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(LostError, match=message):
        prompts_of(settings(prompt_file=str(tmp_path / name)), tiny_tokenizer())


def test_a_text_file_is_one_prompt(tmp_path):
    (tmp_path / "a.txt").write_text("two\nlines\n")
    (prompt,) = prompts_of(settings(prompt_file=str(tmp_path / "a.txt")), tiny_tokenizer())
    assert prompt.shown == "two\nlines"
    with pytest.raises(LostError, match="cannot be read"):
        prompts_of(settings(prompt_file=str(tmp_path / "b.txt")), tiny_tokenizer())


def test_settings_that_do_not_go_together_are_all_named():
    with pytest.raises(ConfigError, match=r"(?s)prompt_file with prompt.*system without.*min_new_tokens = 99"):
        settings(prompt="a", prompt_file="b", system="c", min_new_tokens=99)
    with pytest.raises(ConfigError, match="they would be the same text"):
        settings(prompt="a", do_sample=False, num_return_sequences=2)
    assert settings(prompt="a", do_sample=False, num_return_sequences=2, num_beams=2)
    with pytest.raises(ConfigError, match="to with a conversation"):
        settings(chat=True, to="x.jsonl")
