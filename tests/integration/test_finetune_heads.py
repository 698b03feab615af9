"""Sources and run directories that are something else than they seem: other labels, other data, other settings."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from lost.config.compose import compose
from lost.finetune.adapter_folder import load_adapted
from lost.finetune.start import Head, starting_model
from lost.testing.examples import finetune_run, save_classifier, write_conversations, write_labelled
from lost.testing.runs import lost_here, read_metrics
from lost.testing.tiny import tiny_llama, tiny_tokenizer
from lost.utils.errors import LostError

IDS = torch.tensor([[5, 9, 77, 30], [8, 8, 101, 3]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    save_dense(folder / "dense")
    write_labelled(folder / "train.jsonl", 60)
    return folder


def save_dense(folder, **changes):
    tiny_llama(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def said(capsys):
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return " ".join((out + err).split())


def started(folder, *names):
    file = write_labelled(folder / "train.jsonl", 4)
    files = [f"data.train_files=[{file}]", f"data.validation_files=[{file}]"]
    config = compose("finetune", [f"source={folder}", "task=classification", "run_dir=none", *files])
    return starting_model(config, Head(names), torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_head_follows_the_names_of_its_labels(tmp_path, family, caplog):
    model = save_classifier(tmp_path / "c", family, ["pos", "neutral", "neg"])
    expected = logits(model)
    torch.testing.assert_close(logits(started(tmp_path / "c", "neg", "neutral", "pos")), expected[:, [2, 1, 0]])
    torch.testing.assert_close(logits(started(tmp_path / "c", "pos", "neutral", "neg")), expected)
    # Numbers are places in the model's own order.
    torch.testing.assert_close(logits(started(tmp_path / "c", "0", "1", "2")), expected)
    assert "starts anew" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "roberta"])
@pytest.mark.parametrize("names", [("cat", "dog", "cow"), ("neg", "pos"), ()])
def test_a_head_for_other_labels_starts_anew(tmp_path, family, names, caplog):
    model = save_classifier(tmp_path / "c", family, ["pos", "neutral", "neg"])
    found = started(tmp_path / "c", *names)
    assert "classifies into neg, neutral, pos, the data into" in caplog.text
    assert "the head starts anew" in caplog.text
    assert logits(found).shape == (2, len(names) or 1)
    prefix = model.base_model_prefix
    old, new = model.state_dict(), found.state_dict()
    for name, weight in new.items():
        if name.startswith(f"{prefix}."):
            assert torch.equal(weight, old[name]), name
        else:
            # Drawn with 0.02 (tiny_llama: 0.3), or zero; none of the old values is left.
            assert weight.shape != old[name].shape or not torch.equal(weight, old[name]), name
            assert float(weight.abs().max()) < 5 * found.config.initializer_range
    assert torch.equal(logits(found), logits(started(tmp_path / "c", *names)))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_classifier_is_no_language_model(tmp_path, capsys, is_tied):
    save_dense(tmp_path / "dense", tie_word_embeddings=is_tied)
    train = write_labelled(tmp_path / "train.jsonl", 30)
    assert lost_here(*finetune_run(tmp_path / "run", tmp_path / "dense", train, "train.max_steps=1")) == 0
    source = f"source={tmp_path / 'run'}"
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a text with the number {n}"}) + "\n" for n in range(40)))
    for arguments in (
        ["generate", source, "prompt=x"],
        ["evaluate", source, "data=text_files", f"data.train_files=[{text}]", f"data.cache_dir={tmp_path}"],
        ["convert", source, f"to={tmp_path / 'to'}", "lost_rank=4", "perplexity=false"],
        finetune_run(tmp_path / "second", tmp_path / "run", text, "task=text"),
    ):
        capsys.readouterr()
        assert lost_here(*arguments) == 2
        assert "is a text classifier" in said(capsys)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("labels", "metric", "known"),
    [
        ([0, 1], "pearson", "auto, loss, accuracy, matthews, f1"),
        ([0, 1, 2], "f1", "auto, loss, accuracy, matthews"),
    ],
)
def test_a_metric_that_the_labels_do_not_have(place, capsys, tmp_path, labels, metric, known):
    lines = [{"text": f"text {number}", "label": labels[number % len(labels)]} for number in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = finetune_run(tmp_path / "run", place / "dense", tmp_path / "t.jsonl", f"evaluation.metric={metric}")
    assert lost_here(*arguments) == 2
    assert f"evaluation.metric = {metric} with {len(labels)} labels: must be {known}" in said(capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_run_dir_that_is_a_model(place, capsys):
    before = sorted(path.name for path in (place / "dense").iterdir())
    assert lost_here(*finetune_run(place / "dense", place / "dense", place / "train.jsonl")) == 2
    assert "holds a model or a checkpoint (config.json), no run: name a folder of its own" in said(capsys)
    assert sorted(path.name for path in (place / "dense").iterdir()) == before


def test_a_finished_run_with_other_data_and_one_that_goes_on_with_other_settings(place, capsys, tmp_path):
    chat = write_conversations(tmp_path / "chat.jsonl", 40)
    more = ["task=instruction", "train.max_steps=4", "checkpoint.every_steps=4"]
    arguments = finetune_run(tmp_path / "run", place / "dense", chat, *more)
    assert lost_here(*arguments) == 0
    assert lost_here(*arguments) == 0
    capsys.readouterr()
    lines = chat.read_text()
    chat.write_text(lines + lines.splitlines()[0].replace("cat", "dog").replace("cow", "dog") + "\n")
    assert lost_here(*arguments) == 2
    assert "was trained on other data" in said(capsys)
    chat.write_text(lines)
    longer = ["train.max_steps=8", "optimizer.learning_rate=0.002"]
    rate = next(word for word in arguments if word.startswith("optimizer.learning_rate="))
    assert rate != longer[1]
    assert lost_here(*arguments, *longer) == 0
    text = said(capsys)
    assert "optimizer.learning_rate: step_00000004 was made with" in text
    assert "now 0.002" in text
    assert "train.max_steps: step_00000004 was made with 4, now 8" in text
    assert max(line["step"] for line in read_metrics(tmp_path / "run")) == 8


def test_how_many_texts_were_cut_is_said_whether_they_are_read_or_cached(place, capsys, tmp_path):
    lines = [{"text": "good fine " * (10 if number < 7 else 1), "label": number % 2} for number in range(30)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    validation = write_labelled(tmp_path / "v.jsonl", 5)
    for run in ("first", "second"):
        more = [f"data.validation_files=[{validation}]", "train.seq_len=30", "train.max_steps=1"]
        assert lost_here(*finetune_run(tmp_path / run, place / "dense", file, *more)) == 0
        text = said(capsys)
        assert "train: 7 of 30 texts were longer than train.seq_len = 30 and cut" in text
        assert "validation:" not in text


def test_the_model_of_an_adapter_is_gone(tmp_path):
    save_dense(tmp_path / "base")
    train = write_labelled(tmp_path / "train.jsonl", 30)
    more = ["method=lora", "train.max_steps=1"]
    assert lost_here(*finetune_run(tmp_path / "run", tmp_path / "base", train, *more)) == 0
    folder = tmp_path / "run" / "final"
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(LostError, match=r"belongs to the model .*base, which is not there: .*lost_adapter.json"):
        load_adapted(folder)
    facts = json.loads((folder / "lost_adapter.json").read_text())
    (folder / "lost_adapter.json").write_text(json.dumps(facts | {"source": str(tmp_path / "moved")}))
    load_adapted(folder)
    (folder / "adapter_config.json").write_text("x")
    with pytest.raises(LostError, match=r"adapter_config.json cannot be read"):
        load_adapted(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(place, capsys, tmp_path, value):
    shutil.copytree(place / "dense", tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 2] = value
    save_file(weights, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    for arguments in (
        ["generate", f"source={tmp_path / 'bad'}", "prompt=x", "max_new_tokens=2"],
        finetune_run(tmp_path / "run", tmp_path / "bad", place / "train.jsonl"),
    ):
        assert lost_here(*arguments) == 2
        assert "model.layers.0.mlp.up_proj.weight hold values that are not finite" in said(capsys)


def test_others_may_read_what_a_run_leaves(place, tmp_path):
    mask = os.umask(0o022)
    try:
        more = ["train.max_steps=1", "method=lost_adapter"]
        assert lost_here(*finetune_run(tmp_path / "run", place / "dense", place / "train.jsonl", *more)) == 0
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run" / "final").iterdir()}
    assert modes["adapter_model.safetensors"] == 0o644
    assert set(modes.values()) == {0o644}


def test_a_tokenizer_is_not_for_evaluate_and_convert_to_choose(place, capsys):
    for arguments in (["evaluate"], ["convert", "lost_rank=4", f"to={place / 'to'}"]):
        assert lost_here(*arguments, f"source={place / 'dense'}", "data.tokenizer=train") == 2
        assert "text is read by the model's own; leave it out" in said(capsys)
