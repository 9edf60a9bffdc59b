"""Every planted bug is caught: by the fact of the self-audit that its entry names, and by the test that it names."""

import pytest
from conftest import run

from tools.bugs import BUGS, Bug, planted
from tools.pitfalls import train_with


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_audit_refuses_what_its_facts_cover(
    bug: Bug, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with planted(bug):
        if bug.fact is None:
            run(flags, "--check")
            assert "FAILED" not in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                run(flags, "--check")
            out = capsys.readouterr().out
            assert f"FAILED  {bug.fact}" in out
    run(flags, "--check")  # nothing of it is left


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_trains(bug: Bug, flags: dict[str, str], no_pictures: None) -> None:
    words = [f"--{name}={value}" for name, value in flags.items()]
    train_with(bug, [*words, *bug.flags])
