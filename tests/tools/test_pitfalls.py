"""Every planted bug is caught: by the fact of the self-audit that its entry names, and by the test that it names."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from tools.bugs import BUGS, Bug, planted, replaced
from training.plots import plot_curves

ROOT = Path(__file__).parent.parent.parent
each_bug = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)


@each_bug
def test_the_audit_refuses_the_bug_with_the_fact_that_is_named(
    bug: Bug, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with planted(bug):
        if bug.fact is None:
            run(flags, "--check")
        else:
            with pytest.raises(SystemExit):
                run(flags, "--check")
    out = capsys.readouterr().out
    assert ("FAILED" in out) == (bug.fact is not None)
    assert f"FAILED  {bug.fact or ''}" in out or bug.fact is None


class Planter:
    """A plugin of pytest that runs the body of every test with a bug planted."""

    def __init__(self, bug: Bug) -> None:
        self.bug = bug

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[Any]:
        with planted(self.bug), replaced(plot_curves, lambda *_: None):
            return (yield)


@each_bug
def test_the_named_test_fails_with_the_bug(bug: Bug) -> None:
    """The plugins are this run's own conftest.py, which is not imported anew, and the planter."""
    words = [str(ROOT / bug.test), "--noconftest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--no-header"]
    assert pytest.main(words, plugins=[sys.modules["conftest"], Planter(bug)]) == pytest.ExitCode.TESTS_FAILED
