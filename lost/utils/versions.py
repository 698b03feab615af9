"""What produced a run: commit, package and device versions, command line."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "lost-pretraining",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "tokenizers",
    "safetensors",
    "wandb",
    "hydra-core",
    "numpy",
    "pyarrow",
    "rich",
    "matplotlib",
)
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
_GIT_TIMEOUT_SECONDS = 10


def versions() -> dict[str, Any]:
    """Facts for versions.json, as JSON values.

    Returns:
        commit (outside a repository of ours the variable LOST_COMMIT, or null), is_dirty (whether files differ from
        it), python, platform, packages (null: not installed), devices, command_line.
    """
    return {
        **_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": device_names(),
        "command_line": shlex.join(getattr(sys, "orig_argv", sys.argv)),
    }


def device_names() -> dict[str, Any]:
    """Names of the processor and of the GPUs that torch sees, with CUDA's version."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": _processor_name(), "gpus": gpus, "cuda": torch.version.cuda}


def _commit() -> dict[str, Any]:
    """Commit of the repository that tracks this package; an installed copy inside another repository has none."""
    is_tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = _git("rev-parse", "HEAD") if is_tracked else None
    if commit is None:
        return {"commit": os.environ.get("LOST_COMMIT") or None, "is_dirty": None}
    # Files that `lost bench` adds to its history are no change of the code that it measures next.
    status = _git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return {"commit": commit, "is_dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    """Output of a git command in the package's folder, or None where git is missing, fails or hangs."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=_PACKAGE_FOLDER,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
