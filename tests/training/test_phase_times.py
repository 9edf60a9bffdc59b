"""Where the time of a run goes: the phases are what they took, and with the rest they are all of it."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import run

import ppo
import train
from training.phase_times import PHASES, PhaseTimes
from training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_pictures")


COLUMNS = ("generate", "score", "update")


def shares_of(line: str) -> dict[str, int]:
    """Phase -> percent."""
    return {phase: int(share) for phase, share in re.findall(r"([a-z][a-z ]*?) (-?\d+) %", line.split(": ", 1)[1])}


def at(clock: list[float]) -> Any:
    """A clock that stands still until its one entry is changed."""
    return lambda: clock[0]


@pytest.mark.parametrize(
    "seconds",
    [
        {"sampling": 10.0, "scoring": 20.0, "updating": 30.0, "evaluating": 20.0, "saving": 10.0, "the rest": 10.0},
        {"sampling": 1 / 3, "scoring": 1 / 3, "updating": 1 / 3, "evaluating": 0.0, "saving": 0.0, "the rest": 0.0},
        {"sampling": 7e4, "scoring": 1.7, "updating": 333.3, "evaluating": 0.1, "saving": 2.5, "the rest": 0.4},
        {"sampling": 0.5, "scoring": 0.5, "updating": 0.5, "evaluating": 0.5, "saving": 0.5, "the rest": 97.5},
    ],
)
def test_shares_are_those_of_the_clock_and_add_up_to_100(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "perf_counter", at(clock))
    times = PhaseTimes()
    of_step = {f"seconds_{column}": seconds[phase] for column, phase in zip(COLUMNS, PHASES, strict=False)}
    times.add_step(of_step)
    clock[0] += sum(of_step.values())
    for phase in ("evaluating", "saving"):
        with times.measured(phase):
            clock[0] += seconds[phase]
    clock[0] += seconds["the rest"]
    total = sum(seconds.values())
    shares = shares_of(times.line(1))
    assert list(shares) == [*PHASES, "the rest"]
    assert sum(shares.values()) == 100
    for phase, share in shares.items():
        assert abs(share - 100 * seconds[phase] / total) <= 1


def test_a_phase_that_fails_counts_and_hours_are_written_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", at(clock))
    times = PhaseTimes()

    def fail() -> None:
        clock[0] += 9000
        raise OSError(28, "No space left")

    with pytest.raises(OSError, match="space"), times.measured("saving"):
        fail()
    assert times.line(8) == (
        "training from step 8 on took 2:30:00: sampling 0 %, scoring 0 %, updating 0 %, evaluating 0 %, saving 100 %, "
        "the rest 0 %"
    )


def test_a_run_and_its_resume_say_where_their_own_time_went(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock that adds an hour to each update, evaluation and saving, and to samples, which are the rest."""
    added = [0.0]
    now = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + added[0])

    def slow(owner: Any, name: str) -> None:
        right = getattr(owner, name)

        def function(*args: Any) -> Any:
            added[0] += 3600
            return right(*args)

        monkeypatch.setattr(owner, name, function)

    slow(ppo, "estimate_advantages")
    slow(train, "evaluate_held_out")
    slow(RunFolder, "save")
    slow(train, "sample_rows")
    hours = {"sampling": 0, "scoring": 0, "updating": 4, "evaluating": 3, "saving": 2, "the rest": 1}
    folder = run(flags, "--total_steps=4", "--eval_every=3", "--save_every=3", "--sample_every=4")
    (line,) = re.findall(r"^training .*", capsys.readouterr().out, re.MULTILINE)
    assert line.startswith("training took 10:00:")
    assert shares_of(line) == pytest.approx({phase: 10 * number for phase, number in hours.items()}, abs=1)

    shutil.rmtree(folder / "state" / "step_000004")
    run({"ckpt_dir": str(folder)}, "--resume")
    (line,) = re.findall(r"^training .*", capsys.readouterr().out, re.MULTILINE)
    assert line.startswith("training from step 4 on took 4:00:")
    hours |= {"updating": 1, "evaluating": 1, "saving": 1}
    assert shares_of(line) == pytest.approx({phase: 25 * number for phase, number in hours.items()}, abs=1)
