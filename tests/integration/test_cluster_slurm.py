"""scripts/slurm/pretrain.sbatch with a real torchrun; only SLURM's own commands are stand-ins."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lost
from lost.testing.runs import environment, lost_here, read_metrics, tiny_run, write_corpus

ROOT = Path(lost.__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/slurm/pretrain.sbatch"
KEYS = [
    "train.max_steps=100",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=0",
    "runtime.device=cpu",
    "runtime.precision=fp32",
]
# What the stand-ins know: srun becomes the command itself, so that it gets srun's signals.
SCONTROL = """
case "$1" in
  requeue) echo "$2" >>"$REQUEUED" ;;
  show) if [ "$2" = job ]; then echo "   PreemptTime=$PREEMPT_TIME"; else echo localhost; fi ;;
esac
"""
STAND_INS = {"srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n', "scontrol": SCONTROL}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def job(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The script as SLURM would start it: a copy outside the checkout, with the variables of a job of one node."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (commands / name).chmod(0o755)
    copy = folder / "slurm_script"
    copy.write_text(SCRIPT.read_text())
    slurm = {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "PYTHON": sys.executable,
        "REQUEUED": str(folder / "requeued"),
        "PREEMPT_TIME": "None",
    }
    return subprocess.Popen(
        ["bash", copy, *arguments],
        env=environment(**(slurm | variables)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def signal_after(process: subprocess.Popen[str], run_dir: Path, num_lines: int, name: str) -> tuple[int, str]:
    """Signals the batch shell alone once the run has written so many more lines of metrics."""
    path = run_dir / "metrics.jsonl"
    before = path.read_bytes().count(b"\n") if path.is_file() else 0
    end = time.monotonic() + 240
    while not (path.is_file() and path.read_bytes().count(b"\n") >= before + num_lines):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run never trained a step"
        time.sleep(0.02)
    os.kill(process.pid, signal.Signals[name])
    return end_of(process)


def status(run_dir: Path) -> tuple[str, str]:
    content = json.loads((run_dir / "status.json").read_text())
    return content["state"], content["reason"]


def test_a_job_saves_goes_back_into_the_queue_and_ends_like_an_unbroken_run(corpus, tmp_path):
    run_dir, unbroken, requeued = tmp_path / "run", tmp_path / "unbroken", tmp_path / "requeued"
    assert lost_here(*tiny_run(unbroken, corpus, *KEYS)) == 0
    arguments = tiny_run(run_dir, corpus, *KEYS)[1:]

    # The early warning.
    code, output = signal_after(job(tmp_path, *arguments), run_dir, 5, "SIGUSR1")
    assert code == 1, output
    assert status(run_dir) == ("preempted", "received SIGUSR1")
    assert requeued.read_text() == "4711\n"

    code, output = end_of(job(tmp_path, *arguments))
    assert code == 0, output
    assert status(run_dir)[0] == "finished"
    assert requeued.read_text() == "4711\n"
    assert read_metrics(run_dir) == read_metrics(unbroken)


@pytest.mark.parametrize(
    ("asked", "preempt_time", "ends_with", "is_requeued"),
    [
        ("SIGTERM", "None", 1, False),
        ("SIGTERM", "2026-11-22T15:05:33", 1, True),
        ("SIGUSR1", "None", 1, True),
        ("SIGUSR1", "None", 0, False),
        ("", "None", 3, False),
    ],
    ids=["scancel", "pre-emption", "time limit", "asked just as it finished", "a crash"],
)
def test_which_jobs_go_back_into_the_queue(tmp_path, asked, preempt_time, ends_with, is_requeued):
    """A stand-in for torchrun that takes a while to save and ends with a given status."""
    saved = tmp_path / "saved"
    trainer = tmp_path / "python"
    trainer.write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'sleep 0.5; touch {saved}; exit {ends_with}' USR1 TERM\n"
        f"touch {tmp_path}/started\n" + ("while true; do sleep 0.05; done\n" if asked else f"exit {ends_with}\n")
    )
    trainer.chmod(0o755)
    process = job(tmp_path, PYTHON=str(trainer), PREEMPT_TIME=preempt_time)
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    if asked:
        os.kill(process.pid, signal.Signals[asked])
    code, output = end_of(process)
    assert code == ends_with, output
    assert saved.exists() == bool(asked)
    assert (tmp_path / "requeued").exists() == is_requeued


def test_a_job_without_an_interpreter_says_so(tmp_path):
    code, output = end_of(job(tmp_path, "experiment=quickstart", PYTHON="nowhere/python"))
    assert code == 2
    assert "nowhere/python is missing" in output


def test_the_time_to_save_is_shorter_than_the_warning():
    text = SCRIPT.read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    warning = options["signal"]
    assert warning.startswith("B:USR1@")
    (shutdown,) = [line.partition("=")[2] for line in text.splitlines() if line.startswith("shutdown_seconds=")]
    assert int(shutdown) < int(warning.partition("@")[2])
    assert "requeue" in options
    assert options["ntasks-per-node"] == "1"
