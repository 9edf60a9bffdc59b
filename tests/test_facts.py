"""docs/facts.md names tests and checks that there are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.*?) ?\|$", PAGE, re.MULTILINE)


def test_every_fact_has_a_test() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 20))
    assert all("::" in tests for _, _, tests, _ in ROWS)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE))))
def test_a_test_that_the_page_names_exists(name: str) -> None:
    file, function = name.split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_checks_that_the_page_names_are_those_of_the_self_check() -> None:
    source = (ROOT / "training" / "self_check.py").read_text(encoding="utf-8")
    texts = " ".join(
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    checks = [check for *_, last in ROWS for check in last.split("; ") if check]
    assert len(checks) == 10
    for check in checks:
        for piece in check.split("'positive'"):
            assert piece.strip() in texts, check
