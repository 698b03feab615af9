"""The wheel holds every package, kernel and YAML file, and runs from any folder without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lost
from lost.testing.runs import read_metrics, tiny_run, write_corpus

ROOT = Path(lost.__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {"lost": ROOT / "lost", "lost_kernels": ROOT / "kernels/lost_kernels", "lost_configs": ROOT / "configs"}


def packages_on_disk() -> set[str]:
    return {
        ".".join((name, *init.parent.relative_to(folder).parts))
        for name, folder in SOURCES.items()
        for init in folder.rglob("__init__.py")
    }


def files_on_disk() -> set[str]:
    """Every module and YAML file, by its path in the wheel."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml")
    }


def run_python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("lost", "kernels", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Without --wheel the wheel comes out of the source archive, which must therefore be complete as well.
    run_python("-m", "build", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    site = tmp_path_factory.mktemp("site")
    run_python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=site)
    return site


def test_pyproject_lists_every_package():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_wheel_holds_every_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if ".dist-info/" not in name} == files_on_disk()
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_wheel_runs_from_any_folder(installed, tmp_path):
    code = (
        "import sys, lost, lost_kernels.lost_linear\n"
        "from lost.config.choices import choices, config_folder\n"
        "from lost.config.compose import compose\n"
        f"site = {str(installed)!r}\n"
        "assert all(p.startswith(site) for p in (lost.__file__, lost_kernels.__file__, str(config_folder())))\n"
        "for model in choices('pretrain', 'model'):\n"
        "    print(compose('pretrain', [f'model={model}', 'experiment=none']).run_dir)\n"
    )
    printed = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert printed.splitlines()[:2] == ["runs/custom_llama_tiny_lost_0", "runs/custom_llama_60m_lost_0"]
    assert "pretrain" in run_python("-m", "lost", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    script = installed / "bin" / "lost"
    assert run_python(script, "--version", cwd=tmp_path, PYTHONPATH=str(installed)) == f"lost {lost.__version__}\n"


# Runs a command as if no checkout were near, and checks where each module of ours came from.
RUN_INSTALLED = """
import os, sys
site, root, *arguments = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
inside = [path for path in sys.path if os.path.realpath(path) in (root, f"{root}/kernels", f"{root}/configs")]
assert not inside, inside
from lost.cli.main import main
status = main(arguments)
ours = {name: module.__spec__.origin or list(module.__path__)[0] for name, module in sys.modules.items()
        if name.partition(".")[0] in ("lost", "lost_kernels", "lost_configs")}
elsewhere = {name: place for name, place in ours.items() if not place.startswith(site)}
assert not elsewhere, elsewhere
print("modules:", *sorted({name.partition(".")[0] for name in ours}))
sys.exit(status)
"""


def test_the_installed_wheel_pretrains_in_another_folder(installed, tmp_path):
    corpus, here = write_corpus(tmp_path), tmp_path / "here"
    here.mkdir()
    run = tiny_run(Path("run"), corpus, "train.max_steps=2", "schedule.warmup_steps=1")
    environment = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    printed = run_python("-c", RUN_INSTALLED, installed, ROOT, *run, cwd=here, **environment)
    assert printed.splitlines()[-1] == "modules: lost lost_configs lost_kernels"
    assert [line["step"] for line in read_metrics(here / "run") if "loss" in line] == [1, 2]
    assert (here / "run" / "final" / "model.safetensors").is_file()
    assert [path.name for path in here.iterdir()] == ["run"]


def test_linux_only_packages_carry_a_marker():
    needed = PYPROJECT["project"]["dependencies"]
    for name in ("triton", "deepspeed"):
        (line,) = [line for line in needed if line.startswith(name)]
        assert "sys_platform == 'linux'" in line


def test_constraints_pin_every_dependency_and_tool():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    extras = PYPROJECT["project"]["optional-dependencies"]
    for line in [*PYPROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]:
        name = re.match(r"[\w-]+", line)[0]
        assert name in pinned or name == PYPROJECT["project"]["name"], line
    assert not [version for version in pinned.values() if "+" in version]


@pytest.mark.parametrize("name", ["setup.sh", "quickstart.sh", "test.sh", "two_nodes.sh", "slurm/pretrain.sbatch"])
def test_scripts_start_strictly(name):
    text = (ROOT / "scripts" / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_set_up_says_what_is_wrong_with_an_interpreter(tmp_path):
    """The checkout's scripts in a place without .venv, so that nothing is installed."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/setup.sh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(old)},
        check=False,
    )
    assert done.returncode == 1
    assert "older than 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_set_up_installs_nothing_a_second_time(tmp_path):
    """A stand-in for pip counts the installations: one for each change of what is wanted."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("one")
    (tmp_path / "constraints.txt").write_text("")
    venv_python = tmp_path / ".venv/bin/python"
    venv_python.parent.mkdir(parents=True)
    venv_python.write_text(
        "#!/bin/sh\n"
        f'if [ "$1 $2" = "-m pip" ]; then echo "$*" >>{tmp_path}/installs; exit 0; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    venv_python.chmod(0o755)

    def installs(*arguments: str) -> int:
        subprocess.run(["bash", "scripts/setup.sh", *arguments], cwd=tmp_path, check=True, capture_output=True)
        return len((tmp_path / "installs").read_text().splitlines())

    assert installs() == 1
    assert installs() == 1
    assert installs("dev") == 2
    assert installs("dev") == installs() == 2
    (tmp_path / "pyproject.toml").write_text("two")
    assert installs("dev") == 3
    # What dev installed serves running as well.
    assert installs() == 3
    lines = (tmp_path / "installs").read_text().splitlines()
    assert f"-e {tmp_path} -c" in lines[0]
    assert f"-e {tmp_path}[dev] -c" in lines[1]
