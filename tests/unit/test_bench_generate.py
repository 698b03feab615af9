"""`lost bench generate`: both arms decode what they say, from the same filled cache each time."""

import json

import pytest
import torch

from lost.bench.generate import decode, likeliest
from lost.testing.runs import lost_here
from lost.testing.tiny import tiny_llama

SMALL = [
    "model=llama_tiny", "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=84",
    "model.num_hidden_layers=2", "model.num_attention_heads=4", "parameterization.lost_rank=8",
]  # fmt: skip


def test_the_table_and_the_json_have_both_arms(tmp_path, capsys):
    options = ["repeats=3", "seq_len=9", "new_tokens=5", "num_prompts=2", f"to={tmp_path}"]
    assert lost_here("bench", "generate", *SMALL, *options) == 0
    assert "5 tokens after 9, batch 2" in capsys.readouterr().out
    facts = json.loads((tmp_path / "bench_generate_llama_tiny.json").read_text())
    assert set(facts["arms"]) == {"dense", "lost"}
    assert facts["num_tokens"] == 10
    assert facts["arms"]["lost"]["num_parameters"] < facts["arms"]["dense"]["num_parameters"]
    for arm in facts["arms"].values():
        assert arm["tokens_per_second"] == pytest.approx(10 / arm["median_seconds"])


def test_every_call_decodes_the_greedy_text_anew():
    """The tokens that the model is given, call by call, are those of the definition without a cache."""
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 8]])
    given = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].tolist()))
    with torch.no_grad():
        call = decode(model, ids, 6)
        call()
        call()
    handle.remove()
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, likeliest(model(expected, use_cache=False).logits)], dim=1)
    tokens = [[[token]] for token in expected[0, 4:].tolist()]
    assert given == [ids.tolist(), *tokens, *tokens]


def test_what_is_longer_than_the_model_is_refused(capsys):
    assert lost_here("bench", "generate", *SMALL, "seq_len=1020", "new_tokens=5") == 2
    assert "seq_len = 1020 + new_tokens = 5 are above model.max_position_embeddings = 1024" in capsys.readouterr().err
