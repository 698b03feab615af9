"""The two processes of scripts/check_7b.sh: one makes and saves a LOST model, the other loads and runs it.

    python scripts/check_7b.py make FOLDER [key=value ...]      settings of the model, as for `lost plan`
    python scripts/check_7b.py run FOLDER

Each prints the seconds of its steps and its peak resident memory. Exit status: 0, or 1 with a message where the memory
is not under 16 GiB, a loaded tensor is not the saved one, or the logits are not finite.
"""

import json
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lost.config.compose import compose
from lost.model.build import build_meta_model, initialise, materialise
from lost.utils.errors import LostError
from lost.utils.memory import peak_resident_bytes
from lost.utils.quiet import quiet_libraries

MEMORY_LIMIT_GIB = 16
NUM_TOKENS = 128
# A file of weights is held in memory while it is written.
SHARD_SIZE = "1GB"
CHECKSUMS = "checksums.json"


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) >= 2 and arguments[0] == "make":
            make(Path(arguments[1]), arguments[2:])
        elif len(arguments) == 2 and arguments[0] == "run":
            run(Path(arguments[1]))
        else:
            raise LostError(
                f"{' '.join(arguments) or 'no arguments'}: use `make FOLDER [key=value ...]` or `run FOLDER`"
            )
        check_memory(arguments[0])
    except LostError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make(folder: Path, overrides: list[str]) -> None:
    """Initialises the model module by module in bfloat16 and saves it in files of at most `SHARD_SIZE`."""
    config = compose("plan", ["parameterization=lost", "parameterization.init=draw", *overrides])
    with timed(f"make: initialise {config.model.name} (init={config.parameterization.init})"):
        net = build_meta_model(config.model, config.parameterization, dtype=torch.bfloat16)
        materialise(net, config.parameterization, "cpu")
        initialise(net, config.parameterization, seed=0)
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    print(f"make: {num_parameters:,} parameters, {torch.get_num_threads()} threads", flush=True)
    with timed("make: save"), quiet_libraries():
        net.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        (folder / CHECKSUMS).write_text(json.dumps(checksums(net)))
    num_files = len(list(folder.glob("*.safetensors")))
    print(f"make: {num_files} files of weights", flush=True)


@torch.no_grad()
def run(folder: Path) -> None:
    """Loads the model and computes the logits of `NUM_TOKENS` random tokens."""
    with timed("run: load"), quiet_libraries():
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
    with timed("run: compare with what was saved"):
        saved, loaded = json.loads((folder / CHECKSUMS).read_text()), checksums(net)
        different = sorted(name for name in saved.keys() | loaded.keys() if saved.get(name) != loaded.get(name))
        if different:
            raise LostError(f"tensors that are not as they were saved: {len(different)}, the first is {different[0]}")
    tokens = torch.randint(net.config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with timed(f"run: forward of {NUM_TOKENS} tokens"):
        output = net(tokens, labels=tokens)
    if not output.logits.isfinite().all():
        raise LostError("the logits are not finite")
    print(f"run: logits {list(output.logits.shape)}, loss {output.loss.item():.3f}", flush=True)


def checksums(net: PreTrainedModel) -> dict[str, int]:
    """CRC-32 of the bytes of every stored tensor."""
    state = net.state_dict()
    return {name: zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data) for name, tensor in state.items()}


def check_memory(process: str) -> None:
    """Raises LostError if this process has used too much."""
    peak_gib = peak_resident_bytes() / 2**30
    print(f"{process}: peak resident memory {peak_gib:.2f} GiB", flush=True)
    if peak_gib >= MEMORY_LIMIT_GIB:
        raise LostError(f"{process}: peak resident memory {peak_gib:.2f} GiB: must be under {MEMORY_LIMIT_GIB} GiB")


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
