"""`lost bench`: speed and memory of LOST against dense."""

from lost.config.schema import BenchConfig


def run(config: BenchConfig) -> int:
    """Times what `config.what` names and prints the table; returns the exit status."""
    from lost import bench

    bench.run(config)
    return 0
