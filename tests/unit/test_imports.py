"""Import levels: data moves one way, so a room imports only rooms of lower levels. Every module imports."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lost

PACKAGE = Path(lost.__file__).parent
ROOT = PACKAGE.parent
KERNELS = ROOT / "kernels" / "lost_kernels"

LEVELS = {
    "lost_kernels": 0,
    "lost.utils": 0,
    "lost.config": 1,
    "lost.accounting": 2,
    "lost.data": 2,
    "lost.model": 2,
    "lost.checkpoint": 2,
    "lost.train": 3,
    "lost.evaluation": 3,
    "lost.export": 3,
    "lost.assemble": 4,
    "lost.bench": 5,
    "lost.finetune": 5,
    "lost.convert": 5,
    "lost.cli": 6,
}
# Rooms of one level do not import each other, but for this: the layers' shapes are arithmetic of the config.
ALLOWED_WITHIN_LEVEL = {("lost.model", "lost.accounting")}
# Who may import a third-party package at all.
ONLY_IN = {
    "hydra": {"lost/config/compose.py"},
    "omegaconf": {"lost/config/compose.py"},
}
NO_TORCH = (
    "lost/config/",
    "lost/accounting/",
    "lost/cli/main.py",
    "lost/cli/help.py",
    "lost/cli/checks.py",
    "lost/cli/reach.py",
    "lost/cli/prepare.py",
)
HEAVY = {"torch", "transformers", "accelerate", "datasets", "lost_kernels"}


def python_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if path.is_relative_to(KERNELS) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, package: str) -> set[str]:
    """Absolute names of everything that the code imports, at any depth, type checking included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[0] if parts[0] == "lost_kernels" else ".".join(parts[:2]) if parts[0] == "lost" else None


def violations(module: str, imported: set[str]) -> list[str]:
    """The imports that go up or sideways."""
    room = room_of(module)
    if room in (None, "lost", "lost.__main__", "lost.testing"):
        return []
    wrong = []
    for name in sorted(imported):
        other = room_of(name)
        if other == "lost.testing":
            wrong.append(f"{module} imports {name}: lost.testing is for tests")
        if other not in LEVELS or other == room:
            continue
        is_lower = LEVELS[other] < LEVELS[room]
        if not is_lower and (room, other) not in ALLOWED_WITHIN_LEVEL:
            wrong.append(f"{module} (level {LEVELS[room]}) imports {name} (level {LEVELS[other]})")
    return wrong


def parsed(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), package)


def test_every_room_has_a_level():
    rooms = {f"lost.{folder.name}" for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert rooms - {"lost.testing"} == set(LEVELS) - {"lost_kernels"}


def test_imports_go_down_only():
    assert [line for path in python_files() for line in violations(module_name(path), parsed(path))] == []


@pytest.mark.parametrize(
    ("module", "code", "is_wrong"),
    [
        ("lost.model.a", "from lost.train import fit", True),
        ("lost.model.a", "def f():\n    import lost.cli.main", True),
        ("lost.train.a", "from lost import evaluation", True),
        ("lost.data.a", "from lost.accounting import count_parameters", True),
        ("lost.model.a", "from lost.accounting import count_parameters", False),
        ("lost.train.a", "from lost.testing import tiny", True),
        ("lost.utils.a", "from ..config import schema", True),
        ("lost.train.a", "from . import optim\nfrom lost.model import build_model\nimport torch", False),
        ("lost_kernels.a", "import lost.utils.errors", True),
    ],
)
def test_the_check_itself(module, code, is_wrong):
    package = module.rpartition(".")[0]
    assert bool(violations(module, imports_of(ast.parse(code), package))) == is_wrong


def test_third_party_packages_stay_where_they_belong():
    wrong = []
    for path in python_files():
        name = path.relative_to(ROOT).as_posix()
        tops = {imported.partition(".")[0] for imported in parsed(path)}
        wrong += [f"{name} imports {top}" for top in tops if top in ONLY_IN and name not in ONLY_IN[top]]
        if name.startswith(NO_TORCH):
            wrong += [f"{name} imports {top}" for top in tops & HEAVY]
    assert wrong == []


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "lost_kernels", ""} | set(sys.stdlib_module_names)
    for path in KERNELS.rglob("*.py"):
        assert {name.partition(".")[0] for name in parsed(path)} <= allowed, path


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_every_module_imports(path):
    if module_name(path) == "lost.train.zero":
        pytest.importorskip("deepspeed", reason="only runtime=zero1, zero2 and zero3 need it")
    if path.name != "__main__.py":
        importlib.import_module(module_name(path))


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_lost_is_cheap():
    heavy = sorted({*HEAVY, "hydra", "omegaconf", "yaml", "rich"})
    done = run_python(f"import sys, lost; sys.exit(', '.join(n for n in {heavy} if n in sys.modules) or None)")
    assert done.returncode == 0, done.stderr


def test_lost_prepare_needs_no_torch():
    modules = "lost.cli.prepare, lost.data.progress, lost.data.row_sets"
    done = run_python(f"import sys, {modules}; print([name for name in {sorted(HEAVY)} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_public_names_exist():
    for name in lost.__all__:
        assert getattr(lost, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lost.nonsense  # noqa: B018


def test_kernels_is_a_source_root_and_transformers_imports_beside_it():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = run_python("from transformers import LlamaForCausalLM")
    assert done.returncode == 0, done.stderr
