"""docs/layer.md: every rule names a test that there is, and its example runs."""

import ast
import doctest
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "layer.md"
ROWS = re.findall(r"^\| (.+) \| (`tests/.+::.+`) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_rules():
    assert len(ROWS) > 50


def test_they_name_tests_that_there_are():
    missing = []
    for _, named in ROWS:
        path, _, name = named.strip("`").partition("::")
        file = ROOT / path
        body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
        if name not in {node.name for node in body if isinstance(node, ast.FunctionDef)}:
            missing.append(named)
    assert not missing


@pytest.mark.slow
def test_example():
    found = doctest.testfile(str(PAGE), module_relative=False)
    assert found.attempted > 5
    assert not found.failed
