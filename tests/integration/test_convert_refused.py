"""What `lost convert` refuses: settings, models and folders, each in one message that leaves nothing behind."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lost.testing.conversions import QUIET, converted, dense, refused
from lost.testing.runs import lost_here
from lost.testing.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """A picture takes four times as long as the conversion of these models; commands that are processes draw it."""
    monkeypatch.setattr("lost.convert.report.draw", lambda *_: None)


def test_settings_that_cannot_be(tmp_path, capsys):
    dense(tmp_path / "dense")
    source = tmp_path / "dense"
    assert "nothing says it" in refused(capsys, source)
    assert "lost_rank and parameters each say it" in refused(capsys, source, "lost_rank=4", "parameters=0.5")
    assert "gamma = 1.0: must be below 1" in refused(capsys, source, "lost_rank=4", "gamma=1")
    assert "gamma = 0.0: must be above 0" in refused(capsys, source, "lost_rank=4", "gamma=0")
    assert "did you mean lost_rank" in refused(capsys, source, "lost_rnk=4")
    assert "q_porj names no linear" in refused(capsys, source, "lost_rank=4", "target_modules=[q_porj]")
    assert "rank 33" in refused(capsys, source, "lost_rank=33").replace("lost_rank = 33", "rank 33")
    message = refused(capsys, source, "lost_rank=0.6")
    assert "saves nothing" in message
    assert "require_saving=false" in message
    smallest = refused(capsys, source, "parameters=100")
    assert "raise parameters to at least" in smallest
    # The number that it names is enough.
    least = re.search(r"raise parameters to at least ([\d,]+)", smallest)
    assert least is not None, smallest
    budget = int(least[1].replace(",", ""))
    found = converted(source, tmp_path / "smallest", f"parameters={budget}")
    assert sum(parameter.numel() for parameter in found.parameters()) <= budget
    assert "at least" in refused(capsys, source, f"parameters={budget - 1}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert lost_here("convert", f"source={source}", f"to={tmp_path / 'full'}", *QUIET, "lost_rank=4") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_models_that_cannot_be_converted(tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    message = refused(capsys, tmp_path / "gpt2", "lost_rank=4")
    assert "gpt2" in message
    assert "mistral" in message
    dense(tmp_path / "dense")
    converted(tmp_path / "dense", tmp_path / "lost", "lost_rank=3")
    assert "in LOST form already" in refused(capsys, tmp_path / "lost", "lost_rank=3")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "lost_adapter.json").write_text("{}")
    message = refused(capsys, tmp_path / "adapter", "lost_rank=3")
    assert "is an adapter, not a model" in message
    assert "lost export" in message
    edited(tmp_path / "dense", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in refused(capsys, tmp_path / "dense", "lost_rank=3")
    edited(tmp_path / "dense", quantization_config=None, model_type="of_tomorrow")
    assert "of_tomorrow" in refused(capsys, tmp_path / "dense", "lost_rank=3")


@pytest.mark.parametrize("changes", [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"vocab_size": -3}])
def test_a_config_that_makes_no_model_is_one_message(tmp_path, capsys, changes):
    dense(tmp_path / "dense")
    edited(tmp_path / "dense", head_dim=None, **changes)
    assert "config.json" in refused(capsys, tmp_path / "dense", "lost_rank=3")
    for command in ("export", "generate"):
        more = {"export": f"to={tmp_path / 'refused'}", "generate": "prompt=a"}[command]
        assert lost_here(command, f"source={tmp_path / 'dense'}", more) == 2
        message = capsys.readouterr().err
        assert f"source = {tmp_path / 'dense'}" in message
        assert "Traceback" not in message


def test_an_index_without_names_and_a_generation_config_that_is_cut_off(tmp_path, capsys):
    dense(tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text('{"eos_token_id": [1,')
    assert "generation_config.json cannot be read" in refused(capsys, tmp_path / "dense", "lost_rank=3")
    (tmp_path / "dense" / "generation_config.json").unlink()
    (tmp_path / "dense" / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": [1]}')
    assert "is no index of weights" in refused(capsys, tmp_path / "dense", "lost_rank=3")
    assert lost_here("export", f"source={tmp_path / 'dense'}", f"to={tmp_path / 'refused'}") == 2
    assert "its weights cannot be loaded" in capsys.readouterr().err


def test_folders_that_are_not_whole(tmp_path, capsys):
    model = dense(tmp_path / "dense")
    source = tmp_path / "dense"
    shards = sorted(source.glob("*.safetensors"))
    moved = shards[1].rename(tmp_path / "moved")
    message = refused(capsys, source, "lost_rank=3")
    assert shards[1].name in message
    assert "missing shards" in message
    (source / "model.safetensors.index.json").rename(tmp_path / "index")
    assert shards[1].name in refused(capsys, source, "lost_rank=3")
    (tmp_path / "index").rename(source / "model.safetensors.index.json")
    shards[1].write_bytes(moved.read_bytes()[:-100])
    assert "damaged or cut off" in refused(capsys, source, "lost_rank=3")
    moved.rename(shards[1])
    name, tensor = next((name, value) for name, value in load_file(shards[1]).items() if "proj.weight" in name)
    whole = load_file(shards[1])
    for changed, words in (
        (tensor[:-1], "config.json says"),
        (torch.full_like(tensor, math.inf), "not finite"),
        (tensor.to(torch.int8), "quantised"),
        (None, "lack"),
    ):
        edit = {key: value for key, value in whole.items() if key != name}
        save_file(edit | ({} if changed is None else {name: changed.contiguous()}), shards[1])
        message = refused(capsys, source, "lost_rank=3")
        assert words in message, message
        assert name in message
    for path in source.glob("*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    assert "pickles" in refused(capsys, source, "lost_rank=3")
    (source / "pytorch_model.bin").unlink()
    assert "no weights" in refused(capsys, source, "lost_rank=3")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_what_is_not_converted_is_finite_too(tmp_path, capsys, name):
    model = dense(tmp_path / "dense")
    for value, dtype, words in (
        (1e5, "fp16", "beyond what float16 holds: use dtype=fp32 or bf16"),
        (math.nan, "source", "not finite: the checkpoint is damaged"),
    ):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = value
        model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
        message = refused(capsys, tmp_path / "dense", "lost_rank=3", f"dtype={dtype}")
        assert words in message
        assert name in message


def test_a_failure_while_writing_leaves_nothing(tmp_path, capsys, monkeypatch):
    dense(tmp_path / "dense")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("lost.convert.folder.save_file", full)
    assert "no space left" in refused(capsys, tmp_path / "dense", "lost_rank=3")
