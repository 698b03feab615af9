"""`lost convert` on folders that transformers wrote: what loads afterwards, what memory it takes."""

import gc
import json
import math
import weakref

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lost.convert.conversion as conversion_module
from lost.convert.dense import convertible
from lost.model import LostLinear
from lost.testing.conversions import QUIET, converted, dense, error_of, refused, some_ids
from lost.testing.forked import carry_out
from lost.testing.runs import lost_here, read_metrics, succeed, tiny_run, write_corpus
from lost.testing.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """A picture takes four times as long as the conversion of these models; commands that are processes draw it."""
    monkeypatch.setattr("lost.convert.report.draw", lambda *_: None)


@pytest.mark.parametrize("family", convertible())
def test_full_rank_and_full_density_change_no_logits(tmp_path, family):
    model = dense(tmp_path / "dense", family)
    wanted = model(some_ids()).logits
    for number, how in enumerate(("lost_rank=1.0", "lost_rank=2 density=1.0")):
        found = converted(tmp_path / "dense", tmp_path / f"lost{number}", *how.split(), "require_saving=false")
        assert found.config.model_type == f"lost_{family}"
        assert sum(isinstance(module, LostLinear) for module in found.modules()) >= 8
        assert error_of(found(some_ids()).logits, wanted) < 1e-5
        texts = [m.generate(some_ids()[:1], max_new_tokens=6, do_sample=False).tolist() for m in (model, found)]
        assert texts[0] == texts[1]
    # Negative control: what a low rank makes is another model.
    low = converted(tmp_path / "dense", tmp_path / "low", "lost_rank=2")
    assert error_of(low(some_ids()).logits, wanted) > 0.05


def test_an_activation_changes_the_function_and_says_so(tmp_path, capsys):
    model = dense(tmp_path / "dense")
    wanted = model(some_ids()).logits
    whole = ("lost_rank=1.0", "density=0", "require_saving=false")
    converted(tmp_path / "dense", tmp_path / "identity", *whole)
    assert "activation: identity. The weights were trained without" in capsys.readouterr().out
    silu = converted(tmp_path / "dense", tmp_path / "silu", *whole, "activation=silu")
    assert "computes another function" in " ".join(capsys.readouterr().out.split())
    assert error_of(silu(some_ids()).logits, wanted) > 0.1
    assert silu.model.layers[0].mlp.up_proj.activation == "silu"


@pytest.mark.parametrize("mode", ["learnable", "folded"])
def test_gamma_modes_load(tmp_path, mode):
    model = dense(tmp_path / "dense")
    found = converted(
        tmp_path / "dense", tmp_path / "out", "lost_rank=1.0", f"gamma_mode={mode}", "gamma=0.4", "require_saving=false"
    )
    assert error_of(found(some_ids()).logits, model(some_ids()).logits) < 1e-5


@pytest.mark.parametrize("is_tied", [True, False])
def test_shards_in_and_out_tied_or_not(tmp_path, is_tied):
    model = dense(tmp_path / "dense", "qwen2", tie_word_embeddings=is_tied)
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    found = converted(tmp_path / "dense", tmp_path / "out", "lost_rank=3", "max_shard_gib=1e-5")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    tensors = {name: value for shard in shards for name, value in load_file(tmp_path / "out" / shard).items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert ("lm_head.weight" in tensors) == (not is_tied)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == is_tied
    # Whatever is not converted is the same bits, biases of converted layers too.
    same = set(tensors) & set(model.state_dict())
    assert "model.layers.1.self_attn.q_proj.bias" in same
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in same)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["num_parameters_before"] == sum(p.numel() for p in model.parameters())
    assert report["num_parameters_after"] == sum(p.numel() for p in found.parameters())
    one = converted(tmp_path / "dense", tmp_path / "one", "lost_rank=3")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert all(torch.equal(one.state_dict()[name], value) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, "source", torch.bfloat16),
        (torch.float16, "source", torch.float16),
        (torch.float64, "source", torch.float64),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.bfloat16, "fp16", torch.float16),
    ],
)
def test_dtypes(tmp_path, stored, asked, written):
    model = dense(tmp_path / "dense", dtype=stored)
    found = converted(tmp_path / "dense", tmp_path / "out", "lost_rank=1.0", f"dtype={asked}", "require_saving=false")
    assert found.dtype == written
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("sparse_index")} == {written}
    limit = 0.05 if torch.bfloat16 in (stored, written) else 0.01
    assert error_of(found.double()(some_ids()).logits, model.double()(some_ids()).logits) < limit


def test_a_budget_is_a_budget_and_energy_is_energy(tmp_path):
    dense(tmp_path / "dense")
    found = converted(tmp_path / "dense", tmp_path / "half", "parameters=0.7", "density=0.05")
    report = json.loads((tmp_path / "half" / "conversion.json").read_text())
    after = sum(parameter.numel() for parameter in found.parameters())
    assert after == report["num_parameters_after"]
    total = report["num_parameters_before"]
    # The rest is smaller than the dearest triplet.
    assert 0.7 * total - (32 + 44) < after <= 0.7 * total
    ranks = {layer["name"]: layer["lost_rank"] for layer in report["layers"]}
    assert len(set(ranks.values())) > 1
    assert all(found.get_submodule(name).lost_rank == rank for name, rank in ranks.items())
    converted(tmp_path / "dense", tmp_path / "count", f"parameters={int(0.7 * total)}", "density=0.05")
    count = json.loads((tmp_path / "count" / "conversion.json").read_text())
    assert count["layers"] == report["layers"]

    converted(tmp_path / "dense", tmp_path / "energy", "energy=0.6", "density_overrides.mlp.up_proj=0.1")
    report = json.loads((tmp_path / "energy" / "conversion.json").read_text())
    assert all(layer["energy_kept"] >= 0.6 for layer in report["layers"])
    dense_weights = {}
    for path in (tmp_path / "dense").glob("*.safetensors"):
        dense_weights |= load_file(path)
    for layer in report["layers"]:
        values = torch.linalg.svdvals(dense_weights[f"{layer['name']}.weight"].double()).square()
        assert values[: layer["lost_rank"]].sum() / values.sum() == pytest.approx(layer["energy_kept"], rel=1e-6)
        assert values[: layer["lost_rank"] - 1].sum() / values.sum() < 0.6


def test_layers_whose_energy_saves_nothing_stay_dense(tmp_path, capsys):
    model = dense(tmp_path / "dense")
    with torch.no_grad():
        # One steep layer among flat ones.
        steep = model.model.layers[1].mlp.up_proj.weight
        steep.copy_(torch.outer(torch.randn(44), torch.randn(32)) + 0.01 * torch.randn(44, 32))
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    found = converted(tmp_path / "dense", tmp_path / "out", "energy=0.99", "density_overrides.*=0.04")
    assert [name for name, module in found.named_modules() if isinstance(module, LostLinear)] == [
        "model.layers.1.mlp.up_proj"
    ]
    assert "13 of 14 layers" in capsys.readouterr().out
    assert error_of(found(some_ids()).logits, model(some_ids()).logits) < 0.05
    assert lost_here("convert", f"source={tmp_path / 'dense'}", f"to={tmp_path / 'x'}", *QUIET, "energy=0.999999") == 2
    assert "every layer needs a rank" in capsys.readouterr().err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Settings of a small corpus with rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("the cat sat on the mat, and the dog did not. " * 90)
    (folder / "held_out.txt").write_text("the dog sat on the cat, and the mat did not mind. " * 40)
    files = [f"data.train_files=[{folder / 'train.txt'}]", f"data.validation_files=[{folder / 'held_out.txt'}]"]
    return ["data=text_files", *files, f"data.cache_dir={folder / 'cache'}", "seq_len=32", "evaluation.max_tokens=900"]


def test_the_whole_command_as_a_process(tmp_path, text):
    """Report, picture, card and perplexities; then evaluate and generate take the folder."""
    model = dense(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages }}")
    target = tmp_path / "out"
    printed = succeed("convert", f"source={tmp_path / 'dense'}", f"to={target}", *text, "lost_rank=0.4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
    report = json.loads((target / "conversion.json").read_text())
    before, after = (report[f"perplexity_{when}"]["validation"] for when in ("before", "after"))
    assert before["num_tokens"] == after["num_tokens"] >= 900
    assert f"{before['perplexity']:.3f} -> {after['perplexity']:.3f}" in printed
    assert (target / "conversion.png").read_bytes().startswith(b"\x89PNG")
    card = (target / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "lost_llama" in (target / "config.json").read_text()
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    found = AutoModelForCausalLM.from_pretrained(target).eval()
    loss = {name: _loss(net, tmp_path.parent, text) for name, net in (("before", model), ("after", found))}
    assert before["loss"] == pytest.approx(loss["before"], rel=1e-5)
    assert after["loss"] == pytest.approx(loss["after"], rel=1e-5)
    assert before["loss"] != pytest.approx(after["loss"], rel=1e-4)
    for layer in report["layers"]:
        dense_weight = model.get_submodule(layer["name"]).weight.double()
        own = found.get_submodule(layer["name"]).dense_weight().double()
        assert layer["relative_error"] == pytest.approx(
            float((dense_weight - own).norm() / dense_weight.norm()), rel=1e-4
        )
    assert lost_here("evaluate", f"source={target}", *text) == 0
    assert lost_here("generate", f"source={target}", "prompt=the cat", "max_new_tokens=4") == 0


def _loss(net, _, text):
    """Mean loss of the predicted tokens, rows of 32 bytes of the held-out file by transformers' own formula."""
    path = text[2].partition("[")[2].rstrip("]")
    with open(path) as file:
        ids = torch.tensor(tiny_tokenizer()(file.read()).input_ids + [1])
    num_rows = math.ceil(900 / 31)
    rows = ids[: num_rows * 32].view(num_rows, 32)
    with torch.no_grad():
        return float(net(rows, labels=rows).loss)


def test_calibration_counts_inputs_as_they_come(tmp_path, text):
    """Scales against inputs that hooks of this test catch; the calibrated error falls, and full rank stays exact."""
    model = dense(tmp_path / "dense")
    converted(tmp_path / "dense", tmp_path / "plain", *text, "lost_rank=6", "perplexity=false")
    found = converted(tmp_path / "dense", tmp_path / "out", *text, "lost_rank=6", "calibration_tokens=100000")
    whole = converted(
        tmp_path / "dense",
        tmp_path / "whole",
        *text,
        "lost_rank=1.0",
        "calibration_tokens=64",
        "require_saving=false",
    )
    assert error_of(whole(some_ids()).logits, model(some_ids()).logits) < 1e-5
    with open(text[1].partition("[")[2].rstrip("]")) as file:
        ids = torch.tensor(tiny_tokenizer()(file.read()).input_ids + [1])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    caught = {}
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: caught.__setitem__(name, (inputs[0], output))
        )
    with torch.no_grad():
        model(rows)
    report = {
        layer["name"]: layer for layer in json.loads((tmp_path / "out" / "conversion.json").read_text())["layers"]
    }
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for name, (x, _) in caught.items():
        weight = model.get_submodule(name).weight.double()
        rms = x.flatten(0, 1).double().square().mean(0).sqrt()
        error = {
            key: (weight - net.get_submodule(name).dense_weight().double()) * rms
            for key, net in (("plain", plain), ("calibrated", found))
        }
        assert float(error["calibrated"].norm() / (weight * rms).norm()) == pytest.approx(
            report[name]["calibrated_error"], rel=0.02
        )
        assert error["calibrated"].norm() < error["plain"].norm()


def test_a_run_brings_its_own_data(tmp_path, capsys):
    """A finished dense run is converted and measured on its own validation set; its checkpoints are refused."""
    arguments = [word for word in tiny_run(tmp_path / "run", write_corpus(tmp_path)) if "parameterization." not in word]
    assert lost_here(*arguments, "parameterization=dense") == 0
    target = tmp_path / "out"
    assert lost_here("convert", f"source={tmp_path / 'run'}", f"to={target}", "energy=0.5") == 0
    logged = [line for line in read_metrics(tmp_path / "run") if "eval/loss" in line][-1]
    before = json.loads((target / "conversion.json").read_text())["perplexity_before"]["validation"]
    assert before["loss"] == pytest.approx(logged["eval/loss"], rel=1e-6)
    assert before["num_tokens"] == logged["eval/tokens"]
    assert "export it first" in refused(capsys, tmp_path / "run" / "checkpoints" / "step_00000012", "lost_rank=4")


def test_a_hub_id_from_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "hub" / "models--somebody--some-model"
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = dense(repository / "snapshots" / revision, "qwen3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    found = converted("somebody/some-model", tmp_path / "out", "lost_rank=1.0", "require_saving=false")
    assert error_of(found(some_ids()).logits, model(some_ids()).logits) < 1e-5
    assert "base_model: somebody/some-model" in (tmp_path / "out" / "README.md").read_text()


def test_never_two_whole_models(tmp_path, text, monkeypatch):
    dense(tmp_path / "dense")
    alive, most = [], []
    load = conversion_module.load_model

    def counted(*arguments):
        loaded = load(*arguments)
        alive.append(weakref.ref(loaded.model))
        gc.collect()
        most.append(sum(model() is not None for model in alive))
        return loaded

    monkeypatch.setattr(conversion_module, "load_model", counted)
    converted(tmp_path / "dense", tmp_path / "out", *text, "perplexity=true", "lost_rank=3", "calibration_tokens=64")
    assert most == [1, 1]


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """A process converts 4 and 24 blocks at about the same peak: 63 MB more weights in, 35 MB more out."""
    sizes = {}
    for num_blocks in (4, 24):
        folder = tmp_path / f"dense{num_blocks}"
        model = tiny_llama(hidden_size=256, intermediate_size=688, num_attention_heads=4, num_hidden_layers=num_blocks)
        sizes[num_blocks] = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        del model

    def peak(num_blocks, max_shard_gib):
        target = tmp_path / f"out{num_blocks}_{max_shard_gib}"
        folders = (f"source={tmp_path / f'dense{num_blocks}'}", f"to={target}")
        settings = ("lost_rank=0.3", f"max_shard_gib={max_shard_gib}", "runtime.num_threads=1")
        carry_out(tmp_path / f"{target.name}_output", ["convert", *folders, *QUIET, *settings])
        return json.loads((target / "conversion.json").read_text())["peak_memory_gib"] * 2**30

    small, large = peak(4, 0.003), peak(24, 0.003)
    assert sizes[24] - sizes[4] > 60e6
    assert large - small < 15e6
    # Negative control: one file for everything holds everything.
    assert peak(24, 1) - large > 25e6


@pytest.mark.parametrize("form", ["lost", "dense", "self_contained"])
def test_the_card_is_true_in_every_form(tmp_path, monkeypatch, form):
    dense(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(
        "---\nlicense:\n- other\nlicense_name: its-own\nlicense_link: LICENSE\nlanguage: no\n---\n# A model\n"
    )
    monkeypatch.setattr("lost.convert.report.draw", lambda _, path: path.write_bytes(b"a picture"))
    monkeypatch.chdir(tmp_path)
    converted("dense", "lost", "lost_rank=3")
    fields = ModelCard.load("lost/README.md").data.to_dict()
    # A folder is no address on a hub.
    assert "base_model" not in fields
    assert (fields["license"], fields["license_name"], fields["license_link"]) == (["other"], "its-own", "LICENSE")
    assert lost_here("export", "source=lost", "to=out", f"form={form}") == 0
    card = ModelCard.load("out/README.md")
    for line in ("(conversion.png)", "Every layer: conversion.json"):
        assert line in card.text
    for name in ("conversion.json", "conversion.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "lost" / name).read_bytes()
    assert card.text.count("```python") == card.text.count("## Use") == 1
    assert ("import lost.model" in card.text) == (form == "lost")
    assert ("trust_remote_code=True" in card.text) == (form == "self_contained")
    assert ("lost" in card.data.tags) == (form != "dense")
    assert ("each of its 14 LOST layers is multiplied out" in card.text) == (form == "dense")


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path):
    other = dense(tmp_path / "dense")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    save_file(
        {name: value.contiguous() for name, value in other.state_dict().items()},
        tmp_path / "dense" / "model.safetensors",
        {"format": "pt"},
    )
    assert (tmp_path / "dense" / "model.safetensors.index.json").is_file()
    found = converted(tmp_path / "dense", tmp_path / "out", "lost_rank=1.0", "require_saving=false")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(some_ids()).logits
    assert error_of(other(some_ids()).logits, wanted) == 0
    assert error_of(found(some_ids()).logits, wanted) < 1e-5


def test_the_tokenizer_comes_along(tmp_path):
    dense(tmp_path / "dense")
    converted(tmp_path / "dense", tmp_path / "out", "lost_rank=3")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("é cat").input_ids
    assert ids == tiny_tokenizer()("é cat").input_ids
