"""The files that start `lost` on clusters pass their checkers, and each checker finds planted mistakes."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import lost
from lost.cli import plan
from lost.config.compose import compose

ROOT = Path(lost.__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent
SHELL_SCRIPTS = [ROOT / ".ci/run", *(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts/slurm").glob("*.sbatch")]
MANIFEST = ROOT / "scripts/kubernetes/pytorchjob.yaml"


def run(*command: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_shell_scripts_pass_shellcheck():
    assert {"two_nodes.sh", "pretrain.sbatch", "setup.sh", "run"} <= {path.name for path in SHELL_SCRIPTS}
    assert run(TOOLS / "shellcheck", *SHELL_SCRIPTS) == (0, "")


def test_shellcheck_finds_an_unquoted_variable(tmp_path):
    script = tmp_path / "wrong.sh"
    script.write_text("#!/usr/bin/env bash\nrm -r $1\n")
    status, output = run(TOOLS / "shellcheck", script)
    assert status == 1
    assert "SC2086" in output


def test_the_dockerfile_passes_hadolint():
    assert run(TOOLS / "hadolint", ROOT / "Dockerfile") == (0, "")


def test_hadolint_finds_an_unpinned_image(tmp_path):
    wrong = tmp_path / "Dockerfile"
    wrong.write_text((ROOT / "Dockerfile").read_text().replace("nvidia/cuda:13.0.2-devel-ubuntu24.04", "nvidia/cuda"))
    status, output = run(TOOLS / "hadolint", wrong)
    assert status == 1
    assert "DL3006" in output


def test_the_dockerfile_is_as_promised():
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    text = "\n".join(lines)
    assert lines[0].startswith("FROM nvidia/cuda:")
    # Dependencies before the source, so that they stay in the cache.
    assert text.index("pip install --no-cache-dir -r requirements.txt -c constraints.txt") < text.index("COPY . .")
    users = re.findall(r"^USER (\S+)$", text, flags=re.MULTILINE)
    assert users == ["10001:10001"]
    assert text.index("USER") < text.index("ENTRYPOINT")
    assert 'ENTRYPOINT ["lost"]' in lines


def test_the_requirements_of_the_dockerfile_are_those_of_the_project(tmp_path):
    """The very command of the Dockerfile, up to the installation."""
    joined = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^RUN (python -c .*?) && pip", joined, flags=re.MULTILINE)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    listed = (tmp_path / "requirements.txt").read_text().splitlines()
    assert len(listed) > 10
    assert any(line.startswith("torch>=") for line in listed)
    assert all(re.match(r"[a-z][\w-]*[^/]*$", line) for line in listed)


def test_the_docker_context_holds_the_sources_and_nothing_large():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "lost", "kernels", "configs"} <= set(kept)
    assert not {".venv", ".git", "runs"} & set(kept)
    assert all((ROOT / name).exists() for name in kept)


# ------------------------------------------------------------------------------------------ the manifest


def check_manifest(manifest: dict, folder: Path) -> tuple[int, str]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return run(sys.executable, "scripts/check_manifest.py", path)


def place(manifest: dict, dotted: str) -> tuple[dict | list, str | int]:
    """The mapping or list that holds the last word of a dotted path, and that word."""
    *words, last = [int(word) if word.isdigit() else word for word in dotted.split("/")]
    inner = manifest
    for word in words:
        inner = inner[word]
    return inner, last


POD = "spec/pytorchReplicaSpecs/Worker/template/spec"
MISTAKES = [
    ("kind", "Job", "kind: Input should be"),
    ("spec/elasticPolicy/maxReplica", 3, "maxReplica: Extra inputs are not permitted"),
    ("spec/elasticPolicy/minReplicas", 3, "is not between minReplicas = 3 and maxReplicas = 2"),
    ("spec/elasticPolicy/nProcPerNode", 4, "nProcPerNode = 4, but a pod has 8 GPUs"),
    ("spec/pytorchReplicaSpecs/Worker/restartPolicy", "ExitCode", "restartPolicy: Input should be 'OnFailure'"),
    (f"{POD}/terminationGracePeriodSeconds", 240, "below terminationGracePeriodSeconds = 240"),
    (f"{POD}/securityContext/runAsNonRoot", False, "runAsNonRoot: Input should be True"),
    (f"{POD}/containers/0/name", "main", "name: Input should be 'pytorch'"),
    (f"{POD}/containers/0/image", "registry.example.com/lost:latest", "image: String should match"),
    (f"{POD}/containers/0/image", "registry.example.com:5000/lost", "image: String should match"),
    (f"{POD}/containers/0/command", ["lost"], "command and args must be torchrun"),
    (f"{POD}/containers/0/args/4", "experiment=c4_2b", "c4_2b"),
    (f"{POD}/containers/0/args/5", "run_dir=/tmp/run", "run_dir = /tmp/run is on no mounted volume"),
    (f"{POD}/containers/0/env/0/value", "0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
    (f"{POD}/containers/0/env/1/value", 8, "value: Input should be a valid string"),
    (f"{POD}/containers/0/volumeMounts/1/mountPath", "/shm", "nothing is mounted at /dev/shm"),
    (f"{POD}/containers/0/resources/limits/memory", "256 GB", "memory: String should match"),
    (f"{POD}/volumes/0/name", "other", "differ"),
]


def test_the_manifest_passes_its_check():
    assert run(sys.executable, "scripts/check_manifest.py", MANIFEST) == (0, "")


def test_the_manifest_check_finds_each_planted_mistake(tmp_path):
    right = yaml.safe_load(MANIFEST.read_text())
    assert check_manifest(right, tmp_path) == (0, "")
    paths = []
    for number, (dotted, value, _) in enumerate(MISTAKES):
        wrong = copy.deepcopy(right)
        inner, last = place(wrong, dotted)
        inner[last] = value
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(wrong))
    status, output = run(sys.executable, "scripts/check_manifest.py", *paths)
    assert status == 1
    for path, (dotted, _, message) in zip(paths, MISTAKES, strict=True):
        found = [line for line in output.splitlines() if line.startswith(f"{path}: ")]
        assert len(found) == 1, (dotted, found)
        assert message in found[0], (dotted, found)


def test_the_manifest_check_needs_one_readable_document(tmp_path):
    two = tmp_path / "two.yaml"
    two.write_text(MANIFEST.read_text() + "\n---\n" + MANIFEST.read_text())
    broken = tmp_path / "broken.yaml"
    broken.write_text("kind: [")
    status, output = run(sys.executable, "scripts/check_manifest.py", two, broken, tmp_path / "none.yaml")
    assert status == 1
    assert "2 documents" in output
    assert "expected" in output
    assert "No such file" in output


# ------------------------------------------------------------------------------------------ docs/clusters.md


def lost_commands(text: str) -> list[list[str]]:
    """Settings of every `lost` command in the code blocks, with continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    starts = r"(?:\blost(?::[\w.]+)? (?:pretrain|plan|prepare)|scripts/slurm/pretrain\.sbatch)\s+(.*)"
    found = [match[1] for line in lines if (match := re.search(starts, line.split("#")[0].strip()))]
    return [words.replace("'", "").replace('"', "").split() for words in found]


def test_the_commands_of_the_page_name_settings_that_exist():
    commands = lost_commands((ROOT / "docs/clusters.md").read_text())
    assert len(commands) >= 8
    for words in commands:
        compose("plan", words)


def test_the_plan_of_the_page_is_what_lost_plan_prints(capsys):
    page = (ROOT / "docs/clusters.md").read_text()
    shown = [" ".join(line.split()) for line in page.replace("\n              ", " ").splitlines()]
    shown = [line for line in shown if line.startswith(("state ", "peak ", "64 devices "))]
    assert len(shown) == 4
    command = next(words for words in lost_commands(page) if "num_devices=64" in words)
    assert plan.run(compose("plan", command)) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for line in shown:
        assert line in printed
