"""scripts/two_nodes.sh: two network namespaces, one of which dies and comes back."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lost
from lost.testing.runs import environment

ROOT = Path(lost.__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/two_nodes.sh"
HAS_NAMESPACES = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") is not None
needs_namespaces = pytest.mark.skipif(not HAS_NAMESPACES, reason="network namespaces need Linux, root and iproute2")


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        env=environment(TMPDIR=str(tmp_path), PYTHON=sys.executable),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def namespaces_of(process: subprocess.Popen[str]) -> list[str]:
    """The namespaces that a script of this process id made; others may be running at the same time."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(line.split()[0] for line in listed if line.startswith(f"lost-{process.pid}-"))


@needs_namespaces
def test_a_node_dies_comes_back_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    process = start(tmp_path)
    output, _ = process.communicate(timeout=560)
    assert process.returncode == 0, output
    assert "node b is dead" in output
    assert re.search(r"it went on from step [1-9]\d; all \d+ lines of metrics.jsonl equal the unbroken run's", output)
    assert namespaces_of(process) == []
    assert list(tmp_path.iterdir()) == []


@needs_namespaces
def test_nothing_is_left_of_an_interrupted_script(tmp_path):
    process = start(tmp_path)
    assert process.stdout is not None
    assert "joined by a veth pair" in process.stdout.readline()
    assert namespaces_of(process) == [f"lost-{process.pid}-a", f"lost-{process.pid}-b"]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert namespaces_of(process) == []


def test_an_unknown_fault_is_named(tmp_path):
    process = start(tmp_path, "flood")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "unknown argument flood: use kill (or nothing) or cut" in output
