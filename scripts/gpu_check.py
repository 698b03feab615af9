"""Checks and measures LOST on a GPU in one run of at most nine minutes, most decisive first.

    python scripts/gpu_check.py                          on a CUDA device
    python scripts/gpu_check.py --device cpu --tiny      the same items, small: tries the script itself

S0 the machine, and layers and loss against their definition: if one is wrong, nothing is timed. S1 matrix products of
our shapes. S2 what lies between them. S3 a block in every form. S4 whole steps: tokens/s and peak memory. S5 twenty
steps of operators and definition, same seed. Prints a JSON line for every measured row and after each item, then a
short table. Needs torch, triton and transformers only, nothing installed: the rest comes from this repository.
Exit status: 0 all items passed, 1 some failed, were cut off or left out for lack of time, 2 no CUDA device.
"""

import argparse
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / name) for name in ("scripts", "kernels", "")]

from gpu_items.plan import plan  # noqa: E402
from gpu_items.supervise import NoDeviceError, print_json, run_items  # noqa: E402
from gpu_items.table import table, verdict  # noqa: E402

DEADLINE_SECONDS = 535.0


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    items = [item for item in plan(is_tiny=arguments.tiny) if item.stage in (arguments.only or item.stage)]
    files = [sys.stdout]
    if arguments.to:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        files.append(arguments.to.open("w"))
    try:
        lines = run_items(
            items,
            arguments.device,
            is_tiny=arguments.tiny,
            deadline_seconds=arguments.deadline_seconds,
            started=started,
            report=lambda line: print_json(line, files),
        )
    except NoDeviceError:
        print(
            f"gpu_check: no CUDA device here ({arguments.device}), nothing to check; `--device cpu --tiny` tries the"
            " script itself",
            file=sys.stderr,
        )
        return 2
    ends = [line for line in lines if "what" not in line]
    num_failed = sum(line["status"] != "passed" for line in ends)
    print_json({"item": "end", "status": "failed" if num_failed else "passed", "num_failed": num_failed}, files)
    print_json({"item": "default kernels", **verdict(lines)}, files)
    print(table(lines))
    return 1 if num_failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: tries the script")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages only, for instance S0 S3")
    parser.add_argument("--to", type=Path, help="file that gets the JSON lines too")
    parser.add_argument("--deadline-seconds", type=float, default=DEADLINE_SECONDS, help="the whole run ends by then")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
