"""What a benchmark found: a table for people, JSON for comparisons."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lost.bench.timing import Timing, quantiles
from lost.config.schema import BenchConfig
from lost.config.section import to_dict
from lost.utils.versions import versions


@dataclass(frozen=True)
class Arm:
    """One way of doing the same work."""

    timing: Timing
    num_parameters: int
    saved_bytes: int


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
            "arms": {name: self._arm_facts(name) for name in self.arms},
            **self.more_facts,
            "config": to_dict(self.config),
            "versions": versions(),
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
            "seconds": arm.timing.seconds,
        }

    def table(self) -> Table:
        """One row an arm; tokens/s and saved activations where they mean something."""
        has_saved = any(arm.saved_bytes for arm in self.arms.values())
        caption = (
            f"{self.device.type}, {self.precision}, {self.num_threads} CPU threads; median and 20-80 % of"
            f" {self.config.repeats} interleaved rounds." + has_saved * " Saved: kept for the backward pass."
        )
        table = Table(title=self.title, caption=caption)
        table.add_column("", no_wrap=True)
        heads = ["ms", f"/ {self.base}", "20-80 %", *["tokens/s"] * bool(self.num_tokens), "M params"]
        for head in heads + ["saved MiB"] * has_saved:
            table.add_column(head, justify="right", no_wrap=True)
        for name, arm in self.arms.items():
            low_ratio, high_ratio = quantiles(arm.timing.ratios_to(self.arms[self.base].timing))
            cells = [
                f"{1e3 * arm.timing.median:.1f}",
                f"{self.ratio_to_base(name):.3f}",
                f"{low_ratio:.2f}-{high_ratio:.2f}",
                *[f"{self.num_tokens / arm.timing.median:,.0f}"] * bool(self.num_tokens),
                f"{arm.num_parameters / 1e6:.2f}",
                *[f"{arm.saved_bytes / 2**20:.1f}"] * has_saved,
            ]
            table.add_row(name, *cells)
        return table

    def print_and_write(self) -> Path | None:
        """Prints the table; writes `<to>/bench_<what>.json` where `to` is set and returns its path."""
        Console().print(self.table())
        if self.remark:
            Console().print(self.remark, highlight=False)
        if not self.config.to:
            return None
        path = Path(self.config.to) / f"bench_{self.config.what}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.facts(), indent=2) + "\n")
        Console().print(f"written: {path}", highlight=False)
        return path
