"""How many threads a process takes whose torchrun has set OMP_NUM_THREADS=1."""

import os
import subprocess
import sys

import pytest

CORES = len(os.sched_getaffinity(0))


def own_threads(of_parent: dict[str, str], of_child: dict[str, str]) -> int:
    """What a process whose parent started with other variables takes for its share; 0: nothing to change."""
    names = ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE")
    outer = {key: value for key, value in os.environ.items() if key not in names} | of_parent
    settings = [f"{key}={value}" for key, value in of_child.items()]
    code = "from lost.utils.launcher import num_own_threads; print(num_own_threads())"
    # The `true` keeps the shell from becoming the second process.
    script = ["sh", "-c", 'env "$@"; true', "sh", *settings, sys.executable, "-c", code]
    return int(subprocess.run(script, env=outer, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("of_parent", "of_child", "expected"),
    [
        ({}, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, CORES),
        ({}, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, max(1, CORES // 2)),
        ({}, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "999"}, 1),
        ({"OMP_NUM_THREADS": "1"}, {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 0),
        ({}, {"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 0),
        ({}, {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 0),
        ({}, {"OMP_NUM_THREADS": "1"}, 0),
    ],
    ids=["alone on its node", "one of two", "more processes than cores", "chosen", "another number", "unset", "plain"],
)
def test_only_what_torchrun_has_set_unasked_is_changed(of_parent, of_child, expected):
    assert own_threads(of_parent, of_child) == expected
