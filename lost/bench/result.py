"""What a benchmark found: a table for people, JSON for comparisons."""

import csv
import json
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lost.bench.limits import Machine, Work
from lost.bench.timing import Timing, quantiles
from lost.config.schema import BenchConfig
from lost.config.section import to_dict
from lost.utils.plots import plot_arms
from lost.utils.versions import versions

NARROWEST = 110
HISTORY_FIELDS = (
    "median_seconds",
    "time_over_base",
    "time_over_base_20",
    "time_over_base_80",
    "tokens_per_second",
    "num_parameters",
    "saved_activation_bytes",
    "peak_bytes",
    "limit_seconds",
    "fraction_of_limit",
)


@dataclass(frozen=True)
class Arm:
    """One way of doing the same work.

    saved_bytes are kept between forward and backward, peak_bytes lived together in one call with all that outlives it;
    works are the kernels that one call cannot do without (`lost.bench.limits`). 0, none: not counted.
    """

    timing: Timing
    num_parameters: int
    saved_bytes: int
    peak_bytes: int = 0
    works: tuple[Work, ...] = ()


@dataclass(frozen=True)
class BenchResult:
    """All arms of one run, compared with the arm `base`.

    num_tokens is what one call of an arm works on; `device` and `precision` are what was picked; `more_facts` go into
    the JSON, `remark` below the table.
    """

    config: BenchConfig
    title: str
    num_tokens: int
    device: torch.device
    precision: str
    num_threads: int
    arms: dict[str, Arm]
    base: str = "dense"
    more_facts: dict[str, Any] = field(default_factory=dict)
    remark: str = ""
    # What the machine reached in this run, for the limits of the arms; None: not measured.
    machine: Machine | None = None

    def limit_seconds(self, name: str) -> float:
        """The least time that this machine needs for the arm's works; 0: not known."""
        return self.machine.least_seconds(self.arms[name].works) if self.machine else 0.0

    def fraction_of_limit(self, name: str) -> float:
        """That least time over the arm's median."""
        return self.limit_seconds(name) / self.arms[name].timing.median

    def ratio_to_base(self, name: str) -> float:
        """Median over the rounds of: time over that of `base` in the same round."""
        return statistics.median(self.arms[name].timing.ratios_to(self.arms[self.base].timing))

    def facts(self) -> dict[str, Any]:
        """Everything as JSON values: times in seconds."""
        return {
            "title": self.title,
            "what": self.config.what,
            "num_tokens": self.num_tokens,
            "device": self.device.type,
            "precision": self.precision,
            "num_threads": self.num_threads,
            **(self.machine._asdict() if self.machine else {}),
            "arms": {name: self._arm_facts(name) for name in self.arms},
            **self.more_facts,
            "config": to_dict(self.config),
            # As anyone can type it: a result that is published names no folder of the machine.
            "versions": versions() | {"command_line": shlex.join(["lost", *sys.argv[1:]])},
        }

    def _arm_facts(self, name: str) -> dict[str, Any]:
        arm = self.arms[name]
        round_ratios = arm.timing.ratios_to(self.arms[self.base].timing)
        return {
            "median_seconds": arm.timing.median,
            "spread_seconds": arm.timing.spread,
            "time_over_base": self.ratio_to_base(name),
            "spread_of_time_over_base": quantiles(round_ratios),
            "tokens_per_second": self.num_tokens / arm.timing.median,
            "num_parameters": arm.num_parameters,
            "saved_activation_bytes": arm.saved_bytes,
            "peak_bytes": arm.peak_bytes,
            "flops": sum(work.flops for work in arm.works),
            "limit_seconds": self.limit_seconds(name),
            "fraction_of_limit": self.fraction_of_limit(name),
            "seconds": arm.timing.seconds,
        }

    def table(self) -> Table:
        """One row an arm; tokens/s and saved activations where they mean something."""
        has_saved = any(arm.saved_bytes for arm in self.arms.values())
        has_peak = any(arm.peak_bytes for arm in self.arms.values())
        has_limit = any(self.limit_seconds(name) for name in self.arms)
        caption = (
            f"{self.device.type}, {self.precision}, {self.num_threads} CPU threads; median and 20-80 % of"
            f" {self.config.repeats} interleaved rounds."
            + has_saved * " Saved: kept for the backward pass."
            + self._limit_words()
        )
        table = Table(title=self.title, caption=caption)
        table.add_column("", no_wrap=True)
        heads = ["ms", f"/ {self.base}", "20-80 %", *["tokens/s"] * bool(self.num_tokens), "M params"]
        for head in heads + ["limit %"] * has_limit + ["saved MiB"] * has_saved + ["peak MiB"] * has_peak:
            table.add_column(head, justify="right", no_wrap=True)
        for name, arm in self.arms.items():
            low_ratio, high_ratio = quantiles(arm.timing.ratios_to(self.arms[self.base].timing))
            cells = [
                f"{1e3 * arm.timing.median:.1f}",
                f"{self.ratio_to_base(name):.3f}",
                f"{low_ratio:.2f}-{high_ratio:.2f}",
                *[f"{self.num_tokens / arm.timing.median:,.0f}"] * bool(self.num_tokens),
                f"{arm.num_parameters / 1e6:.2f}",
                *[f"{100 * self.fraction_of_limit(name):.0f}"] * has_limit,
                *[f"{arm.saved_bytes / 2**20:.1f}"] * has_saved,
                *[f"{arm.peak_bytes / 2**20:.1f}"] * has_peak,
            ]
            table.add_row(name, *cells)
        return table

    def print_and_write(self) -> Path | None:
        """Prints the table; where `to` is set writes JSON and a picture there and adds to bench_<what>.csv.

        They are named bench_layer.json and .png, of another benchmark bench_<what>_<model>.json and .png.

        Returns:
            The JSON's path.
        """
        console = Console()
        # A file or a pipe has no width of its own: do not fold the columns.
        console.width = console.width if console.is_terminal else max(console.width, NARROWEST)
        console.print(self.table())
        if self.remark:
            console.print(self.remark, highlight=False)
        if not self.config.to:
            return None
        history = Path(self.config.to) / f"bench_{self.config.what}.csv"
        model = "" if self.config.what == "layer" else f"_{self.config.model.name}"
        path = history.with_name(f"{history.stem}{model}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Once, and before anything is written: the commit is that of the code, without these results.
        facts = self.facts()
        path.write_text(json.dumps(facts, indent=2) + "\n")
        self.add_to_history(history, facts)
        plot_arms(
            path.with_suffix(".png"),
            self.title,
            f"time over {self.base}, with 20-80 %",
            {self._label(name): (self.ratio_to_base(name), *self._spread(name)) for name in self.arms},
        )
        Console().print(f"written: {path}, with .png, and a line an arm in {history.name}", highlight=False)
        return path

    def _limit_words(self) -> str:
        if not self.machine:
            return ""
        speeds = (
            f"{self.machine.flops_per_second / 1e12:.3g} TFLOP/s and {self.machine.bytes_per_second / 1e9:.3g} GB/s"
        )
        return f" Limit: the least time of the products and of the passes between them at {speeds}, over the median."

    def _label(self, name: str) -> str:
        """The arm's name in a picture."""
        return f"{name} ({self.fraction_of_limit(name):.0%} of limit)" if self.limit_seconds(name) else name

    def _spread(self, name: str) -> tuple[float, float]:
        return quantiles(self.arms[name].timing.ratios_to(self.arms[self.base].timing))

    def add_to_history(self, path: Path, facts: dict[str, Any]) -> None:
        """Adds one line an arm to the CSV file, with commit, device and versions; a new file gets its head first."""
        found = facts["versions"]
        devices = found["devices"]
        same = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "commit": found.get("commit"),
            "is_dirty": found.get("is_dirty"),
            "device": devices["gpus"][0] if self.device.type == "cuda" else devices["cpu"],
            "num_threads": self.num_threads,
            "torch": found["packages"]["torch"],
            "triton": found["packages"]["triton"],
            "precision": self.precision,
            "title": self.title,
        }
        rows = []
        for name in self.arms:
            arm = facts["arms"][name]
            low, high = arm["spread_of_time_over_base"]
            values = arm | {"time_over_base_20": low, "time_over_base_80": high}
            rows.append(same | {"arm": name} | {field: values[field] for field in HISTORY_FIELDS})
        add_rows(path, rows)


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds lines to a CSV file; columns that it lacks are put after its own, empty in its older lines."""
    present, older = [], []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            older = list(reader)
            present = list(reader.fieldnames or [])
    fields = present + [field for field in rows[0] if field not in present]
    is_same_head = fields == present
    with path.open("a" if is_same_head else "w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        if not is_same_head:
            writer.writeheader()
            writer.writerows(older)
        writer.writerows(rows)
