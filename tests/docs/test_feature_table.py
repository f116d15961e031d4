"""The page of features: each test that it names is there, and each refusal is what the code raises."""

import ast
import re

import pytest
from run_docs import ROOT

PAGE = (ROOT / "docs/features.md").read_text("utf-8")
TESTS = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)))
REFUSALS = re.findall(r"^\| `(.+?)` \| `+ ?(\w+: .+?) ?`+ \|$", PAGE, re.MULTILINE)


def test_both_are_found():
    assert len(TESTS) > 20
    assert len(REFUSALS) > 10
    assert PAGE.count("| yes: ") == len(re.findall(r"\| yes: `test_\w+\.py::\w+` \|", PAGE))


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_a_test_that_is_named_is_there(file, name):
    (path,) = (ROOT / "tests").rglob(file)
    tests = path.read_text("utf-8")
    if "from case_tests import *" in tests:
        tests += path.with_name("case_tests.py").read_text("utf-8")
    functions = [node for node in ast.parse(tests).body if isinstance(node, ast.FunctionDef)]
    assert name in {function.name for function in functions}


@pytest.fixture(scope="module")
def names():
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found: dict[str, object] = {}
    exec(code, found)
    return found


@pytest.mark.parametrize(("call", "sentence"), REFUSALS)
def test_a_refusal_is_what_the_code_raises(names, call, sentence):
    with pytest.raises(Exception, match=r".") as caught:
        eval(call, dict(names))
    assert f"{type(caught.value).__name__}: {caught.value}" == sentence
