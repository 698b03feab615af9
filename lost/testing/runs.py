"""Real `lost` commands as processes, on a small corpus and a tiny model, for integration tests."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What differs between two runs of the same computation: clocks and memory.
WALL_CLOCK_FIELDS = ("tokens_per_second", "mfu", "step_seconds", "peak_memory_gib")

TINY_MODEL = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.intermediate_size=84",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "parameterization.lost_rank=8",
    "parameterization.density=0.1",
]


def write_corpus(folder: Path, num_documents: int = 60, seed: int = 0) -> Path:
    """A .jsonl file of made-up sentences, the same for the same seed."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(80)]
    path = folder / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_documents):
            text = " ".join(generator.choices(words, k=generator.randint(5, 120)))
            file.write(json.dumps({"text": text + "."}) + "\n")
    return path


def tiny_run(run_dir: Path, corpus: Path, *overrides: str) -> list[str]:
    """Arguments of a `lost pretrain` that takes seconds."""
    return [
        "pretrain",
        "data=text_files",
        f"data.train_files=[{corpus}]",
        "data.validation_fraction=0.1",
        f"data.cache_dir={corpus.parent / 'cache'}",
        f"run_dir={run_dir}",
        "train.seq_len=32",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "train.max_steps=12",
        "evaluation.every_steps=5",
        "checkpoint.every_steps=4",
        "logging=none",
        *TINY_MODEL,
        *overrides,
    ]


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, no network, no launcher's variables of an outer torchrun."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def lost(*arguments: str, num_processes: int = 1, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess:
    """Runs `lost <arguments>` to its end, under torchrun for several processes; output is captured as text."""
    launcher = [sys.executable, "-m", "lost"]
    if num_processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        launcher = [sys.executable, *torchrun, "-m", "lost"]
    return subprocess.run(
        [*launcher, *arguments],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    """`lost <arguments>`, running on as the leader of its own process group; only standard error is kept, as text."""
    return subprocess.Popen(
        [sys.executable, "-m", "lost", *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def succeed(*arguments: str, **options: Any) -> str:
    """`lost`, with its output shown where it fails; returns standard output."""
    done = lost(*arguments, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall-clock and memory fields."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK_FIELDS} for line in lines]


def num_lines(run_dir: Path) -> int:
    """Lines that a run has written into metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def children_of(process: int) -> list[int]:
    """Process ids of what a running process has started (Linux)."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_until(condition: Callable[[], object], seconds: float, told: Callable[[], object]) -> None:
    """Returns as soon as the condition holds; fails with what `told` returns if that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.001)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir) if "loss" in line]


def lost_here(*arguments: str) -> int:
    """`lost <arguments>` in this process, without the seconds that a new one needs to import; the exit status."""
    from lost.cli.main import main

    return main(list(arguments))
