"""What `source=` may name, what comes out of it bit for bit, and what it says where it is not that."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, BertConfig, LlamaForCausalLM, T5Config

from lost.assemble.load import load_model
from lost.checkpoint import CheckpointManager, write_status
from lost.config.compose import compose
from lost.config.section import to_dict
from lost.export import save_folder
from lost.model import LostLlamaForCausalLM, build_model
from lost.testing.runs import TINY_MODEL
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import CheckpointError, LostError


def run_config(run_dir, *overrides):
    is_dense = "parameterization=dense" in overrides
    tiny = [override for override in TINY_MODEL if not (is_dense and override.startswith("parameterization."))]
    return compose("pretrain", [*tiny, f"run_dir={run_dir}", "train.seq_len=32", *overrides])


def random_model(config, seed):
    """A model whose every weight, gamma and index included, differs from what an initialisation would give."""
    model = build_model(config.model, config.parameterization, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def write_run(run_dir, *overrides, steps=(4,), dtype=torch.float32):
    """A run directory as training leaves it, one random model a checkpoint; returns the models by step."""
    config = run_config(run_dir, *overrides)
    manager, models = CheckpointManager(run_dir / "checkpoints", keep=10), {}
    for step in steps:
        models[step] = random_model(config, seed=step).to(dtype)
        counters = {"step": step, "tokens_seen": 10 * step}
        manager.save(step, {"model": models[step].state_dict()}, {"counters": counters, "config": to_dict(config)})
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    tiny_tokenizer().save_pretrained(run_dir / "tokenizer")
    write_status(run_dir, "running", max(steps))
    return models


def assert_same_model(loaded, expected):
    """The same tensors bit for bit, and the same logits, so that buffers outside the state_dict are right too."""
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
    ids = torch.randint(2, 258, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected.eval()(ids).logits)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parameterization=dense"],
        ["parameterization.gamma_mode=learnable"],
        ["parameterization.density=0", "model.tie_word_embeddings=true"],
        ["parameterization.selection_axis=rows", "model.num_key_value_heads=2", "model.rope_theta=500.0"],
    ],
    ids=["lost", "dense", "learnable", "tied", "rows"],
)
def test_checkpoint_loads_bit_exactly(tmp_path, overrides):
    models = write_run(tmp_path / "run", *overrides)
    loaded = load_model(str(tmp_path / "run" / "checkpoints" / "step_00000004"))
    assert_same_model(loaded.model, models[4])
    assert isinstance(loaded.model, LlamaForCausalLM)
    assert isinstance(loaded.model, LostLlamaForCausalLM) == ("parameterization=dense" not in overrides)
    assert not loaded.model.training
    assert loaded.tokenizer.eos_token_id == 1
    assert loaded.model.config.eos_token_id == 1


def test_run_directory_is_its_newest_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    models = write_run(run_dir, steps=(4, 8))
    loaded = load_model(str(run_dir))
    assert_same_model(loaded.model, models[8])
    assert loaded.origin == str(run_dir / "checkpoints" / "step_00000008")
    # Negative control: the two checkpoints differ.
    with pytest.raises(AssertionError):
        assert_same_model(loaded.model, models[4])


def test_damaged_newest_checkpoint_is_skipped_and_named_if_asked_for(tmp_path):
    run_dir = tmp_path / "run"
    models = write_run(run_dir, steps=(4, 8))
    weights = run_dir / "checkpoints" / "step_00000008" / "model_00000_process_00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert_same_model(load_model(str(run_dir)).model, models[4])
    with pytest.raises(CheckpointError, match=r"model_00000_process_00000\.safetensors is damaged"):
        load_model(str(weights.parent))


def test_final_is_used_when_the_run_is_finished_and_only_then(tmp_path):
    run_dir = tmp_path / "run"
    models = write_run(run_dir, steps=(4,))
    final = random_model(run_config(run_dir), seed=99)
    save_folder(final, tiny_tokenizer(), run_dir / "final", "card")
    # Extended after it had finished: final/ is of an earlier step than the checkpoint.
    assert_same_model(load_model(str(run_dir)).model, models[4])
    write_status(run_dir, "finished", 4)
    assert_same_model(load_model(str(run_dir)).model, final)
    assert_same_model(load_model(str(run_dir / "final")).model, final)
    shutil.rmtree(run_dir / "checkpoints")
    write_status(run_dir, "running", 5)
    assert_same_model(load_model(str(run_dir)).model, final)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_dtype(tmp_path, stored, wanted, kind):
    models = write_run(tmp_path / "run", dtype=stored)
    source = tmp_path / "run"
    if kind == "export":
        source = save_folder(models[4], tiny_tokenizer(), tmp_path / "export", "card")
    loaded = load_model(str(source), dtype=wanted).model
    assert loaded.dtype == (wanted or stored)
    expected = models[4].to(wanted or stored)
    # Module.to() rounds the rotary frequencies too, which a loaded model must not have done.
    expected.model.rotary_emb = type(expected.model.rotary_emb)(expected.config)
    assert_same_model(loaded, expected)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_gamma_stays_float32_in_a_bfloat16_model(tmp_path):
    models = write_run(tmp_path / "run", "parameterization.gamma_mode=learnable")
    loaded = load_model(str(tmp_path / "run"), dtype=torch.bfloat16).model
    gammas = {name: value for name, value in loaded.state_dict().items() if name.endswith("gamma")}
    assert gammas
    assert all(torch.equal(value, models[4].state_dict()[name]) for name, value in gammas.items())


def test_dense_export_of_transformers(tmp_path):
    model = tiny_llama()
    loaded = load_model(str(save_folder(model, tiny_tokenizer(), tmp_path / "export", "card")))
    assert type(loaded.model) is LlamaForCausalLM
    assert_same_model(loaded.model, model)
    assert loaded.place.run_dir is None


def test_sharded_export(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "export", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path / "export")
    shards = sorted((tmp_path / "export").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same_model(load_model(str(tmp_path / "export")).model, model)
    shards[0].unlink()
    with pytest.raises(LostError, match="cannot be loaded"):
        load_model(str(tmp_path / "export"))


def whole_export(folder):
    return save_folder(tiny_llama(), tiny_tokenizer(), folder, "card")


def without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def garbled(name):
    return lambda folder: (folder / name).write_text('{"model_type": "lla')


def with_config(config):
    return lambda folder: config.save_pretrained(folder)


def unknown_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))


def wider_model(folder):
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size *= 2
    config.save_pretrained(folder)


def more_layers(folder):
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers += 1
    config.save_pretrained(folder)


DAMAGES = {
    "weights": (without("model.safetensors"), "not complete: it has no weights"),
    "config": (without("config.json"), "weights and no config.json"),
    "tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "tokenizer.json": (without("tokenizer.json"), "tokenizer in .* cannot be loaded"),
    "everything": (without("config.json", "model.safetensors", "tokenizer_config.json"), "holds no model .*README.md"),
    "truncated": (truncated, "weights cannot be loaded"),
    "garbled config": (garbled("config.json"), "config.json"),
    "garbled tokenizer": (garbled("tokenizer.json"), "tokenizer in .* cannot be loaded"),
    "encoder and decoder": (with_config(T5Config()), "is a t5 model, which is not a causal language model"),
    "unknown type": (unknown_model_type, "names no model"),
    "other shapes": (wider_model, r"down_proj.weight is \[\d+, \d+\] instead of .* and 3 more: its config"),
    "missing layers": (more_layers, "weights lack .*layers.2.*and 6 more"),
    "other tensors": (with_config(BertConfig(is_decoder=True)), "weights"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_incomplete_export_says_what_is_wrong(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = whole_export(tmp_path / "export")
    damage(folder)
    with pytest.raises(LostError, match=message) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0")
    for source, message in {
        "empty": "empty folder",
        str(tmp_path / "nothing"): "there is no such folder",
        "run/step": "there is no such folder",
        "./nothing": "there is no such folder",
        "not a/hub id!": "there is no such folder",
        "": "there is no such folder",
        "file.safetensors": "is a file",
        "run": "without a complete checkpoint",
    }.items():
        with pytest.raises(LostError, match=message):
            load_model(source)


def test_checkpoint_without_its_run(tmp_path):
    write_run(tmp_path / "run")
    moved = tmp_path / "elsewhere" / "step_00000004"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step_00000004", moved)
    with pytest.raises(LostError, match=r"tokenizer is missing.*lost export"):
        load_model(str(moved))


def test_half_written_checkpoint(tmp_path):
    write_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_model(str(checkpoint))
    with pytest.raises(LostError, match="without a complete checkpoint"):
        load_model(str(tmp_path / "run"))


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_hub_id_without_a_hub_fails_at_once(tmp_path, monkeypatch, environment):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(LostError, match=r"somebody/some-model.*no folder of this name.*hub"):
        load_model("somebody/some-model")
    assert time.monotonic() - started < 10


def test_hub_id_in_the_local_cache_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models--somebody--some-model"
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = tiny_llama(seed=5)
    save_folder(model, tiny_tokenizer(), repository / "snapshots" / revision, "card")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    loaded = load_model("somebody/some-model")
    assert_same_model(loaded.model, model)
    assert loaded.origin == "somebody/some-model"
    # A folder of that name comes before the hub.
    monkeypatch.chdir(tmp_path)
    other = tiny_llama(seed=6)
    save_folder(other, tiny_tokenizer(), Path("somebody/some-model"), "card")
    assert_same_model(load_model("somebody/some-model").model, other)
