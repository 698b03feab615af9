"""What is wrong before training: one message, exit status 2, nothing half-saved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lost.finetune.adapter_folder import load_adapted
from lost.testing.examples import finetune_run, write_labelled
from lost.testing.runs import lost_here
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import LostError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    save_dense(folder / "dense")
    save_dense(folder / "small_vocabulary", vocab_size=80)
    save_dense(folder / "half")
    (folder / "half" / "model.safetensors").unlink()
    save_dense(folder / "torn")
    weights = load_file(folder / "torn" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "torn" / "model.safetensors", metadata={"format": "pt"})
    write_labelled(folder / "train.jsonl", 40)
    (folder / "empty.jsonl").write_text("")
    (folder / "outside.jsonl").write_text(json.dumps({"text": "good", "label": 7}) + "\n")
    (folder / "void.jsonl").write_text('{"text": "", "label": 0}\n{"text": "x", "label": 1}\n')
    return folder


def save_dense(folder, **changes):
    tiny_llama(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("dense", ["data.validation_files=[{}/outside.jsonl]"], "outside.jsonl:1: label 7 is outside the range"),
        ("dense", ["data.train_files=[{}/empty.jsonl]"], "empty.jsonl: there is no record in it"),
        ("dense", ["data.train_files=[{}/void.jsonl]", "data.validation_files=[{}/train.jsonl]"], "the text is empty"),
        ("dense", ["data.train_files=[{}/trian.jsonl]"], "did you mean train.jsonl?"),
        ("dense", ["train.seq_len=65"], "train.seq_len = 65 is above the 64 tokens that"),
        ("dense", ["schedule.warmup_steps=13"], "schedule.warmup_steps = 13 steps is above the 12 steps"),
        ("dense", ["method=lost_adapter", "method.rank=25"], "method.rank = 25 is above the smaller width"),
        ("small_vocabulary", [], "but the model's vocabulary ends at 79"),
        ("half", [], "has no weights (model.safetensors)"),
        ("torn", [], "model.layers.1.mlp.up_proj.weight: lacking"),
        ("nowhere/at/all", [], "does not exist"),
    ],
)
def test_mistakes(place, capsys, source, overrides, message):
    run_dir = place / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    typed = [override.format(place) for override in overrides]
    assert lost_here(*finetune_run(run_dir, place / source, place / "train.jsonl", *typed)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
    left = sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else []
    assert left in ([], [".lock"])


def test_glue_from_a_hub_that_is_not_reached(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = [word for word in finetune_run(place / "glue", place / "dense", place) if "train_files" not in word]
    assert lost_here(*run, "data.glue=sst2", "data.glue_dataset=nobody/glue") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "data.glue = sst2 is read from nobody/glue" in said
    assert "give a folder: data.glue_dataset=" in said
    assert "Traceback" not in said
    assert not (place / "glue" / "final").exists()


def test_a_tokenizer_that_a_start_without_results_left_is_not_taken(place):
    """The next start may have another source."""
    run_dir = place / "leftover"
    other = tiny_tokenizer()
    other.add_tokens(["good"])
    other.save_pretrained(run_dir / "tokenizer")
    arguments = finetune_run(run_dir, place / "dense", place / "train.jsonl", "train.max_steps=2")
    assert lost_here(*arguments) == 0
    for folder in ("tokenizer", "final"):
        assert "good" not in AutoTokenizer.from_pretrained(run_dir / folder).get_vocab()


def test_an_adapter_for_another_model_and_one_that_is_not_whole(place):
    arguments = finetune_run(place / "adapter", place / "dense", place / "train.jsonl", "method=lost_adapter")
    assert lost_here(*arguments, "train.max_steps=2") == 0
    folder = place / "adapter" / "final"
    facts = json.loads((folder / "lost_adapter.json").read_text())
    save_dense(place / "other", seed=3)
    (folder / "lost_adapter.json").write_text(json.dumps(facts | {"source": str(place / "other")}))
    with pytest.raises(LostError, match=r"was made for .*other, whose weights were others than those of this model"):
        load_adapted(folder)
    (folder / "lost_adapter.json").write_text(json.dumps(facts))
    with torch.no_grad():
        load_adapted(folder)(torch.tensor([[5, 6]]))
    weights = load_file(folder / "adapter_model.safetensors")
    headless = {name: value for name, value in weights.items() if not name.startswith("score")}
    assert len(headless) < len(weights)
    save_file(headless, folder / "adapter_model.safetensors")
    with pytest.raises(LostError, match=r"is not complete: adapter_model.safetensors lacks score.weight"):
        load_adapted(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(LostError, match=r"adapter_model.safetensors cannot be read: .*; the folder is not complete"):
        load_adapted(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert lost_here("generate", f"source={place / 'adapter'}", "prompt=x") == 2
