"""Exported forms in programs that know no `lost`: the same logits from a process in which it cannot be imported."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lost.assemble.load import load_model
from lost.config.model import LostConfig, ModelConfig
from lost.config.section import to_dict
from lost.export import dense_model, save_folder
from lost.model import LostLinear, build_model
from lost.model.other_families import OTHER_FAMILIES
from lost.testing.runs import environment, lost_here
from lost.testing.tiny import tiny_tokenizer

SIZES = {"vocab_size": 258, "hidden_size": 36, "intermediate_size": 63, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64}
IDS = torch.randint(2, 258, (2, 31), generator=torch.Generator().manual_seed(5))
# Loads every folder without `lost`; writes logits and greedy text of each, and what is still wrong to import.
WITHOUT_LOST = """
import sys
sys.modules["lost"] = sys.modules["lost_kernels"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
        text = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8, do_sample=False)
    found[folder] = {"logits": logits, "text": text, "type": type(model).__module__ + "." + type(model).__name__}
    model.save_pretrained(folder + "_again")
torch.save(found, sys.argv[2])
"""


def random_model(seed=0, **changes):
    """A LOST model with random weights of the size of trained ones, so that every part of a layer matters."""
    settings = {"lost_rank": 7, "density": 0.11, "activation": "identity", "gamma": 0.6} | changes
    tied = {"tie_word_embeddings": settings.pop("tie_word_embeddings", False)}
    model = build_model(
        ModelConfig(name="tiny", lineage_rank=7, **SIZES, **HEADS, **tied), LostConfig(**settings), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 + 0.05 * noise if name.endswith("gamma") else parameter + 0.2 * noise)
    return model.eval()


def random_model_of(family):
    """Of another family, with random weights, biases and norms."""
    lost = LostConfig(lost_rank=7, density=0.11, activation="identity", gamma=0.6)
    # Some families turn half of a head or a quarter, by pairs.
    keys = (
        SIZES | HEADS | {"hidden_size": 48, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    )
    config = AutoConfig.for_model(f"lost_{family}", **keys, parameterization=to_dict(lost))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def exported(model, folder, *overrides):
    """The folder that `lost export` makes of the model."""
    source = save_folder(model, tiny_tokenizer(), folder / "source", "# A card\n\nWords.\n")
    assert lost_here("export", f"source={source}", f"to={folder / 'out'}", *overrides) == 0
    return folder / "out"


VARIANTS = {
    "fixed": {},
    "learnable": {"gamma_mode": "learnable"},
    "folded": {"gamma_mode": "folded"},
    "rows": {"selection_axis": "rows"},
    "no_block": {"density": 0.0},
    "tied": {"tie_word_embeddings": True},
    "mixed": {"rank_overrides": {"mlp.up_proj": 3}, "density_overrides": {"self_attn.k_proj": 0.0}},
}
# A layer with an activation has no dense form.
CASES = [(name, form) for name in (*VARIANTS, *OTHER_FAMILIES) for form in ("dense", "self_contained")] + [
    ("silu", "self_contained")
]


@pytest.fixture(scope="module")
def without_lost(tmp_path_factory):
    """All forms of all variants, exported here and loaded in one process without `lost`."""
    folder = tmp_path_factory.mktemp("forms")
    models, folders = {}, {}
    for name, changes in VARIANTS.items():
        models[name] = random_model(**changes)
        source = save_folder(models[name], tiny_tokenizer(), folder / name, "card")
        for form in ("dense", "self_contained"):
            folders[name, form] = folder / f"{name}_{form}"
            assert lost_here("export", f"source={source}", f"to={folders[name, form]}", f"form={form}") == 0
    for family in OTHER_FAMILIES:
        models[family] = random_model_of(family)
        source = save_folder(models[family], tiny_tokenizer(), folder / family, "card")
        for form in ("dense", "self_contained"):
            folders[family, form] = folder / f"{family}_{form}"
            assert lost_here("export", f"source={source}", f"to={folders[family, form]}", f"form={form}") == 0
    models["silu"] = random_model(activation="silu", activation_modules="attention")
    source = save_folder(models["silu"], tiny_tokenizer(), folder / "silu", "card")
    folders["silu", "self_contained"] = folder / "silu_self_contained"
    target = folders["silu", "self_contained"]
    assert lost_here("export", f"source={source}", f"to={target}", "form=self_contained", "max_shard_size=30KB") == 0
    torch.save(IDS, folder / "ids.pt")
    command = [sys.executable, "-c", WITHOUT_LOST, folder / "ids.pt", folder / "found.pt", *folders.values()]
    modules = environment(HF_MODULES_CACHE=str(folder / "modules"))
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=modules, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt")
    return models, folders, {key: found[str(path)] for key, path in folders.items()}


@pytest.mark.parametrize(("variant", "form"), CASES)
def test_logits_without_lost_are_those_of_the_lost_form(without_lost, variant, form):
    models, _, found = without_lost
    expected = logits_of(models[variant])
    assert expected.abs().max() > 1
    assert (found[variant, form]["logits"] - expected).abs().max() < 1e-5 * expected.abs().max()
    greedy = models[variant].generate(
        IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(found[variant, form]["text"], greedy)


def test_the_dense_form_is_transformers_own_class_and_the_other_carries_its_code(without_lost):
    _, folders, found = without_lost
    assert found["fixed", "dense"]["type"] == "transformers.models.llama.modeling_llama.LlamaForCausalLM"
    config = json.loads((folders["fixed", "dense"] / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"parameterization", "lost_layers", "auto_map"} & set(config)
    assert not list(folders["fixed", "dense"].glob("*.py"))
    assert found["fixed", "self_contained"]["type"].startswith("transformers_modules.")
    code = (folders["fixed", "self_contained"] / "modeling_lost_llama.py").read_text()
    assert "import lost" not in code
    assert "from lost" not in code
    # What transformers saves again carries the code again.
    again = folders["fixed", "self_contained"].with_name("fixed_self_contained_again")
    assert (again / "modeling_lost_llama.py").is_file()
    assert "auto_map" in json.loads((again / "config.json").read_text())


def test_a_wrong_weight_changes_the_logits_of_the_dense_form(without_lost):
    """Negative control: the comparison sees one sparse block that is 0.1 % too large."""
    models, _, _ = without_lost
    model = random_model()
    layers = [module for module in model.modules() if isinstance(module, LostLinear)]
    with torch.no_grad():
        layers[0].sparse_weight.mul_(1.001)
    expected = logits_of(models["fixed"])
    assert (logits_of(model) - expected).abs().max() > 1e-5 * expected.abs().max()
    assert (logits_of(dense_model(model)) - expected).abs().max() > 1e-5 * expected.abs().max()


def test_shards_hold_all_weights_and_lost_reads_every_form(without_lost):
    models, folders, _ = without_lost
    folder = folders["silu", "self_contained"]
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    # A shard holds 30 KB of tensors, or one tensor that is larger, behind a header of names.
    for shard in shards:
        sizes = [value.nbytes for value in load_file(shard).values()]
        assert sum(sizes) <= 30_000 or len(sizes) == 1, shard
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(models["silu"].state_dict())
    for (variant, _), path in folders.items():
        expected = logits_of(models[variant])
        assert (logits_of(load_model(str(path)).model) - expected).abs().max() < 1e-5 * expected.abs().max()
    # `lost` takes a self-contained folder as its own: the same class and the same bits.
    assert torch.equal(logits_of(load_model(str(folder)).model), logits_of(models["silu"]))


@pytest.mark.parametrize("form", ["lost", "dense"])
def test_a_self_contained_folder_in_another_form_names_no_code(without_lost, tmp_path, form):
    _, folders, _ = without_lost
    out = tmp_path / "out"
    assert lost_here("export", f"source={folders['fixed', 'self_contained']}", f"to={out}", f"form={form}") == 0
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == {"lost": "lost_llama", "dense": "llama"}[form]
    assert not {"auto_map", "lost_layers"} & set(config)
    assert not list(out.glob("*.py"))


def test_a_missing_shard_is_refused(without_lost, tmp_path, capsys):
    _, folders, _ = without_lost
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folders["silu", "self_contained"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    sorted(broken.glob("model-*.safetensors"))[1].unlink()
    assert lost_here("export", f"source={broken}", f"to={tmp_path / 'new'}") == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_activation_has_no_dense_form(tmp_path, capsys):
    model = random_model(activation="relu", activation_modules="mlp")
    source = save_folder(model, tiny_tokenizer(), tmp_path / "source", "card")
    assert lost_here("export", f"source={source}", f"to={tmp_path / 'out'}", "form=dense") == 2
    message = capsys.readouterr().err
    assert "6 of 14 LOST layers have an activation" in message
    assert "mlp.gate_proj relu" in message
    assert "form=self_contained" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["lost", "self_contained"])
def test_a_dense_model_has_no_lost_form(tmp_path, capsys, form):
    source = save_folder(dense_model(random_model()), tiny_tokenizer(), tmp_path / "source", "card")
    assert lost_here("export", f"source={source}", f"to={tmp_path / 'out'}", f"form={form}") == 2
    assert "has no LOST layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bfloat16_weights_become_an_exact_dense_form_in_float32(tmp_path):
    """Merged matrices need more bits than their factors: fp32 keeps the logits, and the bf16 folder is the rounding."""
    model = random_model().to(torch.bfloat16)
    wide = random_model()
    wide.load_state_dict(
        {name: value.float() for name, value in model.state_dict().items()}
        | {name: value for name, value in model.state_dict().items() if not value.is_floating_point()}
    )
    out = exported(model, tmp_path, "form=dense", "dtype=fp32")
    expected = logits_of(wide)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    assert (logits_of(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_dense_form_in_bfloat16_is_rounded_once(tmp_path):
    model = random_model()
    out = exported(model, tmp_path, "form=dense", "dtype=bf16")
    written = load_file(out / "model.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LostLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        exact = 0.6 * (layer.low_rank_up.double() @ layer.low_rank_down.double())
        exact[:, layer.sparse_index] += 0.4 * layer.sparse_weight.double()
        assert torch.equal(written[f"{name}.weight"], exact.to(torch.bfloat16)), name
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_tampered_weights_of_a_self_contained_folder_are_seen(without_lost, tmp_path, capsys):
    """Negative control of the shapes: a block of another layer's size does not load silently."""
    _, folders, _ = without_lost
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folders["fixed", "self_contained"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("sparse_weight"))
    save_file(weights | {name: weights[name][:, :1].contiguous()}, broken / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert lost_here("export", f"source={broken}", f"to={tmp_path / 'new'}") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"source = {broken}: a LostLinear lacks sparse_weight in the checkpoint, or has another shape" in message
    assert not (tmp_path / "new").exists()
