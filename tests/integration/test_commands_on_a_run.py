"""evaluate, generate, export and pretrain source= on the directory of a real, tiny run."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from lost.testing.runs import environment, lost_here, read_metrics, succeed, tiny_run, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """run/: 12 steps, checkpoints at 8 and 12, final/; corpus.jsonl beside it."""
    folder = tmp_path_factory.mktemp("commands")
    assert lost_here(*tiny_run(folder / "run", write_corpus(folder))) == 0
    return folder


def evaluated(folder, *overrides):
    """The JSON that `lost evaluate` writes."""
    target = folder / "out" / "result.json"
    assert lost_here("evaluate", f"to={target}", *overrides) == 0
    return json.loads(target.read_text())


def test_evaluate_of_a_run_is_its_own_last_evaluation(folder, capsys):
    """Data and seq_len come from the run; the loss is the number that training logged, bit for bit."""
    result = evaluated(folder, f"source={folder / 'run'}")
    logged = [line for line in read_metrics(folder / "run") if "eval/loss" in line][-1]
    found = result["sets"]["validation"]
    assert found["loss"] == logged["eval/loss"]
    assert found["perplexity"] == logged["eval/perplexity"]
    assert found["perplexity_lineage"] == logged["eval/perplexity_lineage"]
    assert found["num_tokens"] == logged["eval/tokens"]
    assert result["seq_len"] == 32
    assert result["data"]["name"] == "text_files"
    assert result["origin"] == str(folder / "run" / "final")
    printed = capsys.readouterr().out
    assert "data=text_files" in printed
    assert f"{found['perplexity']:.3f}" in printed
    assert "papers' formula" in printed
    assert "not comparable" in printed
    # A checkpoint of an earlier step is another model on the same data.
    earlier = evaluated(folder, f"source={folder / 'run' / 'checkpoints' / 'step_00000008'}")
    assert earlier["sets"]["validation"]["num_tokens"] == found["num_tokens"]
    assert earlier["sets"]["validation"]["loss"] > found["loss"]


def test_evaluate_takes_what_the_command_line_says(folder):
    source = f"source={folder / 'run' / 'final'}"
    whole = evaluated(folder, source)["sets"]["validation"]
    rows_of_16 = evaluated(folder, source, "seq_len=16")
    assert rows_of_16["seq_len"] == 16
    assert rows_of_16["sets"]["validation"]["num_rows"] > whole["num_rows"]
    few = evaluated(folder, source, "evaluation.max_tokens=100")["sets"]["validation"]
    assert 100 <= few["num_tokens"] < 100 + 32
    other = folder / "other.txt"
    other.write_text("completely other text. " * 40)
    named = evaluated(
        folder, source, "data=text_files", f"data.validation_files={{mine: [{other}], again: [{other}]}}", "seq_len=32"
    )
    assert set(named["sets"]) == {"mine", "again"}
    assert named["sets"]["mine"] == named["sets"]["again"]
    assert named["sets"]["mine"]["loss"] != whole["loss"]


def test_evaluate_under_torchrun_is_the_single_process_result(folder):
    target = folder / "two.json"
    succeed("evaluate", f"source={folder / 'run'}", "evaluation.micro_batch_size=5", f"to={target}", num_processes=2)
    single = evaluated(folder, f"source={folder / 'run'}", "evaluation.micro_batch_size=5")
    assert json.loads(target.read_text())["sets"] == single["sets"]


def test_generate_as_a_process(folder):
    prompt = "abc, [de] {f}=g 'h'"
    arguments = ["generate", f"source={folder / 'run'}", f"prompt={prompt}", "max_new_tokens=12"]
    text = succeed(*arguments, "do_sample=false")
    assert text.startswith(prompt)
    assert len(text.rstrip("\n")) > len(prompt)


def test_generate_is_the_same_from_a_checkpoint_and_with_or_without_cache(folder, capsys):
    def text(source, *overrides):
        capsys.readouterr()
        assert lost_here("generate", f"source={source}", "prompt=jcagbb", "max_new_tokens=12", *overrides) == 0
        return capsys.readouterr().out

    greedy = text(folder / "run", "do_sample=false")
    assert text(folder / "run" / "checkpoints" / "step_00000012", "do_sample=false") == greedy
    assert text(folder / "run", "do_sample=false", "use_cache=false") == greedy
    assert text(folder / "run", "seed=3") == text(folder / "run", "seed=3")


LOAD_AND_PRINT = """
import json, sys, torch
import lost.model
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("abc de", return_tensors="pt").input_ids
sums = {name: value.double().sum().item() for name, value in model.state_dict().items()}
text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
print(json.dumps({"class": type(model).__name__, "sums": sums, "text": text,
                  "eos": model.generation_config.eos_token_id}))
"""


def test_export_as_a_process_loads_in_another_one(folder, capsys):
    checkpoint = folder / "run" / "checkpoints" / "step_00000008"
    printed = succeed("export", f"source={checkpoint}", f"to={folder / 'export'}")
    assert "import lost.model" in printed
    named = load_file(checkpoint / "model_00000_process_00000.safetensors")
    stored = {name.removeprefix("model/"): value for name, value in named.items()}
    written = load_file(folder / "export" / "model.safetensors")
    assert stored.keys() == written.keys()
    assert all(torch.equal(written[name], value) for name, value in stored.items())
    card = (folder / "export" / "README.md").read_text()
    assert "| steps | 8 |" in card
    assert "| tokens seen (without padding) | 1,984 |" in card
    # The validation of step 5, the last one before step 8.
    logged = [line for line in read_metrics(folder / "run") if "eval/loss" in line][1]
    assert f"{logged['eval/perplexity']:.3f}" in card
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PRINT, str(folder / "export")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["class"] == "LostLlamaForCausalLM"
    assert facts["sums"] == {name: value.double().sum().item() for name, value in stored.items()}
    tokenizer_eos = json.loads((folder / "run" / "final" / "generation_config.json").read_text())["eos_token_id"]
    assert facts["eos"] == tokenizer_eos
    capsys.readouterr()
    arguments = ["prompt=abc de", "max_new_tokens=8", "do_sample=false"]
    assert lost_here("generate", f"source={folder / 'export'}", *arguments) == 0
    assert capsys.readouterr().out.strip() == facts["text"].removesuffix("<|endoftext|>").strip()


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_export_in_another_dtype_rounds_once(folder, dtype, expected):
    target = folder / f"export_{dtype}"
    assert lost_here("export", f"source={folder / 'run'}", f"to={target}", f"dtype={dtype}") == 0
    stored, written = load_file(folder / "run" / "final" / "model.safetensors"), load_file(target / "model.safetensors")
    for name, value in stored.items():
        assert torch.equal(written[name], value.to(expected) if value.is_floating_point() else value), name
    # The card of a finished run goes with the model.
    assert (target / "README.md").read_text() == (folder / "run" / "final" / "README.md").read_text()


def test_pretraining_goes_on_from_an_export(folder):
    export = folder / "export_to_train"
    assert lost_here("export", f"source={folder / 'run'}", f"to={export}") == 0
    again = tiny_run(folder / "second", folder / "corpus.jsonl", "train.max_steps=4", f"source={export}")
    assert lost_here(*again) == 0
    first = [line["eval/loss"] for line in read_metrics(folder / "run") if "eval/loss" in line]
    second = [line["eval/loss"] for line in read_metrics(folder / "second") if "eval/loss" in line]
    assert second[0] == first[-1]
    assert second[-1] < second[0]


def test_a_model_card_is_in_final(folder):
    card = (folder / "run" / "final" / "README.md").read_text()
    logged = [line for line in read_metrics(folder / "run") if "eval/loss" in line][-1]
    for expected in ("2508.02668", "| steps | 12 |", "text_files (60 documents)", f"{logged['eval/perplexity']:.3f}"):
        assert expected in card, expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "source={run}", "seq_len=4096"], "above max_position_embeddings = 1024"),
        (["evaluate", "source={folder}", "data=stdlib"], "holds no model"),
        (["evaluate", "source={run}", "to={folder}"], "is a folder: give the name of a JSON file"),
        (["evaluate", "source={run}", "data=text_files", "data.train_files=[/nothing.txt]"], "/nothing.txt"),
        (["evaluate"], "source"),
        (["generate", "source={run}", "prompt=a", "max_new_tokens=2000"], "lower max_new_tokens"),
        (["generate", "source={run}", "do_sample=false", "temperature=0.3"], "only sampling uses it"),
        (["generate", "source=/no/such/folder"], "/no/such/folder"),
        (["export", "source={run}", "to={folder}/cache"], "is not empty"),
        (["export", "source={run}", "to={folder}/corpus.jsonl"], "is a file"),
        (["export", "source={run}"], "to"),
    ],
)
def test_mistakes_exit_2_with_one_message(folder, capsys, arguments, message):
    filled = [argument.format(run=folder / "run", folder=folder) for argument in arguments]
    assert lost_here(*filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_hub_id_without_a_hub_exits_2_within_seconds(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    assert lost_here("generate", "source=somebody/some-model", "prompt=a") == 2
    assert time.monotonic() - started < 10
    assert "somebody/some-model" in capsys.readouterr().err
