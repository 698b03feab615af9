"""`lost plan`: what it prints, and that it needs neither torch nor the model."""

import subprocess
import sys
from dataclasses import replace

import pytest

from lost.accounting import GIB, count_parameters, memory_per_device
from lost.cli import plan
from lost.config.choices import choices
from lost.config.compose import compose
from lost.config.model import DenseConfig, LostConfig


def printed(capsys, *overrides: str) -> str:
    assert plan.run(compose("plan", list(overrides))) == 0
    return capsys.readouterr().out


def rows_of(text: str) -> dict[tuple[str, str], list[str]]:
    """The table of sizes: cells by (model, form)."""
    rows, model = {}, ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) >= 8 and cells[1] in ("lost", "dense"):
            model = cells[0].removesuffix(" *") or model
            rows[model, cells[1]] = cells[2:]
    return rows


def test_every_size_in_both_forms(capsys):
    rows = rows_of(printed(capsys))
    assert list(rows) == [(name, form) for name in choices("plan", "model") for form in ("lost", "dense")]
    assert rows["llama_1b", "dense"][0] == "1339.08"
    assert rows["llama_1b", "lost"][0] == "621.14"


def test_the_packaged_sizes_are_those_that_compose_gives():
    for name in choices("plan", "model"):
        assert plan.packaged_model(name) == compose("plan", [f"model={name}"]).model


def test_cells_are_the_accounting_of_the_batch_asked_for(capsys):
    overrides = [
        "train.micro_batch_size=4",
        "train.seq_len=128",
        "runtime.precision=pure_bf16",
        "runtime.recompute=block",
    ]
    cells = rows_of(printed(capsys, *overrides))["llama_350m", "lost"]
    model = plan.packaged_model("llama_350m")
    memory = memory_per_device(
        model, LostConfig(lost_rank=256), micro_batch_size=4, seq_len=128, precision="pure_bf16", recompute="block"
    )
    expected = (memory.state.total, memory.activations, memory.working, memory.total)
    assert cells[2:6] == [f"{value / GIB:.2f}" for value in expected]


def test_a_rank_set_by_hand_holds_for_every_size(capsys):
    rows = rows_of(printed(capsys, "model=llama_60m", "parameterization.lost_rank=32"))
    model = plan.packaged_model("llama_1b")
    assert rows["llama_1b", "lost"][0] == f"{count_parameters(model, LostConfig(lost_rank=32)) / 1e6:.2f}"


def test_a_size_that_the_form_does_not_fit_is_named_and_the_others_stay(capsys):
    text = printed(capsys, "model=llama_1b", "parameterization.lost_rank=600")
    rows = rows_of(text)
    assert set(rows["llama_tiny", "lost"]) == {"-"}
    assert "llama_tiny: lost_rank = 600" in " ".join(text.split())
    assert rows["llama_1b", "lost"][0] != "-"


def test_dense_is_shown_once(capsys):
    rows = rows_of(printed(capsys, "parameterization=dense"))
    assert {form for _, form in rows} == {"dense"}


def test_fits_follows_the_memory_of_the_device(capsys):
    fitting = {key: cells[-1] for key, cells in rows_of(printed(capsys, "device_memory_gib=40")).items()}
    assert fitting["llama_1b", "lost"] == "yes"
    assert fitting["llama_7b", "dense"] == "no"
    assert plan.fits(7.9 * GIB, 8) == "tight"
    assert plan.fits(8.1 * GIB, 8) == "no"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "bf16"),
        ({"device": "cpu"}, "fp32"),
        ({"device": "cpu", "precision": "pure_bf16"}, "pure_bf16"),
        ({"device": "cuda"}, "bf16"),
    ],
)
def test_precision(settings, expected):
    config = compose("plan", [])
    assert plan.precision_of(replace(config, runtime=replace(config.runtime, **settings))) == expected


def test_the_details_add_up(capsys):
    config = compose("plan", ["model=llama_130m"])
    text = printed(capsys, "model=llama_130m")
    for form in (LostConfig(lost_rank=256), DenseConfig()):
        assert f"{count_parameters(config.model, form):,}" in text
    assert "768 -> 2048: rank 256, 7 kept columns" in text
    assert "2048 -> 768: rank 256, 20 kept columns" in text


def test_it_needs_no_torch_and_little_time():
    """Processor time, so that a busy machine does not fail it."""
    code = (
        "import sys, time; from lost.cli.main import main; status = main(['plan', 'model=llama_7b']);"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy;"
        "print(time.process_time()); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 5
