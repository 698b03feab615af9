"""Functions of Python's standard library, labelled with the package that they come from: data for a classifier.

    python examples/functions_by_package.py data/functions

writes train.jsonl, validation.jsonl and test.jsonl of {"text": source of a function, "label": its package}. All
functions of a file go into the same set, so that no function is classified by knowing its neighbour's label.
"""

import argparse
import ast
import json
import sysconfig
import textwrap
from pathlib import Path

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
MIN_LINES = 4
# Of every six files of a package, in the order of their names.
SETS_OF_FILES = ("train", "train", "validation", "train", "train", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", type=Path, help="folder for the three files")
    to = parser.parse_args().to
    to.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        files = [path for path in sorted((library / package).rglob("*.py")) if "test" not in path.parts]
        for number, path in enumerate(files):
            name = SETS_OF_FILES[number % len(SETS_OF_FILES)]
            for text in functions(path.read_text(encoding="utf-8")):
                lines[name].append(json.dumps({"text": text, "label": package}))
    for name, own in lines.items():
        (to / f"{name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
        print(f"{to / name}.jsonl: {len(own)} functions")


def functions(source: str) -> list[str]:
    """The source of every function and method with at least MIN_LINES lines, in the order of the file."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = source.split("\n")
    texts = [textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) for node in found]
    return [text for text in texts if text.count("\n") + 1 >= MIN_LINES]


if __name__ == "__main__":
    main()
