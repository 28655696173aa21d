"""The support matrix names tests that there are, lines that the code says, and is written anew when it changes."""

import ast
import functools
import re

import pytest

from tests import matrix


@functools.cache
def functions(file):
    return {
        node.name for node in ast.parse((matrix.ROOT / "tests" / file).read_text()).body if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("feature", matrix.FEATURES)
def test_every_named_test_exists(feature):
    for method in matrix.METHODS:
        cell = matrix.CELLS.get((method, feature))
        if cell is None:
            continue
        file, function, _, case = re.fullmatch(r"(\w+\.py)::(\w+)(\[(.+)\])?", cell.test).groups()
        assert function in functions(file), cell.test
        text = (matrix.ROOT / "tests" / file).read_text() + (matrix.ROOT / "tests" / "galore_workers.py").read_text()
        known = (*matrix.METHODS, *matrix.FEATURES)
        assert not case or all(part in known or part in text for part in re.split(r"-(?!mixed|true)", case)), cell.test


def test_every_refusal_is_what_the_code_says():
    source = " ".join(path.read_text() for path in (matrix.ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a string over several lines
    for cell in matrix.CELLS.values():
        if isinstance(cell, matrix.Refused):
            words = [part.strip() for part in cell.line.split(":", 1)[1].split("…")]
            assert all(part in source for part in words if part), cell.line


def test_every_cell_is_of_a_method_and_a_feature_that_there_are():
    assert {method for method, _ in matrix.CELLS} == set(matrix.METHODS)
    assert {feature for _, feature in matrix.CELLS} == set(matrix.FEATURES)
    assert all((matrix.ROOT / "conf" / "method" / f"{method}.yaml").is_file() for method in matrix.METHODS)


def test_the_page_is_what_the_table_says():
    assert matrix.PAGE.read_text() == matrix.page(), "stale: make matrix"
