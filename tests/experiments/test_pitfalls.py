"""Every planted bug is caught: by the fact of the self-check that its entry names, and by the test that it names."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from config import EvalConfig, UserError

import pandas as pd
import pytest
from conftest import run

import eval as evaluation
from experiments import pitfalls, runner
from experiments.bugs import BUGS, Bug, find_bug, train_with
from experiments.pitfalls import markdown
from experiments.planting import planted, replaced
from runtime.cli import parse_config
from training import plots, self_check

ROOT = Path(__file__).parent.parent.parent
each_bug = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)


@each_bug
def test_the_self_check_refuses_the_bug_with_the_fact_that_is_named(
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
        self.error: BaseException | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[Any]:
        no_self_check = replaced(self_check, "self_check", lambda *_: None)  # the test itself must notice
        with planted(self.bug), no_self_check, replaced(plots, "plot_curves", lambda *_: None):
            try:
                return (yield)
            except BaseException as error:
                self.error = error
                raise


@each_bug
def test_the_named_test_fails_with_the_bug(bug: Bug) -> None:
    """By what it asserts, and not because the bug cannot be called.

    The plugins are this run's own conftest.py, which is not imported anew, and the planter.
    """
    flags = ["--noconftest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "--no-header"]
    planter = Planter(bug)
    assert (
        pytest.main([str(ROOT / bug.test), *flags], plugins=[sys.modules["conftest"], planter])
        == pytest.ExitCode.TESTS_FAILED
    )
    assert isinstance(planter.error, AssertionError), planter.error


def call_here(command: Sequence[str], log: Path, threads: int) -> int:
    """What the runner does in a process of its own, here: train with a bug, or evaluate."""
    with log.open("a") as file, redirect_stdout(file):
        if command[1] == "eval.py":
            evaluation.main(parse_config(EvalConfig, command[2:]))
        else:
            assert command[:3] == ["python", "-m", "experiments.bugs"]
            train_with(find_bug(command[3]), list(command[4:]))
    return 0


def test_all_bugs_are_trained_once_and_drawn(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished runs are kept; the policy is evaluated without the bug, and what the run reported stands beside it."""
    monkeypatch.setattr(pitfalls, "BUGS", [bug for bug in BUGS if bug.name in ("label_swapped", "resume_forgets")])
    del flags["ckpt_dir"]
    train = shlex.join(f"--{name}={value}" for name, value in {**flags, "eval_every": "0", "lr": "0"}.items())
    words = [
        "--seeds",
        "0",
        "--folder",
        str(tmp_path / "runs"),
        "--csv",
        str(tmp_path / "table.csv"),
        "--train",
        train,
        "--evaluate",
        "--n_samples=20 --judge=none --device=cpu",
    ]
    monkeypatch.setattr(runner, "call", call_here)
    pitfalls.main(words)
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.setting.tolist() == ["right", "label_swapped", "resume_forgets"]
    assert (table.n == 20).all()
    assert table.score.to_numpy() == pytest.approx(table.base_score, abs=1e-4), "lr 0, measured with the right label"
    first = pd.read_csv(tmp_path / "table_steps.csv").groupby(["setting", "seed"]).score_mean.first()
    assert first["label_swapped", 0] == pytest.approx(-first["right", 0], abs=1e-4)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "resuming after step 1" in (tmp_path / "runs" / "resume_forgets_seed0" / "log.txt").read_text()
    monkeypatch.setattr(runner, "call", None)
    pitfalls.main(words)
    again = capsys.readouterr().out
    assert again[again.index("| bug |") :] == printed[printed.index("| bug |") :], "nothing was left to do"


@pytest.mark.parametrize(("name", "says"), [("shift", "FAILED"), ("label_swapped", "python -m pytest tests/test_rew")])
def test_one_bug_shows_what_the_self_check_says(
    name: str, says: str, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pitfalls.main(["--bug", name, "--train", shlex.join(f"--{flag}={value}" for flag, value in flags.items())])
    out = capsys.readouterr().out
    assert says in out
    bug = find_bug(name)
    assert bug is not None
    assert bug.section in out
    assert not Path(flags["ckpt_dir"]).exists()


def test_an_unknown_bug_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"bug='shfit' is unknown: choose right, shift, "):
        pitfalls.main(["--bug", "shfit"])


def test_the_page_has_the_table_and_a_section_for_each_bug() -> None:
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    table, steps = (pd.read_csv(ROOT / "results" / f"pitfalls{end}.csv") for end in ("", "_steps"))
    assert markdown(table, steps) in page
    assert set(table.setting) == {"right", *(bug.name for bug in BUGS)}
    assert table.groupby("setting").seed.nunique().min() >= 3
    assert set(re.findall(r"^### (.*)$", page, re.M)) == {bug.name for bug in BUGS}
    for bug in BUGS:
        assert " ".join(bug.section.split()).startswith(bug.function.__doc__), bug.name
        assert ROOT.joinpath(bug.test.partition("::")[0]).is_file(), bug.name
