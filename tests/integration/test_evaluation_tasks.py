"""Tasks of lm-eval from local files, several models side by side, and sliding windows, through `lost evaluate`."""

import json
import math

import datasets.config
import huggingface_hub.constants
import pytest
import torch

from lost.assemble.load import load_model
from lost.config.model import LostConfig, ModelConfig
from lost.evaluation.tasks import Measure, measure_difference
from lost.export import save_folder
from lost.model import build_model
from lost.testing.runs import lost_here, write_corpus
from lost.testing.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": f"what is {a} and {b}", "choices": [f"{a}{b}", f"{b}{a}!", f"x{a}"], "answer": (a * b) % 3}
    for a in range(4)
    for b in range(5)
]
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{questions}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def lost_model():
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 60, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    config = ModelConfig(name="tiny", lineage_rank=8, initializer_range=0.4, **sizes, **heads)
    return build_model(config, LostConfig(lost_rank=6, density=0.2), seed=1).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """lost/ and dense/: two models; choice.yaml: a task on questions.jsonl; corpus.jsonl."""
    folder = tmp_path_factory.mktemp("tasks")
    save_folder(lost_model(), tiny_tokenizer(), folder / "lost", "card")
    save_folder(tiny_llama(max_position_embeddings=96), tiny_tokenizer(), folder / "dense", "card")
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    (folder / "task_files").mkdir()
    for path in (folder / "choice.yaml", folder / "task_files" / "choice.yaml"):
        path.write_text(CHOICE_TASK.format(questions=folder / "questions.jsonl"))
    write_corpus(folder, 12)
    hub_task = CHOICE_TASK.format(questions="x").replace("path: json", "path: somebody/questions")
    (folder / "hub.yaml").write_text(hub_task.replace("tiny_choice", "hub_choice"))
    (folder / "defaults").mkdir()
    (folder / "defaults" / "hub.yaml").write_text((folder / "hub.yaml").read_text())
    return folder


@pytest.fixture(autouse=True)
def small_harness(folder, monkeypatch):
    """lm-eval with one task of its own: reading its 14,000 files takes as long as all of these tests."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "defaults" / "manager.py"))


def evaluated(folder, *overrides):
    target = folder / "result.json"
    assert lost_here("evaluate", f"source={folder / 'lost'}", f"to={target}", *overrides) == 0
    return json.loads(target.read_text())


def chosen(model, tokenizer):
    """Right answers, question by question, by the definition: the choice whose tokens are likeliest."""
    right = []
    for line in QUESTIONS:
        scores = []
        context = tokenizer(f"Q: {line['question']}\nA:").input_ids
        for choice in line["choices"]:
            whole = tokenizer(f"Q: {line['question']}\nA: {choice}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right.append(float(scores.index(max(scores)) == line["answer"]))
    return right


def test_a_local_task_gives_the_accuracy_of_its_definition(folder, capsys):
    result = evaluated(
        folder, f"tasks=[{folder / 'choice.yaml'}]", "perplexity=false", f"compare_with=[{folder / 'dense'}]"
    )
    scores = {}
    for entry in (result, *result["compared"]):
        loaded = load_model(entry["source"])
        scores[entry["source"]] = right = chosen(loaded.model, loaded.tokenizer)
        measure = entry["tasks"]["tiny_choice"]["measures"]["acc"]
        accuracy = sum(right) / len(right)
        assert measure["value"] == pytest.approx(accuracy)
        # The standard error of a mean of n independent answers.
        error = math.sqrt(accuracy * (1 - accuracy) / (len(right) - 1))
        assert measure["standard_error"] == pytest.approx(error, rel=1e-6)
        assert entry["tasks"]["tiny_choice"]["num_documents"] == len(QUESTIONS)
        assert entry["sets"] == {}
    first, second = scores.values()
    assert first != second
    differences = torch.tensor(second) - torch.tensor(first)
    found = result["compared"][0]["tasks"]["tiny_choice"]["measures"]["acc"]["difference"]
    assert found["is_paired"] is True
    assert found["value"] == pytest.approx(float(differences.mean()), abs=1e-6)
    assert found["standard_error"] == pytest.approx(float(differences.std()) / math.sqrt(len(QUESTIONS)), rel=1e-5)
    printed = capsys.readouterr().out
    assert "tiny_choice (0-shot)" in printed
    assert f"{result['tasks']['tiny_choice']['measures']['acc']['value']:.4f}" in printed


def test_limit_folder_and_examples_take_effect(folder):
    options = ["tasks=[tiny_choice]", f"task_folders=[{folder / 'task_files'}]", "perplexity=false"]
    result = evaluated(folder, *options, "limit=7", "num_fewshot=2")
    task = result["tasks"]["tiny_choice"]
    assert (task["num_documents"], task["num_fewshot"]) == (7, 2)


def test_tasks_and_perplexity_are_one_table(folder, capsys):
    data = f"data.train_files=[{folder / 'corpus.jsonl'}]"
    more = ["data=text_files", data, "data.validation_fraction=0.5", "seq_len=48", "stride=16"]
    result = evaluated(
        folder, f"tasks=[{folder / 'choice.yaml'}]", "limit=5", f"compare_with=[{folder / 'dense'}]", *more
    )
    printed = capsys.readouterr().out
    for word in ("tiny_choice", "perplexity", "bits per byte", "stride 16", "paired"):
        assert word in printed, word
    assert "papers' formula" not in printed
    found, other = result["sets"]["validation"], result["compared"][0]["sets"]["validation"]
    assert found["num_tokens"] == other["num_tokens"]
    assert other["loss_difference"]["value"] == pytest.approx(other["loss"] - found["loss"])
    # Paired: less than the two errors together, as both models find the same rows hard.
    assert other["loss_difference"]["standard_error"] > 0
    # One byte is one token here, and the end of a document is a token without a byte.
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=0.02)
    assert found["bits_per_byte"] > found["loss"] / math.log(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tasks=[tiny_chioce]", "task_folders=[{folder}/task_files]"],
            "tiny_chioce is no task of lm-eval (did you mean tiny_choice?)",
        ),
        (["tasks=[/no/task.yaml]"], "there is no file /no/task.yaml"),
        (["tasks=[tiny_choice]", "task_folders=[/no/folder]"], "/no/folder is no folder"),
        (["tasks=[{folder}/broken.yaml]"], "cannot be loaded"),
        (["tasks=[{folder}/choice.yaml]", "apply_chat_template=true", "perplexity=false"], "no chat template"),
        (["stride=512"], "must be below seq_len = 256"),
        (["stride=8", "data.row_maker=padded"], "use row_maker=packed"),
        (["stride=8", "data.isolate_documents=true"], "windows read across documents"),
        (["perplexity=false"], "nothing to do"),
        (["limit=3"], "only tasks use it"),
        (["compare_with=[/no/model]", "seq_len=32", "evaluation.max_tokens=64"], "/no/model"),
    ],
)
def test_mistakes_exit_2_with_one_message(folder, capsys, arguments, message):
    (folder / "broken.yaml").write_text(CHOICE_TASK.format(questions=folder / "missing.jsonl"))
    filled = [argument.format(folder=folder) for argument in arguments]
    assert lost_here("evaluate", f"source={folder / 'lost'}", *filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("task", ["hub_choice", "{folder}/hub.yaml"])
def test_a_task_of_the_hub_without_a_hub_says_so(folder, capsys, monkeypatch, task):
    """A task that lm-eval brings and a file of one's own, both with questions on the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    named = task.format(folder=folder)
    assert lost_here("evaluate", f"source={folder / 'lost'}", f"tasks=[{named}]", "perplexity=false") == 2
    assert f"tasks = {named} read their questions from it" in capsys.readouterr().err


def test_a_measure_without_scores_is_compared_unpaired():
    difference, is_paired = measure_difference(Measure(0.5, 0.03), Measure(0.4, 0.04))
    assert not is_paired
    assert (difference.value, difference.standard_error) == (pytest.approx(0.1), pytest.approx(0.05))
