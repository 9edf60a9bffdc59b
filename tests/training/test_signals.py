"""Who may ask a run to stop: every signal that ends a session or an allocation, and nothing that was told not to."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from config import TrainConfig

import pandas as pd
import pytest
from conftest import as_processes, exact, forked, run, run_script

import ppo
import train
from model import GPT2WithValueHead
from runtime.cli import Stopped, parse_config
from training.checkpoints import list_checkpoints
from training.signals import StopRequest, stop_signals

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def warnings_as_usual() -> Iterator[None]:
    """Also where the tests themselves run under nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_schedulers_warning_save(
    number: signal.Signals,
    flags: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sent twice, as a shell repeats it: the second step is finished, and resuming gives what was to be."""
    flags |= {"total_steps": "3", "save_every": "3", "eval_every": "0", "sample_every": "3"}
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}))
    right, calls = ppo.permutation, []

    def sending(*args: int) -> object:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return right(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "permutation", sending)
        with pytest.raises(SystemExit) as stop:
            run(flags)
    assert stop.value.code == 128 + number
    assert f"stopped after step 2 by {number.name}; saved" in capsys.readouterr().err
    folder = Path(flags["ckpt_dir"])
    GPT2WithValueHead.load(folder)
    assert [checkpoint.name for checkpoint in list_checkpoints(folder / "state")] == ["step_000002"]
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(folder) == whole


def at_terminal(terminal: str, words: list[str]) -> None:
    """Train in a session of its own, whose terminal this is."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    handle = os.open(terminal, os.O_RDWR)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(handle), "w", buffering=1) for _ in range(2))
    os.close(handle)
    sys.argv = ["train.py", *words]
    run_script(TrainConfig, train.main)


def test_a_run_whose_terminal_is_gone_is_saved_though_nothing_can_be_printed(
    flags: dict[str, str], tmp_path: Path
) -> None:
    main, terminal = os.openpty()
    os.set_blocking(main, False)
    words = [f"--{name}={value}" for name, value in {**flags, "total_steps": "300", "eval_every": "0"}.items()]
    process = forked(partial(at_terminal, os.ttyname(terminal), words), tmp_path / "said.txt")
    while not (Path(flags["ckpt_dir"]) / "metrics.csv").exists():
        assert process.is_alive()
        with suppress(BlockingIOError):
            os.read(main, 65536)  # a terminal that nobody reads would fill up and hold the run
        time.sleep(0.05)
    os.close(terminal)
    os.close(main)  # as when ssh dies
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP
    folder = Path(flags["ckpt_dir"])
    last = pd.read_csv(folder / "metrics.csv").step.iloc[-1]
    assert [checkpoint.name for checkpoint in list_checkpoints(folder / "state")][-1] == f"step_{last:06d}"
    GPT2WithValueHead.load(folder)


def request() -> StopRequest:
    return StopRequest(lambda: "saving", lambda: "the checkpoint stays")


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = request()
    with stop_signals(stop):
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_only_ctrl_c_or_sigterm_after_another_of_them_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for first, second, at_once in (
        (signal.SIGINT, signal.SIGTERM, True),
        (signal.SIGTERM, signal.SIGTERM, True),
        (signal.SIGHUP, signal.SIGHUP, False),
        (signal.SIGUSR1, signal.SIGTERM, False),
        (signal.SIGTERM, signal.SIGHUP, False),
    ):
        stop = request()
        stop.receive(first, None)
        line = capsys.readouterr().err
        assert line.startswith("stopping: saving")
        assert ("Ctrl-C" in line) == (first in (signal.SIGINT, signal.SIGTERM)), "a second one would not end it"
        if at_once:
            with pytest.raises(Stopped, match="stopped at once; the checkpoint stays") as caught:
                stop.receive(second, None)
            assert caught.value.code == 128 + second
        else:
            stop.receive(second, None)
            assert stop.on_any_rank()


def run_that_is_stopped_on_rank_1(flags: dict[str, str]) -> None:
    """The last rank alone gets SIGTERM in the second step, twice, as torchrun repeats it."""
    right, calls = ppo.permutation, []

    def sending(*args: int) -> object:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return right(*args)

    ppo.permutation = sending
    run(flags)


def test_all_ranks_stop_after_the_same_step(flags: dict[str, str], tmp_path: Path) -> None:
    flags |= {"total_steps": "9", "save_every": "9", "eval_every": "0", "sample_every": "9"}
    said = tmp_path / "said.txt"
    assert as_processes(2, partial(run_that_is_stopped_on_rank_1, flags), said) == [143, 143], said.read_text()
    folder = Path(flags["ckpt_dir"])
    assert pd.read_csv(folder / "metrics.csv").step.tolist() == [1, 2]
    assert [checkpoint.name for checkpoint in list_checkpoints(folder / "state")] == ["step_000002"]
    assert said.read_text().count("stopped after step 2 by SIGTERM; saved") == 1


def test_the_handlers_of_the_program_come_back() -> None:
    def own(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGUSR1, own)
    with stop_signals(request()):
        assert signal.getsignal(signal.SIGUSR1) is not own
    assert signal.getsignal(signal.SIGUSR1) is own
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_run_in_a_thread_has_no_handlers_and_trains(flags: dict[str, str]) -> None:
    """As in a server or an agent of a tracker."""
    before = signal.getsignal(signal.SIGINT)
    cfg = parse_config(TrainConfig, [f"--{name}={value}" for name, value in flags.items()])
    thread = threading.Thread(target=train.main, args=(cfg,))
    thread.start()
    thread.join()
    assert len(pd.read_csv(Path(flags["ckpt_dir"]) / "metrics.csv")) == int(flags["total_steps"])
    assert signal.getsignal(signal.SIGINT) is before
