"""scripts/check_7b.sh with the smallest model, and what it must refuse."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lost
from lost.testing.runs import environment

SCRIPTS = Path(lost.__file__).parent.parent / "scripts"
TINY = ["model=llama_tiny", "parameterization.init=draw"]


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_7b", SCRIPTS / "check_7b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(check, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "SHARD_SIZE", "2MB")
        assert check.main(["make", str(folder), *TINY]) == 0
    return folder


def test_two_processes_make_save_load_and_run(tmp_path):
    command = ["bash", str(SCRIPTS / "check_7b.sh"), "draw", "model=llama_tiny"]
    done = subprocess.run(
        command, env=environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for step in (r"make: initialise llama_tiny \(init=draw\)", "make: save", "run: load", "run: forward of 128 tokens"):
        assert re.search(rf"^{step}: [\d.]+ s$", done.stdout, re.M), done.stdout
    peaks = re.findall(r"^(make|run): peak resident memory ([\d.]+) GiB$", done.stdout, re.M)
    assert [process for process, _ in peaks] == ["make", "run"]
    assert all(0.1 < float(peak) < 2 for _, peak in peaks)
    # An untrained model gives every one of 4096 tokens about the same probability: ln 4096 = 8.3.
    assert 8 < float(re.search(r"logits \[1, 128, 4096\], loss ([\d.]+)", done.stdout)[1]) < 9
    # mktemp's folder, with the weights, is gone.
    assert list(tmp_path.glob("tmp.*")) == []


def test_another_word_is_refused():
    done = subprocess.run(["bash", str(SCRIPTS / "check_7b.sh"), "svd"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "svd: the first argument is draw or gram\n"


def test_files_are_no_larger_than_asked(made):
    sizes = [path.stat().st_size for path in made.glob("*.safetensors")]
    assert len(sizes) > 2
    # A tensor is never cut: the embedding alone has 2 MiB.
    assert max(sizes) < 2.2e6


def test_weights_that_are_not_the_saved_ones_are_found(check, made, capsys):
    path = next(path for path in made.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    before = path.read_bytes()
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.nextafter(tensors["model.norm.weight"], torch.tensor(2.0).bfloat16())
    save_file(tensors, path, metadata={"format": "pt"})
    assert check.main(["run", str(made)]) == 1
    assert "tensors that are not as they were saved: 1, the first is model.norm.weight" in capsys.readouterr().err
    path.write_bytes(before)
    assert check.main(["run", str(made)]) == 0


def test_too_much_memory_is_a_failure(check, made, monkeypatch, capsys):
    monkeypatch.setattr(check, "MEMORY_LIMIT_GIB", 0.1)
    assert check.main(["run", str(made)]) == 1
    assert re.search(r"run: peak resident memory [\d.]+ GiB: must be under 0.1 GiB", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [[], ["make"], ["run", "a", "b"], ["go", "a"]])
def test_wrong_arguments(check, arguments, capsys):
    assert check.main(arguments) == 1
    assert "use `make FOLDER [key=value ...]` or `run FOLDER`" in capsys.readouterr().err
