"""`lost evaluate` of classifiers on labelled texts: against one text at a time in float64, runs, mistakes."""

import json

import numpy as np
import pytest
import torch

from lost.testing.examples import finetune_run, save_classifier, tiny_roberta, write_labelled
from lost.testing.runs import lost_here, succeed, tiny_run, write_corpus
from lost.testing.tiny import tiny_llama, tiny_tokenizer

NAMES = ["pos", "neutral", "neg"]
TEXTS = [
    text * (1 + number % 3) for number, text in enumerate(["fine ", "a bad thing", "x", "so so", "poor!", "what ?"] * 4)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    tiny_llama().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    for name, count, seed in (("train", 60, 0), ("validation", 21, 1), ("test", 37, 2)):
        write_labelled(folder / f"{name}.jsonl", count, seed)
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluated(place, *words):
    """The JSON of `lost evaluate`."""
    assert lost_here("evaluate", *words, f"to={place / 'result.json'}") == 0
    return json.loads((place / "result.json").read_text())


def measures(entry):
    (task,) = entry["tasks"].values()
    return task["measures"]


def one_by_one(model, texts):
    """Logits float64 [N, C], each text alone and unpadded."""
    tokenizer, model = tiny_tokenizer(), model.double()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_numbers_and_errors_are_those_of_each_text_alone(tmp_path, family, capsys):
    labels = [NAMES[number * number % 5 % 3] for number in range(len(TEXTS))]
    file = write(tmp_path / "t.jsonl", [{"s": text, "l": label} for text, label in zip(TEXTS, labels, strict=True)])
    numbers = np.array([NAMES.index(label) for label in labels])
    expected = {}
    for seed, name in enumerate(("a", "b")):
        logits = one_by_one(save_classifier(tmp_path / name, family, NAMES, seed), TEXTS)
        shifted = logits - logits.max(1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(TEXTS)), numbers]
        expected[name] = {"loss": losses, "accuracy": (logits.argmax(1) == numbers).astype(float)}
    # Else a mistake in the pairing would not show.
    assert expected["a"]["accuracy"].tolist() != expected["b"]["accuracy"].tolist()
    found = evaluated(
        tmp_path,
        f"source={tmp_path / 'a'}",
        f"compare_with=[{tmp_path / 'b'}]",
        f"labelled.files=[{file}]",
        "labelled.text_field=s",
        "labelled.label_field=l",
        "evaluation.micro_batch_size=7",
    )
    for entry, name in ((found, "a"), (found["compared"][0], "b")):
        for measure in ("loss", "accuracy"):
            scores, base = expected[name][measure], expected["a"][measure]
            value = measures(entry)[measure]
            assert value["value"] == pytest.approx(scores.mean(), rel=1e-4)
            assert value["standard_error"] == pytest.approx(scores.std(ddof=1) / len(TEXTS) ** 0.5, rel=1e-3)
            if name == "b":
                difference = scores - base
                assert value["difference"]["value"] == pytest.approx(difference.mean(), abs=1e-4)
                assert value["difference"]["standard_error"] == pytest.approx(
                    difference.std(ddof=1) / len(TEXTS) ** 0.5, rel=1e-3
                )
    assert measures(found)["matthews"]["standard_error"] is None
    table = capsys.readouterr().out
    assert "texts of t.jsonl" in table
    assert "shot" not in table


@pytest.mark.parametrize("method", ["full", "lost_adapter"])
def test_a_run_is_measured_on_its_own_test_files_as_it_was_at_its_end(place, method):
    run = place / method
    files = [f"data.validation_files=[{place / 'validation.jsonl'}]", f"data.test_files=[{place / 'test.jsonl'}]"]
    more = [f"method={method}", *files, "train.seq_len=9"]
    assert lost_here(*finetune_run(run, place / "dense", place / "train.jsonl", *more)) == 0
    expected = json.loads((run / "result.json").read_text())["test"]["test"]
    assert expected.pop("examples") == 37
    expected["f1 of 1"] = expected.pop("f1")
    # As a run, as its final/, and in two processes, of which one has no text left in the last round.
    for source in (run, run / "final"):
        found = measures(evaluated(place, f"source={source}"))
        assert {key: value["value"] for key, value in found.items()} == pytest.approx(expected, rel=1e-5)
    to = place / "two.json"
    succeed("evaluate", f"source={run}", f"to={to}", num_processes=2)
    found = measures(json.loads(to.read_text()))
    assert {key: value["value"] for key, value in found.items()} == pytest.approx(expected, rel=1e-5)
    # The test is one that can fail: other texts, other numbers; and the classifier has learnt its two words.
    other = measures(evaluated(place, f"source={run}", f"labelled.files=[{place / 'validation.jsonl'}]"))
    assert other["loss"]["value"] != pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.parametrize("order", [("two", "three"), ("three", "two")])
def test_classifiers_with_other_numbers_of_labels_are_compared_by_what_both_have(tmp_path, capsys, order):
    for name, count in (("two", 2), ("three", 3)):
        save_classifier(tmp_path / name, "llama", [str(number) for number in range(count)])
    file = write(tmp_path / "t.jsonl", [{"text": text, "label": len(text) % 2} for text in TEXTS])
    first, second = (tmp_path / name for name in order)
    found = evaluated(tmp_path, f"source={first}", f"compare_with=[{second}]", f"labelled.files=[{file}]")
    by_name = dict(zip(order, (found, found["compared"][0]), strict=True))
    assert set(measures(by_name["two"])) == {"loss", "accuracy", "matthews", "f1 of 1"}
    assert set(measures(by_name["three"])) == {"loss", "accuracy", "matthews"}
    with_difference = {name for name, value in measures(found["compared"][0]).items() if "difference" in value}
    assert with_difference == {"loss", "accuracy", "matthews"}
    assert capsys.readouterr().out.count(" f1 of 1 ") == (order[0] == "two")


def test_f1_is_that_of_one_label_whatever_the_order_of_the_outputs(tmp_path):
    model = save_classifier(tmp_path / "a", "llama", ["neg", "pos"])
    swapped = save_classifier(tmp_path / "b", "llama", ["pos", "neg"])
    with torch.no_grad():
        swapped.score.weight.copy_(model.score.weight[[1, 0]])
    swapped.save_pretrained(tmp_path / "b")
    labels = [("pos", "neg", "neg")[number % 3] for number in range(len(TEXTS))]
    file = write(
        tmp_path / "t.jsonl", [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    )
    found = evaluated(
        tmp_path, f"source={tmp_path / 'a'}", f"compare_with=[{tmp_path / 'b'}]", f"labelled.files=[{file}]"
    )
    predicted = [("neg", "pos")[number] for number in one_by_one(model, TEXTS).argmax(1)]
    hits = sum(p == label == "pos" for p, label in zip(predicted, labels, strict=True))
    expected = 2 * hits / (predicted.count("pos") + labels.count("pos"))
    other = 2 * sum(p == label == "neg" for p, label in zip(predicted, labels, strict=True))
    assert 0 < expected != other / (predicted.count("neg") + labels.count("neg"))
    for entry in (found, found["compared"][0]):
        assert measures(entry)["f1 of pos"]["value"] == pytest.approx(expected)


def test_a_classifier_of_pairs_is_not_measured_on_single_texts(place, tmp_path, capsys):
    file = write(tmp_path / "t.jsonl", [{"text": t, "b": "and", "label": n % 2} for n, t in enumerate(TEXTS)])
    more = ["train.max_steps=1", f"data.validation_files=[{file}]"]
    for name, own in (("single", ["train.seq_len=20"]), ("pairs", ["data.pair_field=b"])):
        assert lost_here(*finetune_run(tmp_path / name, place / "dense", file, *more, *own)) == 0
    single, pairs = (tmp_path / name for name in ("single", "pairs"))
    capsys.readouterr()
    assert lost_here("evaluate", f"source={single}", f"compare_with=[{pairs}]") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert (
        f"pair_field = empty: source = {pairs} was trained on pairs of texts, and would be measured on single"
        in message
    )
    assert lost_here("evaluate", f"source={pairs}", f"compare_with=[{single / 'final'}]") == 2
    assert "final was trained on single texts, and would be measured on pairs" in " ".join(
        capsys.readouterr().err.split()
    )
    assert lost_here("evaluate", f"source={single}", "seq_len=30") == 0
    assert "was trained with seq_len = 20, and is measured with 30" in " ".join(capsys.readouterr().err.split())


def test_texts_that_are_cut_are_counted(tmp_path, capsys):
    save_classifier(tmp_path / "c", "llama", ["0", "1"])
    file = write(tmp_path / "t.jsonl", [{"text": "x" * 50, "label": 0}, {"text": "y", "label": 1}])
    evaluated(tmp_path, f"source={tmp_path / 'c'}", f"labelled.files=[{file}]", "seq_len=8")
    assert "1 of 2 texts were longer than seq_len = 8 and cut" in " ".join(capsys.readouterr().err.split())


MISTAKES = {
    "a language model": ("dense", {"text": "x", "label": 0}, [], "is no text classifier: make one by `lost finetune"),
    "an encoder": ("encoder", {"text": "x", "label": 0}, [], "is no text classifier"),
    "a run": ("pretrained", {"text": "x", "label": 0}, [], "is no text classifier"),
    "an unfinished run": ("unfinished", {"text": "x", "label": 0}, [], "checkpoint of `lost finetune`"),
    "a number for each text": ("regression", {"text": "x", "label": 0}, [], "gives a number, not a label"),
    "several labels": ("several", {"text": "x", "label": 0}, [], "gives several labels, not one, for each text"),
    "another word": ("words", {"text": "x", "label": "bad"}, [], "t.jsonl:1: label bad is not among those of the cl"),
    "a number too high": ("numbers", {"text": "x", "label": 3}, [], "label 3 is outside the range: labels are 0 to 2"),
    "another field": ("words", {"s": "x", "label": "pos"}, [], "it has s, label: set labelled.text_field"),
    "no text": ("words", {"text": "", "label": "pos"}, [], "t.jsonl:1: the text is empty"),
    "tasks too": ("words", {"text": "x", "label": "pos"}, ["tasks=[arc]"], "classifiers label texts; name one"),
    "a stride": ("words", {"text": "x", "label": "pos"}, ["stride=8"], "stride = 8 with labelled.files: only"),
    "some tokens": ("words", {"text": "x", "label": "pos"}, ["evaluation.max_tokens=9"], "max_tokens = 9 with"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message(place, tmp_path, capsys, name):
    source, record, more, message = MISTAKES[name]
    folder = tmp_path / source
    if source == "dense":
        folder = place / "dense"
    elif source == "encoder":
        tiny_roberta(folder)
    elif source == "pretrained":
        assert lost_here(*tiny_run(folder, write_corpus(tmp_path), "train.max_steps=1")) == 0
    elif source == "unfinished":
        assert lost_here(*finetune_run(folder, place / "dense", place / "train.jsonl", "train.max_steps=4")) == 0
        (folder / "status.json").write_text('{"state": "failed", "step": 4}')
    else:
        names = {"regression": ["LABEL_0"], "words": NAMES, "numbers": ["LABEL_0", "LABEL_1", "LABEL_2"]}
        save_classifier(folder, "llama", names.get(source, NAMES))
        if source == "several":
            path = folder / "config.json"
            kind = {"problem_type": "multi_label_classification"}
            path.write_text(json.dumps(json.loads(path.read_text()) | kind))
    capsys.readouterr()
    file = write(tmp_path / "t.jsonl", [record])
    to = tmp_path / "result.json"
    assert lost_here("evaluate", f"source={folder}", f"labelled.files=[{file}]", f"to={to}", *more) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert not to.exists()


def test_a_classifier_without_labelled_texts_says_what_to_give(tmp_path, capsys):
    save_classifier(tmp_path / "c", "llama", NAMES)
    assert lost_here("evaluate", f"source={tmp_path / 'c'}") == 2
    assert "lost evaluate labelled.files=[...]" in " ".join(capsys.readouterr().err.split())
    assert lost_here("evaluate", f"source={tmp_path / 'c'}", "labelled.text_field=s") == 2
    assert "labelled.text_field = s, and labelled.files is empty: name labelled texts" in " ".join(
        capsys.readouterr().err.split()
    )
