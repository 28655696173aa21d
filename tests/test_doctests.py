"""The examples in docstrings are true. Files without one are not imported here."""

import doctest
import importlib
from pathlib import Path

import pytest

import lowrank_pretrain

PACKAGE = Path(lowrank_pretrain.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples_are_true(file):
    name = ".".join(("lowrank_pretrain", *file.with_suffix("").parts)).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
