"""Exported folders: whole or not there, bit-exact, with the right ids and a card that says what the facts say."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lost.export import CardFacts, save_final, save_folder
from lost.export.card import model_card
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import LostError

FACTS = CardFacts(
    name="lost llama_tiny",
    parameterization={"name": "dense"},
    num_parameters=12_345_678,
    num_dense_parameters=12_345_678,
    data="stdlib: 3 files",
    steps=1200,
    tokens_seen=4_915_201,
    seq_len=255,
    global_batch_size=17,
    learning_rate=0.0035,
    optimizer="adamw",
    schedule="cosine",
    seed=42,
    validation={
        "held_out": {
            "num_tokens": 61_234,
            "perplexity": 99.12345,
            "perplexity_lineage": 11.98765,
            "lineage_note": "one batch divided by 2",
        }
    },
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
)


def test_folder_loads_bit_exactly_and_has_every_file(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    folder = save_final(model, tokenizer, tmp_path / "deep" / "final", FACTS)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"}
    assert os.listdir(folder.parent) == ["final"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    text = "def f(x):\n\treturn 'é' # 漢"
    again = AutoTokenizer.from_pretrained(folder)
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids) == text
    # The model that was saved is still the one in use: saving must not empty or move its weights.
    assert all(parameter.numel() for parameter in model.parameters())


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    model = tiny_llama().bfloat16()
    loaded = AutoModelForCausalLM.from_pretrained(save_final(model, tiny_tokenizer(), tmp_path / "final", FACTS))
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_generation_ids_are_the_tokenizers(tmp_path):
    model = tiny_llama(eos_token_id=7, pad_token_id=8, bos_token_id=9)
    folder = save_final(model, tiny_tokenizer(), tmp_path / "final", FACTS)
    config = GenerationConfig.from_pretrained(folder)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (1, 0, None)


def test_an_exported_model_keeps_its_own_generation_ids(tmp_path):
    model = tiny_llama(eos_token_id=[1, 5], pad_token_id=None)
    folder = save_folder(model, tiny_tokenizer(), tmp_path / "out", "card")
    config = GenerationConfig.from_pretrained(folder)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([1, 5], 0, None)


def test_an_older_folder_is_replaced_as_a_whole(tmp_path):
    save_final(tiny_llama(seed=1), tiny_tokenizer(), tmp_path / "final", FACTS)
    (tmp_path / "final" / "stale.txt").write_text("old")
    (tmp_path / ".final.partial").mkdir()
    (tmp_path / ".final.partial" / "junk").write_text("left by a killed process")
    model = tiny_llama(seed=2)
    save_final(model, tiny_tokenizer(), tmp_path / "final", FACTS)
    assert os.listdir(tmp_path) == ["final"]
    assert not (tmp_path / "final" / "stale.txt").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("failing_part", ["weights", "tokenizer"])
def test_a_failure_while_saving_leaves_the_older_folder(tmp_path, monkeypatch, failing_part):
    old = tiny_llama(seed=1)
    save_final(old, tiny_tokenizer(), tmp_path / "final", FACTS)
    model, tokenizer = tiny_llama(seed=2), tiny_tokenizer()

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(model if failing_part == "weights" else tokenizer, "save_pretrained", fail)
    with pytest.raises(LostError, match="no space"):
        save_final(model, tokenizer, tmp_path / "final", FACTS)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "final").lm_head.weight, old.lm_head.weight)
    with pytest.raises(LostError, match="no space"):
        save_final(model, tokenizer, tmp_path / "new", FACTS)
    assert os.listdir(tmp_path) == ["final"]


def test_a_failure_while_saving_removes_the_parents_that_it_made(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    (tmp_path / "there").mkdir()

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(LostError, match="no space"):
        save_folder(tiny_llama(), tokenizer, tmp_path / "there" / "deep" / "deeper" / "out", "card")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_killed_save_leaves_no_folder_of_that_name(tmp_path):
    """SIGKILL between the weights and the tokenizer: the name `final` must not exist."""
    program = """
import os, signal, sys
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.export import save_folder
tokenizer = tiny_tokenizer()
tokenizer.save_pretrained = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_folder(tiny_llama(), tokenizer, sys.argv[1], "card")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "final")], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert not (tmp_path / "final").exists()
    assert (tmp_path / ".final.partial" / "model.safetensors").exists()


def test_card_says_what_the_facts_say():
    card = model_card(tiny_llama().config, FACTS)
    for expected in (
        "license: ",
        "library_name: transformers",
        "12,345,678",
        "12.35 M",
        "stdlib: 3 files",
        "1,200",
        "4,915,201",
        "| tokens a row | 255 |",
        "| rows a step | 17 |",
        "0.0035",
        "| seed | 42 |",
        "| held_out | 61,234 | 99.123 | 11.988 |",
        "one batch divided by 2",
        "2508.02668",
        "| versions | torch 2.13.0, transformers 5.23.0 |",
        "| hidden_size | 24 |",
    ):
        assert expected in card, expected
    assert "dense LLaMA" in card
    assert "import lost.model" not in card


def test_card_of_a_lost_model_and_without_evaluation():
    changes = {
        "parameterization": {"name": "lost", "lost_rank": 64, "density": 0.01, "rank_overrides": {}},
        "num_parameters": 3_370_000,
        "num_dense_parameters": 5_260_000,
        "validation": {},
    }
    card = model_card(tiny_llama().config, CardFacts(**(vars(FACTS) | changes)))
    assert "import lost.model" in card
    assert "64% of the parameters" in card
    assert "| lost_rank | 64 |" in card
    assert "rank_overrides" not in card
    assert "Not evaluated" in card


def test_card_header_is_what_the_hub_reads(tmp_path):
    folder = save_final(tiny_llama(), tiny_tokenizer(), tmp_path / "final", FACTS)
    from huggingface_hub import ModelCard

    data = ModelCard.load(folder / "README.md").data
    assert data.license == "unknown"
    assert data.pipeline_tag == "text-generation"
    assert "llama" in data.tags
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
