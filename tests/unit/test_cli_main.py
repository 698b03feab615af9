"""The front door: what it prints, its exit statuses, and that help is quick and loads nothing heavy."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lost import __version__
from lost.cli import main as front_door
from lost.cli.commands import COMMANDS
from lost.cli.main import main
from lost.config.choices import ROOTS, choices, groups, known_keys
from lost.config.section import is_section
from lost.utils.errors import CheckpointError, ConfigError, TrainingError


def run_lost(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lost", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def ran(monkeypatch):
    """Swaps every command's module for one that records its config; `ran.outcome` is raised or returned."""
    record = SimpleNamespace(configs=[], outcome=0)

    def run(config):
        record.configs.append(config)
        if isinstance(record.outcome, BaseException):
            raise record.outcome
        return record.outcome

    monkeypatch.setattr(front_door, "module_of", lambda command: SimpleNamespace(run=run, command=command))
    return record


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_overview_lists_every_command(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for command, line in COMMANDS.items():
        assert f"{command} " in printed
        assert line in printed
    for group in groups("pretrain"):
        for choice in choices("pretrain", group):
            assert re.search(rf"^ *{group}=.*\b{choice}\b", printed, flags=re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lost {__version__}\n"


def test_every_command_has_a_root():
    assert list(ROOTS) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_lists_groups_choices_and_keys(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    for group, default in groups(command).items():
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{group}="))
        assert [word.strip() for word in line.partition("=")[2].split("|")] == [
            f"{name}*" if name == default else name for name in choices(command, group)
        ]
    for key, hint in known_keys(command).items():
        is_choice = key.endswith(".name") and key.partition(".")[0] in groups(command)
        assert is_section(hint) or is_choice or any(line.split()[:1] == [key] for line in printed.splitlines()), key


def test_help_shows_type_default_meaning_and_unit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    main(["pretrain", "train.max_steps=3", "-h"])
    lines = {
        line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines() if line.split()
    }
    assert lines["train.seq_len"] == "whole number 256 length of a training row [tokens]"
    assert lines["checkpoint.every_steps"].startswith("whole number 50 ")
    assert lines["runtime.device"] == "auto | cpu | cuda | mps auto auto: cuda, then mps, then cpu"
    assert lines["parameterization.lost_rank"].startswith("count or fraction = model.lineage_rank rank R")
    assert lines["data.train_files"].startswith("list of text [] files")


def test_config_reaches_the_command(ran):
    ran.outcome = 7
    assert main(["generate", "source=.", "prompt=a, [b] = c"]) == 7
    assert ran.configs[0].prompt == "a, [b] = c"


def test_bare_word_of_bench(ran):
    assert main(["bench", "step", "repeats=3"]) == 0
    assert (ran.configs[0].what, ran.configs[0].repeats) == ("step", 3)


@pytest.mark.parametrize("form", [["--config-file", "{}"], ["--config-file={}"]])
def test_config_file(form, ran, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("source: .\nprompt: from the file\nmax_new_tokens: 5\n")
    assert main(["generate", *(part.format(path) for part in form), "max_new_tokens=6"]) == 0
    assert (ran.configs[0].prompt, ran.configs[0].max_new_tokens) == ("from the file", 6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrian"], ["unknown command pretrian (did you mean pretrain?)", "plan, bench", "'lost --help'"]),
        (["--foo"], ["unknown command --foo"]),
        (
            ["pretrain", "max_steps=5", "seed=x"],
            ["2 problems", "train.max_steps?", "seed = 'x': must be a whole number"],
        ),
        (
            ["pretrain", "parameterization.lost_rank=257"],
            ["model.layers.0.self_attn.q_proj", "= 256", "lost_rank = 257"],
        ),
        (["pretrain", "parameterization.target_modules=[q_prj]"], ["q_prj", "did you mean q_proj?"]),
        (["bench", "layr"], ["what = 'layr'", "did you mean layer?"]),
        (["pretrain", "--config-file"], ["--config-file needs a file"]),
        (["export"], ["lost export: 2 problems", "source is missing", "to is missing"]),
    ],
)
def test_mistakes_exit_2_with_one_message(arguments, expected, ran, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for words in expected:
        assert words in printed.err
    assert ran.configs == []


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (ConfigError("wrong"), 2),
        (CheckpointError("wrong"), 2),
        (TrainingError("wrong"), 1),
        (KeyboardInterrupt(), 130),
        (0, 0),
    ],
)
def test_outcomes_of_a_command(outcome, status, ran, capsys):
    ran.outcome = outcome
    assert main(["pretrain"]) == status
    assert ("lost pretrain: wrong" in capsys.readouterr().err) == isinstance(outcome, Exception)


def test_an_unexpected_failure_keeps_its_traceback(ran):
    ran.outcome = ZeroDivisionError("a bug of ours")
    with pytest.raises(ZeroDivisionError):
        main(["pretrain"])


def test_only_the_first_process_prints_a_mistake(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["pretrain", "seed=x"]) == 2
    assert capsys.readouterr().err == ""


HEAVY = ["torch", "transformers", "hydra", "omegaconf", "datasets", "accelerate", "numpy"]


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]], ids=" ".join)
def test_help_is_quick_and_light(arguments):
    code = (
        "import sys; from lost.cli.main import main; status = main(sys.argv[1:]);"
        f"sys.exit(status or ', '.join(name for name in {HEAVY} if name in sys.modules) or None)"
    )
    start = time.monotonic()
    # CPU seconds of the process, so that other work on the machine does not count.
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    seconds = min(
        time.monotonic() - start,
        after.children_user + after.children_system - before.children_user - before.children_system,
    )
    assert seconds < 2


def test_a_mistake_loads_no_torch():
    code = (
        "import sys; from lost.cli.main import main;"
        "assert main(['pretrain', 'seed=x', 'parameterization.lost_rank=1000']) == 2;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "2 problems" in done.stderr


def test_real_process_exits_2_without_a_traceback():
    done = run_lost("pretrain", "seed=x", "trian.seq_len=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "2 problems" in done.stderr


def test_help_into_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m lost pretrain --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
