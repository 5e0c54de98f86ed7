"""The house rules that a program can see. Every failure names file and line."""
import ast
import importlib
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

from diptych.systems.table import TABLE

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "diptych"

# longest file in lines, by folder; the first that fits counts
BUDGETS = {"diptych/parts": 350, "diptych/objectives": 350, "diptych/systems": 400, "diptych": 400, "tests": 400}
DUPLICATE_LINES = 12
ZOO_BYTES = 40_000_000

FORBIDDEN = {
    r"\.cuda\(": "devices come from the module",
    r"\b(TODO|FIXME|XXX)\b": "finish it or leave it out",
    r"\bNotImplementedError\b": "no stubs",
    r"from __future__ import annotations": "annotations stay objects",
    r"\btorch\.load\((?!.*weights_only=True)": "weights_only=True, or safetensors",
    r"\bpickle\.load\(": "never unpickle files",
    r"\bif\b.*\b(self|module)\.training\b": "nothing keys behaviour on the training flag",
}


@cache
def sources(*folders: str) -> dict[str, str]:
    """Relative path -> text of the Python files below the folders."""
    paths = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders)
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted(paths)}


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def over_budget(files: dict[str, str]) -> list[str]:
    found = []
    for path, source in files.items():
        budget = next(lines for folder, lines in BUDGETS.items() if path.startswith(folder + "/"))
        lines = source.count("\n")
        if lines > budget:
            found.append(f"{path}: {lines} lines, budget {budget}")
    return found


def forbidden(files: dict[str, str]) -> list[str]:
    return [f"{path}:{number}: {line.strip()} ({why})"
            for path, source in files.items() for number, line in enumerate(source.splitlines(), 1)
            for pattern, why in FORBIDDEN.items() if re.search(pattern, line)]


def prints(files: dict[str, str]) -> list[str]:
    return [f"{path}:{node.lineno}: print" for path, source in files.items() for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]


def unannotated(files: dict[str, str]) -> list[str]:
    """Public functions and methods (not nested ones) without a full signature."""
    found = []
    for path, source in files.items():
        module = ast.parse(source)
        classes = [node for node in module.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for node in chain(module.body, *(c.body for c in classes)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                args = node.args
                named = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
                bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    missing = ", ".join(bare + ["return"] * (node.returns is None))
                    found.append(f"{path}:{node.lineno}: {node.name} without types for {missing}")
    return found


def duplicates(files: dict[str, str], length: int = DUPLICATE_LINES) -> list[str]:
    """Pairs of places where `length` lines of code are the same (blank lines and imports do not count)."""
    first: dict[tuple[str, ...], str] = {}
    found: dict[tuple[str, str], str] = {}
    for path, source in files.items():
        lines = [(n, line.strip()) for n, line in enumerate(source.splitlines(), 1)
                 if line.strip() and not re.match(r"(from|import) ", line)]
        for i in range(len(lines) - length + 1):
            block = tuple(text for _, text in lines[i : i + length])
            place = f"{path}:{lines[i][0]}"
            other = first.setdefault(block, place)
            if other != place:
                found.setdefault((other.partition(":")[0], path), f"{place} repeats {other}")
    return list(found.values())


def none_of(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


def test_files_are_within_their_budgets():
    none_of(over_budget(sources("diptych", "tests")))


def test_nothing_forbidden_in_the_library():
    none_of(forbidden(sources("diptych")))


def test_only_the_command_line_prints():
    library = {path: source for path, source in sources("diptych").items() if not path.startswith("diptych/cli/")}
    none_of(prints(library))


def test_public_functions_are_annotated():
    none_of(unannotated(sources("diptych")))


def test_comments_are_ascii():
    found = [f"{path}:{number}: {text}" for path, source in sources("diptych", "tests").items()
             for number, text in comments(source) if not text.isascii()]
    none_of(found)


def test_no_code_is_written_twice():
    none_of(duplicates(sources("diptych")))


def test_every_module_says_what_it_is():
    missing = [path for path, source in sources("diptych").items()
               if source.strip() and not ast.get_docstring(ast.parse(source))]
    none_of(missing)


def test_every_system_has_its_page():
    """Made by `python tools/system_pages.py`; sizes are taken from the pages, since counting takes long."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        pages = importlib.import_module("system_pages")
    finally:
        sys.path.pop(0)
    assert (pages.PAGES / "README.md").read_text() == pages.index()
    for name in TABLE:
        there = (pages.PAGES / f"{name}.md").read_text()
        assert there == pages.page(name, counts := pages.counted(there)), "fix: python tools/system_pages.py"
        assert len(counts) == 3
        assert (ROOT / "docs" / "pictures" / f"mask-{name}.png").is_file()
    assert len(list(pages.PAGES.glob("*.md"))) == len(TABLE) + 1
    claims = ROOT / "docs" / "claims"
    assert (claims / "README.md").read_text() == pages.claims(), "fix: python tools/system_pages.py"
    for entry in (e for e in pages.read_entries() if e.kind == "claim"):
        study = entry.name.removeprefix("claim-")
        assert (claims / f"{study}.md").is_file() and (claims / f"{study}.png").is_file()


def test_weights_are_safetensors_and_small():
    files = [p for p in (LIBRARY / "zoo").rglob("*") if p.is_file()]
    assert [p.name for p in files if p.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz"}] == []
    assert sum(p.stat().st_size for p in files if p.suffix != ".pyc") < ZOO_BYTES


def test_the_checks_find_what_they_look_for():
    bad = "import torch\n# caf\u00e9\ndef f(x):\n    print(x.cuda())  # TO" + "DO\n    return torch.load(x)\n"
    files = {"diptych/parts/bad.py": bad + "\n" * 350, "diptych/systems/fine.py": "\n" * 400}
    assert over_budget(files) == ["diptych/parts/bad.py: 355 lines, budget 350"]
    assert len(forbidden(files)) == 3
    assert prints(files) == ["diptych/parts/bad.py:4: print"]
    assert unannotated(files) == ["diptych/parts/bad.py:3: f without types for x, return"]
    assert [n for n, text in comments(bad) if not text.isascii()] == [2]
    block = "".join(f"x{i} = {i}\n" for i in range(DUPLICATE_LINES))
    assert duplicates({"a.py": block, "b.py": "y = 0\n" + block}) == ["b.py:2 repeats a.py:1"]
    assert duplicates({"a.py": block, "b.py": block.replace("x3", "y3")}) == []
