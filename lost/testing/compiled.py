"""Triton kernels compiled ahead of time for GPUs that are not there, and what the compiler says of the result."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Compiled:
    """Registers of a thread and of those the spilled (sm_*: bytes), 16-byte accesses, and 2-byte loads."""

    registers: int
    spilled: int
    wide_loads: int
    wide_stores: int
    narrow_loads: int


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: set[str], num_warps: int, target: str
) -> Compiled:
    """Compiles `kernel` as Triton does at its first call.

    Args:
        kernel: a function under triton.jit.
        types: of the arguments, as Triton spells them (*bf16, i32).
        constants: the constexpr arguments.
        aligned: arguments that are multiples of 16.
        num_warps: of a program.
        target: a key of TARGETS.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps})
    return _of_amd(made.asm["amdgcn"]) if target == "gfx942" else _of_nvidia(made.asm["ptx"], TARGETS[target].arch)


def _of_nvidia(ptx: str, capability: Any) -> Compiled:
    architecture = _found(r"\.target (\w+)", ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(
        registers=int(_found(r"Used (\d+) registers", said)),
        spilled=int(_found(r"(\d+) bytes spill stores", said)),
        wide_loads=ptx.count("ld.global.v4"),
        wide_stores=ptx.count("st.global.v4"),
        narrow_loads=ptx.count("ld.global.b16"),
    )


def _of_amd(assembly: str) -> Compiled:
    return Compiled(
        registers=int(_found(r"\.vgpr_count:\s+(\d+)", assembly)),
        spilled=int(_found(r"\.vgpr_spill_count:\s+(\d+)", assembly)),
        wide_loads=assembly.count("_load_dwordx4"),
        wide_stores=assembly.count("_store_dwordx4"),
        narrow_loads=assembly.count("_load_ushort"),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"{pattern} not in what the compiler wrote: {text[:300]}"
    return match.group(1)
