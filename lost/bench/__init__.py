"""Speed and memory of LOST against dense, all arms in one run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lost.bench.result import BenchResult
    from lost.config.schema import BenchConfig


def run(config: "BenchConfig") -> "BenchResult":
    """Times what `config.what` names, prints the table and writes the JSON if `config.to` is set."""
    if config.what == "layer":
        from lost.bench.layer import bench_layer as bench
    elif config.what == "block":
        from lost.bench.block import bench_block as bench
    elif config.what == "memory":
        from lost.bench.memory import bench_memory as bench
    elif config.what == "checkpoint":
        from lost.bench.checkpoint import bench_checkpoint as bench
    elif config.what == "loop":
        from lost.bench.loop import bench_loop as bench
    elif config.what == "generate":
        from lost.bench.generate import bench_generate as bench
    else:
        from lost.bench.step import bench_step as bench
    result = bench(config)
    result.print_and_write()
    return result
