"""Kills a run again and again at random moments; it must end like the run that nobody killed, to the bit.

    python scripts/soak.py --kills 20 --processes 2 --background true

A tiny run is started, killed with SIGKILL (one process or all of them, by chance) and started again with the same
command, until it has been killed so often; then it runs to its end. Its metrics.jsonl, its final weights and the
counters of its last checkpoint must equal those of the unbroken run. Exit status 0 only then.

Processes are forks of one that has imported everything (`--launcher fork`), or real commands under python or torchrun
(`--launcher command`, about 10 s a start).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from lost.testing.forked import Forked
from lost.testing.runs import children_of, environment, read_metrics, tiny_run, write_corpus

SAVE_STEPS = 5
# A kill comes at most so many steps after the start before it got to.
REACH_STEPS = 25
LIMIT_SECONDS = 300


class Command:
    """The command under python or torchrun; the same face as Forked."""

    def __init__(self, folder: Path, arguments: list[str], count: int):
        folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        self._count = count
        self._log = folder / "output.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "lost", *arguments],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._workers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def send(self, index: int, number: signal.Signals) -> None:
        pids = self._workers()
        if index < len(pids):
            with suppress(ProcessLookupError):
                os.kill(pids[index], number)

    def _workers(self) -> list[int]:
        """Process ids of the processes that train and still run, in the order of their indices."""
        own = self._process.pid
        if self._process.poll() is not None:
            return []
        return sorted(children_of(own)) if self._count > 1 else [own]

    def is_running(self) -> bool:
        return self._process.poll() is None

    def exit_codes(self) -> list[int | None]:
        return [self._process.wait(LIMIT_SECONDS)]

    def output(self) -> str:
        return self._log.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--background", choices=("true", "false"), default="true", help="saves in the background")
    parser.add_argument("--launcher", choices=("fork", "command"), default="fork")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--folder", type=Path, help="kept; without it a temporary one is used and removed")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="lost_soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return soak(folder, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def soak(folder: Path, options: argparse.Namespace) -> int:
    """The whole experiment; 0 if the killed run equals the unbroken one."""
    started = time.monotonic()
    chance = random.Random(options.seed)
    corpus = write_corpus(folder)
    # So many that the run cannot end before its last kill.
    num_steps = (options.kills + 1) * REACH_STEPS
    keys = [
        f"train.max_steps={num_steps}",
        f"checkpoint.every_steps={SAVE_STEPS}",
        f"checkpoint.background={options.background}",
        "evaluation.every_steps=50",
        "runtime.timeout_seconds=30",
    ]
    launch = Forked if options.launcher == "fork" else Command

    def start(name: str):
        return launch(folder / "output", tiny_run(folder / name, corpus, *keys), options.processes)

    run_to_the_end(start("unbroken"))
    seconds_unbroken = time.monotonic() - started
    where: Counter[str] = Counter()
    for number in range(options.kills):
        where.update(kill_once(start("killed"), folder / "killed", chance, number, options.processes))
    run_to_the_end(start("killed"))

    problems = differences(folder / "killed", folder / "unbroken", num_steps)
    print(
        f"{options.kills} kills of {options.processes} process(es), background saves {options.background}, launcher"
        f" {options.launcher}, seed {options.seed}: {num_steps} steps, a checkpoint every {SAVE_STEPS};"
        f" {dict(sorted(where.items()))}; {time.monotonic() - started:.0f} s, of which the unbroken run"
        f" {seconds_unbroken:.0f} s"
    )
    print("\n".join(problems) or "The killed run equals the unbroken one: metrics, final weights and last checkpoint.")
    return 1 if problems else 0


def run_to_the_end(run) -> None:
    with run:
        codes = run.exit_codes()
        if any(codes):
            raise SystemExit(f"exit status {codes}\n{run.output()}")


def kill_once(run, run_dir: Path, chance: random.Random, number: int, count: int) -> list[str]:
    """Kills one process or all at a random moment; in words, what was hit."""
    victims = list(range(count)) if chance.random() < 0.5 else [chance.randrange(count)]
    wanted = max(last_step(run_dir), 0) + chance.randint(0, REACH_STEPS - SAVE_STEPS)
    # One in five comes at a time rather than a step: while the run starts, loads or prepares.
    deadline = time.monotonic() + (chance.uniform(0, 3) if chance.random() < 0.2 else LIMIT_SECONDS)
    pause = chance.uniform(0, 0.03)
    with run:
        while last_step(run_dir) < wanted and time.monotonic() < deadline:
            if not run.is_running():
                raise SystemExit(f"kill {number}: the run ended by itself\n{run.output()}")
            time.sleep(0.001)
        time.sleep(pause)
        for index in victims:
            run.send(index, signal.SIGKILL)
        step = last_step(run_dir)
        is_saving = any((run_dir / "checkpoints").glob(".tmp_*"))
        # The others must end by themselves, or by torchrun.
        run.exit_codes()
    print(f"kill {number + 1}: process {victims} after step {step}{', while saving' if is_saving else ''}", flush=True)
    return ["all" if len(victims) == count else "one of them", *(["while saving"] if is_saving else [])]


def last_step(run_dir: Path) -> int:
    """Step of the newest whole training line; -1 before the first."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return next((line["step"] for line in map(json.loads, reversed(whole)) if "loss" in line), -1)


def differences(ours: Path, theirs: Path, last: int) -> list[str]:
    """What is not equal between two runs; empty where everything is."""
    problems = []
    mine, other = read_metrics(ours), read_metrics(theirs)
    if mine != other:
        first = next((pair for pair in zip(mine, other, strict=False) if pair[0] != pair[1]), (len(mine), len(other)))
        problems.append(f"metrics.jsonl differs, first here: {first}")
    if [line["step"] for line in mine if "loss" in line] != list(range(1, last + 1)):
        problems.append("metrics.jsonl does not hold every step once")
    weights = [(run / "final/model.safetensors").read_bytes() for run in (ours, theirs)]
    if weights[0] != weights[1]:
        problems.append("the final weights differ")
    facts = [json.loads((run / f"checkpoints/step_{last:08d}/state.json").read_text()) for run in (ours, theirs)]
    if facts[0]["counters"] != facts[1]["counters"]:
        problems.append(f"the counters differ: {facts[0]['counters']} and {facts[1]['counters']}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
