"""Steps, signals, full disks and resume: nothing is lost, and N steps are k steps and a resume."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import exact, run
from transformers import AutoModelForCausalLM

import ppo
import train
from model import GPT2WithValueHead
from reward import SentimentReward
from training import run_folder
from training.checkpoints import list_checkpoints, newest_intact

CASES = int(os.environ.get("FAULT_CASES", "200"))

pytestmark = pytest.mark.usefixtures("no_pictures")


STEPS = 120 if CASES <= 200 else 500


def test_memory_does_not_grow(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory at the end against that after 50 small steps: within 5 %."""
    seen: list[int] = []
    append = run_folder.RunFolder.append_metrics

    def note(self: Any, row: dict[str, Any]) -> None:
        append(self, row)
        if row["step"] in (50, STEPS):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append(pages)

    monkeypatch.setattr(run_folder.RunFolder, "append_metrics", note)
    run({**flags, "save_every": "60", "sample_every": "60", "total_steps": str(STEPS), "eval_every": "0"})
    assert seen[1] < 1.05 * seen[0]


def interrupted(flags: dict[str, str], at: int, monkeypatch: pytest.MonkeyPatch, *extra: str) -> Path:
    """A run that dies, as by a kill, right after step `at` was logged."""
    append = run_folder.RunFolder.append_metrics

    def die(self: Any, row: dict[str, Any]) -> None:
        append(self, row)
        if row["step"] == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "append_metrics", die)
        with pytest.raises(SystemExit):
            run(flags, *extra)
    return Path(flags["ckpt_dir"])


@pytest.mark.parametrize(
    ("at", "extra"),
    [
        (1, ""),
        (2, ""),
        (5, ""),
        (5, "--adaptive_kl_target 0.5"),
        (5, "--lr_schedule constant --warmup_steps 2 --top_k 9"),
        (5, "--micro_batch_size 2 --ent_coef 0.01"),
        (5, "--kl_in_loss true --adaptive_kl_target 0.5"),
        (5, "--critic own --lambda_warmup_steps 2 --reward_every 0 --gae_lambda 0.8"),
    ],
)
def test_n_steps_equal_k_steps_and_a_resume(
    at: int,
    extra: str,
    flags: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fact 18; killed before anything was saved, right where it was saved, and between two saves."""
    words = ["--total_steps", "7", "--eval_every", "3", *extra.split()]
    whole = run({**flags, "ckpt_dir": str(tmp_path / "whole")}, *words)
    broken = interrupted(flags, at, monkeypatch, *words)
    capsys.readouterr()
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    out = capsys.readouterr().out
    if at > 2:
        assert "resuming after step 4" in out
    assert exact(broken) == exact(whole)
    assert [state.name for state in list_checkpoints(broken / "state")] == ["step_000006", "step_000007"]


def signal_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int, number: int) -> None:
    """Send this process a signal just before the given call of a function of ppo.py."""
    right, calls = getattr(ppo, function), []

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return right(*args, **named)

    monkeypatch.setattr(ppo, function, interrupted)


def test_a_run_stopped_in_its_first_step_is_evaluated_once_before_training(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["--eval_every", "2"]
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}, *extra))
    with monkeypatch.context() as patch:
        signal_at(patch, "compute_gae", 1, signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            run(flags, *extra)
    assert stop.value.code == 130
    assert pd.read_csv(Path(flags["ckpt_dir"]) / "metrics.csv").step.tolist() == [1]
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(Path(flags["ckpt_dir"])) == whole


def test_a_full_disk_is_one_line_and_the_run_resumes(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every write of the run fails once, wherever it comes; afterwards the run goes on as if nothing had been."""
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}, "--total_steps", "4"))
    for owner, function in (
        (run_folder, "append_row"),
        (run_folder, "save_checkpoint"),
        (run_folder.RunFolder, "export_policy"),
        (run_folder, "plot_curves"),
    ):
        right, calls = getattr(owner, function), []

        def fail(*args: Any, right: Any = right, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return right(*args)

        target = {**flags, "ckpt_dir": str(tmp_path / function)}
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fail)
            with pytest.raises(SystemExit) as stop:
                run(target, "--total_steps", "4")
        assert stop.value.code == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ")
        assert "No space left" in message
        assert "--resume" in message
        run({"ckpt_dir": target["ckpt_dir"]}, "--resume")
        assert exact(tmp_path / function) == whole, function


def test_a_real_full_disk(flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a file system with room for one checkpoint of half a megabyte, where mounting one is allowed."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "none", small], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        with pytest.raises(SystemExit) as stop:
            run({**flags, "ckpt_dir": str(small / "run")}, "--total_steps", "40", "--save_every", "2")
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 1
        assert "cannot be written" in message
        assert "No space left" in message
        metrics = pd.read_csv(small / "run" / "metrics.csv")
        assert metrics.drop(columns=["explained_var"]).notna().all().all()
        checkpoint, problems = newest_intact(small / "run" / "state")
        assert checkpoint is not None
        assert problems == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_signal_saves_and_prints_how_to_resume(flags: dict[str, str], tmp_path: Path) -> None:
    flags |= {"save_every": "10", "sample_every": "10", "eval_every": "15"}
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}, "--total_steps", "30"))
    words = [f"--{name}={value}" for name, value in flags.items() if name != "total_steps"] + ["--total_steps=30"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums in another order have other last bits
    process = subprocess.Popen(
        [sys.executable, train.__file__, *words], stderr=subprocess.PIPE, text=True, env=one_thread
    )
    folder = Path(flags["ckpt_dir"])
    while not (folder / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"python train.py --resume {folder}" in err
    assert "Traceback" not in err
    assert len(pd.read_csv(folder / "metrics.csv")) < 30
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(folder) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("function", "call", "last"),
    [
        ("sample_responses", 2, 2),
        ("evaluate_both", 2, 2),
        ("permutation", 3, 2),
        ("permutation", 4, 2),
        ("explained_variance", 2, 2),
        ("learning_rate", 6, 3),
    ],
)
def test_a_signal_in_a_step_finishes_it_and_saves(
    number: int,
    code: int,
    function: str,
    call: int,
    last: int,
    flags: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While it samples, scores or learns; the first line says at once what is still done."""
    signal_at(monkeypatch, function, call, number)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "total_steps": "9", "save_every": "9", "eval_every": "0", "sample_every": "9"})
    assert stop.value.code == code
    first, *_, final = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stop")]
    pattern = rf"stopping: finishing step {last}, then saving \(about [\d.]+ s\); a second Ctrl-C ends at once"
    assert re.fullmatch(pattern, first)
    assert final.startswith(f"stopped after step {last} by {signal.Signals(number).name}; saved. To go on: python")
    folder = Path(flags["ckpt_dir"])
    assert pd.read_csv(folder / "metrics.csv").step.tolist() == list(range(1, last + 1))
    GPT2WithValueHead.load(folder)
    assert [checkpoint.name for checkpoint in list_checkpoints(folder / "state")] == [f"step_{last:06d}"]


def test_a_signal_before_the_first_step_saves_the_start(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the evaluation before training; no step has been measured that would say how long it takes."""
    extra = ["--eval_every", "2"]
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}, *extra))
    evaluate = train.evaluate_held_out

    def interrupted(*args: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_held_out", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(flags, *extra)
    assert stop.value.code == 130
    assert "stopping: finishing what is under way, then saving; a second Ctrl-C" in capsys.readouterr().err
    folder = Path(flags["ckpt_dir"])
    assert [checkpoint.name for checkpoint in list_checkpoints(folder / "state")] == ["step_000000"]
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(folder) == whole


@pytest.mark.parametrize(("step", "kept", "start"), [(2, [1], "from the start"), (3, [1, 2], "after step 2")])
def test_a_second_signal_stops_at_once_and_says_where_it_resumes(
    step: int,
    kept: list[int],
    start: str,
    flags: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Both come in one step, the second one in its last epoch; a checkpoint is saved after step 2."""
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        signal_at(patch, "explained_variance", step, signal.SIGINT)
        signal_at(patch, "permutation", 2 * step, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            run(flags)
    assert stop.value.code == 143
    folder = Path(flags["ckpt_dir"])
    resume = f"python train.py --resume {folder}"
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped at once; {resume} goes on {start}"
    assert pd.read_csv(folder / "metrics.csv").step.tolist() == kept, "the step under way is lost"
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(folder) == whole


def test_a_run_without_finite_steps_gives_up_and_saves_the_last_good_policy(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SentimentReward, "__call__", lambda self, texts, _: torch.full((len(texts),), float("nan")))
    monkeypatch.setattr(train, "self_check", lambda *args, **named: None)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "total_steps": "9"})
    assert stop.value.code == 1
    folder = Path(flags["ckpt_dir"])
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics.skipped.tolist() == [4, 4, 4]
    printed = capsys.readouterr()
    assert "not finite" in printed.out
    assert "3 steps in a row" in printed.err
    start, kept = (
        AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (flags["policy_name"], folder / "policy_lm")
    )
    assert all(torch.equal(start[name], kept[name]) for name in start)
