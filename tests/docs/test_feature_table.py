"""The features page names tests that exist."""

import ast
import re

import pytest
from run_docs import ROOT

PAGE = (ROOT / "docs/features.md").read_text("utf-8")
TESTS = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)))


def test_features_name_tests():
    assert len(TESTS) > 20
    assert PAGE.count("| yes: ") == len(re.findall(r"\| yes: `test_\w+\.py::\w+` \|", PAGE))


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_named_test_exists(file, name):
    (path,) = (ROOT / "tests").rglob(file)
    tests = path.read_text("utf-8")
    if "from case_tests import *" in tests:
        tests += path.with_name("case_tests.py").read_text("utf-8")
    functions = [node for node in ast.parse(tests).body if isinstance(node, ast.FunctionDef)]
    assert name in {function.name for function in functions}
