"""Checks what no linter knows: file sizes, and that kernels/ stays a source root. Prints one line a problem."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_PYTHON_LINES = 500
MAX_BYTES = 1 << 20
BUILT = ("build", "dist", "runs")
# Longer files, each with its reason.
MAX_LINES_OF = {
    # One list of all settings is easier to search than several.
    Path("lost/config/schema.py"): 700,
}


def main() -> int:
    paths = repository_files()
    problems = [problem for path in paths if path.is_file() for problem in problems_of(path)]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


def repository_files() -> list[Path]:
    """Every file that git tracks or would track; in a copy without git, every file outside hidden and built folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    tops = [path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in BUILT]
    return [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]


def problems_of(path: Path) -> list[str]:
    """What is wrong with one file."""
    name = path.relative_to(ROOT)
    problems = []
    if name == Path("kernels/__init__.py"):
        problems.append(f"{name}: kernels/ is a source root; a package of that name breaks `import transformers`")
    if path.stat().st_size > MAX_BYTES:
        problems.append(f"{name}: {path.stat().st_size} bytes, the limit is {MAX_BYTES}")
    if path.suffix == ".py":
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = MAX_LINES_OF.get(name, MAX_PYTHON_LINES)
        if lines > limit:
            problems.append(f"{name}: {lines} lines, the limit is {limit}; split it by reason to change")
    return problems


if __name__ == "__main__":
    sys.exit(main())
