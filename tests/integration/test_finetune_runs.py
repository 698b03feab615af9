"""`lost finetune` end to end on tiny models: methods, sources, tasks, early end, resume, and what is left behind."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertForMaskedLM,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2ForMaskedLM,
    DistilBertForMaskedLM,
    LlamaForSequenceClassification,
)

from lost.finetune.adapter_folder import load_adapted
from lost.testing.examples import finetune_run, tiny_roberta, write_conversations, write_labelled
from lost.testing.forked import Forked
from lost.testing.runs import lost_here, read_metrics, tiny_run, write_corpus
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import LostError

METHODS = ["full", "lora", "lost_adapter"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pre-trained LOST run, a dense export and examples."""
    folder = tmp_path_factory.mktemp("finetune")
    assert lost_here(*tiny_run(folder / "lost_run", write_corpus(folder), "train.max_steps=4")) == 0
    tiny_llama(initializer_range=0.1).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    write_labelled(folder / "train.jsonl", 120)
    write_labelled(folder / "test.jsonl", 40, seed=1)
    write_conversations(folder / "chat.jsonl", 40)
    return folder


def finetuned(place, name, source, *overrides):
    arguments = finetune_run(place / name, place / source, place / "train.jsonl", *overrides)
    assert lost_here(*arguments) == 0
    return place / name


def evaluations(run_dir, key):
    return {line["step"]: line[key] for line in read_metrics(run_dir) if key in line}


@pytest.mark.parametrize("source", ["lost_run", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_every_kind_of_model(place, method, source):
    if method == "lora":
        pytest.importorskip("peft")
    test = f"data.test_files=[{place / 'test.jsonl'}]"
    more = ["train.max_steps=40", "optimizer.learning_rate=0.01", f"method={method}", test]
    run = finetuned(place, f"{method}_{source}", source, *more)
    result = json.loads((run / "result.json").read_text())
    assert result["test"]["test"]["accuracy"] >= 0.9
    assert evaluations(run, "eval/accuracy")[result["kept_step"]] == max(evaluations(run, "eval/accuracy").values())
    model = load_adapted(run / "final") if method != "full" else loaded(run / "final")
    check_predictions(model, run, place / "test.jsonl")


def loaded(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def check_predictions(model, run, file):
    """What is saved gives the predictions that the run wrote, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    lines = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    for text, line in zip(texts, lines, strict=True):
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
        assert np.allclose(probabilities, line["probabilities"], atol=1e-4)


def test_an_encoder_becomes_a_classifier(place):
    tiny_roberta(place / "roberta")
    run = finetuned(place, "encoder", "roberta", "train.max_steps=30", "method=lost_adapter")
    model = load_adapted(run / "final")
    assert type(model).__name__ == "RobertaForSequenceClassification"
    losses = evaluations(run, "eval/loss")
    assert losses[30] < losses[0]
    assert lost_here(*finetune_run(place / "e2", place / "roberta", place / "train.jsonl", "task=text")) == 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_dropout_beside_the_head_is_no_part_of_it(place, method):
    """BERT's classifier has one; so has every layer that LoRA adds."""
    if method == "lora":
        pytest.importorskip("peft")
    sizes = {"vocab_size": 258, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(num_attention_heads=2, max_position_embeddings=64, **sizes)
    BertForSequenceClassification(config).save_pretrained(place / "bert")
    tiny_tokenizer().save_pretrained(place / "bert")
    run = finetuned(place, f"bert_{method}", "bert", "train.max_steps=2", f"method={method}")
    assert (run / "final").is_dir()


def exported(place, run, capsys, *options):
    """(the folder, what was printed) of an export that must succeed."""
    to = place / f"{run.name}_{len(options)}_export"
    capsys.readouterr()
    assert lost_here("export", f"source={run}", f"to={to}", *options) == 0
    return to, capsys.readouterr().out


@pytest.mark.parametrize("method", ["full", "lora", "lost_adapter"])
def test_an_export_of_a_classifier_is_a_plain_classifier(place, capsys, method):
    if method == "lora":
        pytest.importorskip("peft")
    more = ["method.activation=identity"] if method == "lost_adapter" else []
    run = finetuned(place, f"to_export_{method}", "dense", f"method={method}", *more, "train.max_steps=4",
                    f"data.test_files=[{place / 'test.jsonl'}]")  # fmt: skip
    to, said = exported(place, run, capsys)
    assert "AutoModelForSequenceClassification.from_pretrained" in said
    model = loaded(to)
    assert type(model) is LlamaForSequenceClassification
    assert model.config.id2label == {0: "0", 1: "1"}
    assert not [name for name in load_file(to / "model.safetensors") if "lora" in name or "delta" in name]
    check_predictions(model, run, place / "test.jsonl")
    card = (to / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in card
    assert "lost generate" not in card


def test_a_lost_classifier_has_a_dense_form_without_an_activation(place, capsys):
    corpus = place / "corpus.jsonl"
    straight = ["parameterization.activation=identity", "train.max_steps=4"]
    assert lost_here(*tiny_run(place / "straight_run", corpus, *straight)) == 0
    more = [f"data.test_files=[{place / 'test.jsonl'}]", "train.max_steps=4"]
    run = finetuned(place, "straight", "straight_run", *more)
    to, _ = exported(place, run, capsys, "form=dense")
    model = loaded(to)
    assert type(model) is LlamaForSequenceClassification
    assert model.config.pad_token_id is not None
    check_predictions(model, run, place / "test.jsonl")
    to, _ = exported(place, run, capsys)
    assert type(loaded(to)).__name__ == "LostLlamaForSequenceClassification"
    check_predictions(loaded(to), run, place / "test.jsonl")
    curved = finetuned(place, "curved", "lost_run", *more)
    for source, form, message in (
        (curved, "dense", "have an activation between their factors"),
        (run, "self_contained", "its modelling file is for language models, and this is a classifier"),
        (finetuned(place, "beside_lost", "lost_run", *more, "method=lost_adapter"), "auto", "cannot be added to"),
    ):
        assert lost_here("export", f"source={source}", f"to={place / 'none'}", f"form={form}") == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (place / "none").exists()


ENCODERS = {
    "bert": BertForMaskedLM,
    "albert": AlbertForMaskedLM,
    "distilbert": DistilBertForMaskedLM,
    "deberta-v2": DebertaV2ForMaskedLM,
}


@pytest.mark.parametrize("method", ["lora", "lost_adapter"])
@pytest.mark.parametrize("family", ENCODERS)
def test_what_a_masked_language_model_lacks_is_saved_with_the_adapter(place, family, method):
    """A pooler between blocks and classifier is new there, as the classifier is."""
    if method == "lora":
        pytest.importorskip("peft")
    sizes = {"vocab_size": 258, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    config = AutoConfig.for_model(family, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, **sizes)
    if family == "distilbert":
        config.update({"dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 2})
    torch.manual_seed(0)
    ENCODERS[family](config).save_pretrained(place / f"masked_{family}")
    tiny_tokenizer().save_pretrained(place / f"masked_{family}")
    run = finetuned(place, f"masked_{family}_{method}", f"masked_{family}", "train.max_steps=6", "seed=5",
                    f"method={method}", f"data.test_files=[{place / 'test.jsonl'}]")  # fmt: skip
    check_predictions(load_adapted(run / "final"), run, place / "test.jsonl")
    names = load_file(run / "final" / "adapter_model.safetensors")
    assert any("pooler" in name for name in names) == (family != "distilbert")


def test_an_adapter_that_stays_beside_its_layers_is_no_start(place, capsys):
    run = finetuned(place, "beside", "lost_run", "task=text", f"data.train_files=[{place / 'corpus.jsonl'}]",
                    "method=lost_adapter", "train.max_steps=1")  # fmt: skip
    capsys.readouterr()
    for more in (["task=text", f"data.train_files=[{place / 'corpus.jsonl'}]"], ["task=classification"]):
        assert lost_here(*finetune_run(place / "no_start", run, place / "train.jsonl", *more)) == 2
        assert "its adapter cannot be added to" in capsys.readouterr().err


def test_a_classifier_starts_from_a_language_model_with_its_adapter_added(place, capsys):
    run = finetuned(place, "adapted", "dense", "task=text", f"data.train_files=[{place / 'corpus.jsonl'}]",
                    "method=lost_adapter", "method.activation=identity", "train.max_steps=3",
                    "optimizer.learning_rate=0.05")  # fmt: skip
    assert lost_here("export", f"source={run}", f"to={place / 'adapted_export'}") == 0
    exported = load_file(place / "adapted_export" / "model.safetensors")
    untrained = ["train.max_steps=1", "optimizer.learning_rate=0"]
    classifier = load_file(finetuned(place, "on_adapted", "adapted", *untrained) / "final" / "model.safetensors")
    base = load_file(place / "dense" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(classifier[name], exported[name])
    assert not torch.equal(classifier[name], base[name])
    # The adapter of a classifier is none.
    head = finetuned(place, "head", "dense", "method=lost_adapter", "train.max_steps=1")
    assert lost_here(*finetune_run(place / "no_head", head, place / "train.jsonl")) == 2
    assert "is the adapter of a classifier, not of a language model" in " ".join(capsys.readouterr().err.split())


def test_the_best_checkpoint_is_kept_and_training_ends_when_nothing_gets_better(place):
    # So high a rate that the first evaluation is hardly the worst.
    more = ["train.max_steps=60", "evaluation.every_steps=2", "evaluation.patience=3", "checkpoint.keep=1"]
    run = finetuned(place, "early", "lost_run", *more, "evaluation.metric=loss", "optimizer.learning_rate=0.3")
    losses = {step: loss for step, loss in evaluations(run, "eval/loss").items() if step}
    status, result = (json.loads((run / name).read_text()) for name in ("status.json", "result.json"))
    best = min(losses, key=losses.__getitem__)
    assert (result["kept_step"], result["last_step"]) == (best, max(losses))
    assert max(losses) == best + 3 * 2 < 60
    assert (status["state"], status["step"]) == ("finished", max(losses))
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"step_{best:08d}", f"step_{max(losses):08d}"]
    final = load_file(run / "final" / "model.safetensors")
    stored = load_file(next((run / "checkpoints" / kept[0]).glob("model_*")))
    assert all(torch.equal(final[name], stored[f"model/{name}"]) for name in final)
    # Asked again, it is done.
    before = (run / "metrics.jsonl").read_bytes()
    finetuned(place, "early", "lost_run", *more, "evaluation.metric=loss", "optimizer.learning_rate=0.3")
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(place, method):
    if method == "lora":
        pytest.importorskip("peft")
    options = [f"method={method}", "evaluation.keep=last"]
    options += ["method.dropout=0.3"] if method == "lora" else []
    options += ["method.init=svd"] if method == "lost_adapter" else []
    whole = finetuned(place, f"whole_{method}", "dense", *options)
    broken = place / f"broken_{method}"
    arguments = finetune_run(broken, place / "dense", place / "train.jsonl", *options)
    with Forked(place / "out", arguments) as forked:
        forked.wait_until(lambda: (broken / "checkpoints" / "step_00000004" / "manifest.json").exists())
        forked.send(0, signal.SIGKILL)
        forked.exit_codes()
    assert not (broken / "final").exists()
    assert lost_here(*arguments) == 0
    assert read_metrics(broken) == read_metrics(whole)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    first, second = (load_file(run / "final" / name) for run in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_full_run_goes_on_without_its_source_and_an_adapter_refuses_another(place):
    for method in ("full", "lost_adapter"):
        tiny_llama(initializer_range=0.1).save_pretrained(place / "gone")
        tiny_tokenizer().save_pretrained(place / "gone")
        arguments = [f"method={method}", "evaluation.keep=last"]
        run = finetuned(place, f"gone_{method}", "gone", *arguments, "train.max_steps=8")
        tiny_llama(seed=5).save_pretrained(place / "gone")
        again = finetune_run(run, place / "gone", place / "train.jsonl", *arguments)
        assert lost_here(*again) == (0 if method == "full" else 2)


@pytest.mark.parametrize("method", METHODS)
def test_conversations_and_what_comes_of_them_everywhere_else(place, method, capsys):
    if method == "lora":
        pytest.importorskip("peft")
    more = ["task=instruction", f"data.train_files=[{place / 'chat.jsonl'}]", f"method={method}", "train.seq_len=64"]
    run = finetuned(place, f"chat_{method}", "dense", *more, "train.max_steps=16", "data.validation_fraction=0.2")
    losses = evaluations(run, "eval/loss")
    assert losses[16] < losses[0]
    assert lost_here("generate", f"source={run}", "prompt=user: cat", "max_new_tokens=4", "do_sample=false") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert lost_here("export", f"source={run}", f"to={place / f'merged_{method}'}") == 0
    assert (place / f"merged_{method}" / "config.json").is_file()
    source = f"source={place / f'merged_{method}'}"
    assert lost_here("generate", source, "prompt=user: cat", "max_new_tokens=4", "do_sample=false") == 0
    assert capsys.readouterr().out.splitlines()[-1] == said


@pytest.mark.parametrize("method", ["full", "lost_adapter"])
def test_another_run_goes_on_from_a_checkpoint_by_its_path(place, method):
    more = [f"method={method}", "evaluation.keep=last"]
    first = finetuned(place, f"first_{method}", "dense", *more, "train.max_steps=12")
    resume = f"checkpoint.resume={first / 'checkpoints' / 'step_00000008'}"
    second = finetuned(place, f"second_{method}", "dense", *more, "train.max_steps=12", resume)
    assert read_metrics(second)[-1] == read_metrics(first)[-1]
    moved = place / f"moved_{method}" / "checkpoints" / "step_00000008"
    shutil.copytree(first / "checkpoints" / "step_00000008", moved)
    alone = finetune_run(place / f"third_{method}", place / "dense", place / "train.jsonl", *more, "train.max_steps=12")
    assert lost_here(*alone, f"checkpoint.resume={moved}") == 2
    # Its own checkpoints are all that it needs from now on.
    (second / "status.json").unlink()
    shutil.rmtree(second / "final")
    assert finetuned(place, f"second_{method}", "dense", *more, "train.max_steps=12") == second
    assert (second / "final").is_dir()


def test_a_lora_folder_that_is_not_whole(place):
    pytest.importorskip("peft")
    run = finetuned(place, "lora_torn", "lost_run", "train.max_steps=1", "method=lora")
    weights = load_file(run / "final" / "adapter_model.safetensors")
    for part in ("score", "lora_A"):
        rest = {name: value for name, value in weights.items() if part not in name}
        save_file(rest, run / "final" / "adapter_model.safetensors")
        with pytest.raises(LostError, match=r"is not complete: adapter_model.safetensors lacks"):
            load_adapted(run / "final")
    (run / "final" / "adapter_config.json").unlink()
    with pytest.raises(LostError, match=r"is not complete: it has no adapter_config.json"):
        load_adapted(run / "final")


def test_text(place):
    more = ["task=text", f"data.train_files=[{place / 'corpus.jsonl'}]", "method=lost_adapter"]
    run = finetuned(place, "text", "lost_run", *more)
    losses = evaluations(run, "eval/loss")
    assert losses[12] < losses[0]
    # A LOST layer and an adapter are no single layer.
    assert lost_here("export", f"source={run}", f"to={place / 'no'}") == 2
    assert not (place / "no").exists()


def test_epochs_decide_the_length(place):
    run = finetuned(place, "epochs", "lost_run", "train.max_steps=0", "train.num_epochs=0.5")
    sizes = len((place / "train.jsonl").read_text().splitlines())
    steps = max(evaluations(run, "loss"))
    # A tenth is held out, roughly.
    assert 0.5 * 0.8 * sizes / 8 <= steps <= 0.5 * sizes / 8 + 1


def test_where_the_last_weights_are_kept_no_best_ones_are_saved(place):
    more = ["train.max_steps=6", "evaluation.every_steps=2", "evaluation.keep=last", "checkpoint.every_steps=0"]
    run = finetuned(place, "last", "lost_run", *more)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000006"]
