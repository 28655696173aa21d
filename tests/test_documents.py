"""What the documents for contributors say of files, tests, floors and versions is so."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import lowrank_pretrain

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lowrank_pretrain"
DOCUMENTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "README.md", "tests/README.md")
LONGEST_FILE, LONGEST_BODY = 450, 60  # lines


@cache
def text_of(path: Path) -> str:
    return path.read_text()


@cache
def names_of_tests() -> frozenset[str]:
    """Names of test files and test functions."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    return frozenset(name for path in files for name in [path.stem, *re.findall(r"def (test_\w+)", text_of(path))])


def floors() -> dict[str, int]:
    plan = re.search(r"```\n((?:\d  [a-z ]+\n)+)```", text_of(ROOT / "ARCHITECTURE.md")).group(1)
    return {room: int(line[0]) for line in plan.splitlines() for room in line[1:].split()}


def imported(path: Path) -> set[str]:
    """Rooms (or files of the package's root) that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("lowrank_pretrain.")}
    return found


def test_rooms_import_only_what_is_below_them():
    floor = floors()
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert set(floor) == rooms
    upward = set()  # import-linter refuses these too, indirect ones included; its floors are those of the document
    for room in rooms:
        for path in (PACKAGE / room).rglob("*.py"):
            others = {other for other in imported(path) & rooms - {room} if floor[other] >= floor[room]}
            upward |= {(str(path.relative_to(PACKAGE)), other) for other in others}
    assert not upward
    linted = re.search(r"layers = \[\n(.*?)\n\]", text_of(ROOT / "pyproject.toml"), re.S).group(1)
    rows = [set(re.findall(r"\w+", line)) for line in reversed(linted.splitlines())]
    assert {room: number for number, row in enumerate(rows, 1) for room in row} == floor


def test_no_file_and_no_function_is_long():
    """A body is counted without signature and docstring."""
    files, bodies = {}, {}
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        files[name] = len(text_of(path).splitlines())
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
                bodies[f"{name}: {node.name}"] = node.body[-1].end_lineno - first.lineno + 1
    assert not {name: lines for name, lines in files.items() if lines > LONGEST_FILE}
    assert not {name: lines for name, lines in bodies.items() if lines > LONGEST_BODY}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_only_what_there_is(name):
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text_of(ROOT / name), flags=re.S))
    files = {word for word in quoted if re.fullmatch(r"[\w./-]+\.(py|yaml|md|toml|cff)", word)}
    missing = {file for file in files if not any((base / file).exists() for base in (ROOT, PACKAGE, ROOT / "tests"))}
    assert not missing
    tests = {word for word in quoted if re.fullmatch(r"test_\w+", word)}
    assert not tests - names_of_tests()


def test_who_cites_the_software_cites_this_version():
    yaml = pytest.importorskip("yaml", reason="OmegaConf brings it")
    cited = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert cited["version"] == lowrank_pretrain.__version__
    papers = [reference["url"].rpartition("/")[2] for reference in cited["references"]]
    assert papers == ["2509.21619", "2402.16828", "2403.03507"]
