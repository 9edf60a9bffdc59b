"""Nothing is lost: N steps are k steps and a resume, bit for bit; damage is found; what would break this is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import TIMINGS, forked, run

import train
from config import TrainConfig, UserError, parse_config
from tools import run_folder
from tools.states import damage, lock, newest_good, save_state, states
from tools.torture import TortureConfig, remains, torture


def exact(folder: Path) -> dict[str, bytes]:
    """Everything that must be the same: `remains` without the states, of which another save_every keeps others."""
    return {name: data for name, data in remains(folder).items() if not name.startswith("state")}


def interrupted(flags: dict[str, str], at: int, monkeypatch: pytest.MonkeyPatch, *extra: str) -> Path:
    """A run that dies, as by a kill, right after step `at` was logged."""
    log = run_folder.RunFolder.log

    def die(self: Any, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "log", die)
        with pytest.raises(SystemExit):
            run(flags, *extra)
    return Path(flags["ckpt_dir"])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly a second each, and no part of what must be the same."""
    monkeypatch.setattr(run_folder, "plot_curves", lambda *_: None)


@pytest.mark.parametrize(
    ("at", "extra"),
    [
        (1, ""),
        (2, ""),
        (5, ""),
        (5, "--adaptive_kl_target 0.5"),
        (5, "--lr_schedule constant --warmup_steps 2 --top_k 9"),
        (5, "--micro_batch_size 2 --ent_coef 0.01"),
    ],
)
def test_n_steps_equal_k_steps_and_a_resume(
    at: int, extra: str, flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Fact 18; killed before anything was saved, right where it was saved, and between two saves."""
    words = ["--total_steps", "7", "--eval_every", "3", *extra.split()]
    whole = run({**flags, "ckpt_dir": str(tmp_path / "whole")}, *words)
    broken = interrupted(flags, at, monkeypatch, *words)
    capsys.readouterr()
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    out = capsys.readouterr().out
    if at > 2:
        assert "going on after step 4" in out
    assert exact(broken) == exact(whole)
    assert [state.name for state in states(broken / "state")] == ["step_000006", "step_000007"]


def test_resume_of_a_finished_run_can_only_make_it_longer(
    flags: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = run({**flags, "ckpt_dir": str(tmp_path / "long")}, "--total_steps", "5", "--lr_schedule", "constant",
               "--eval_every", "0", "--sample_every", "5")  # fmt: skip
    short = run(flags, "--lr_schedule", "constant", "--eval_every", "0", "--sample_every", "5")
    before = exact(short)
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert "--total_steps" in capsys.readouterr().out
    assert exact(short) == before
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps", "5")
    assert "total_steps from 3 to 5" in capsys.readouterr().out
    same = [name for name in exact(long) if "samples" not in name]  # the shorter run also sampled at its end
    assert {name: exact(short)[name] for name in same} == {name: exact(long)[name] for name in same}


def test_resume_can_name_a_run_or_a_state(flags: dict[str, str], tmp_path: Path) -> None:
    folder = run(flags, "--total_steps", "6", "--keep_last", "9")
    expected = exact(folder)
    for name in (folder, folder / "state" / "step_000002", folder / "state" / "step_000004"):
        sys.argv = ["train.py", "--resume", str(name)]
        train.run_cli(TrainConfig, train.main)
        assert exact(folder) == expected
    with pytest.raises(UserError, match="resume"):
        parse_config(TrainConfig, ["--resume", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("change", "fine"),
    [("--batch_size=4", False), ("--lr=0.5", False), ("--seed=3", False), ("--max_new_tokens=7", False),
     ("--save_every=5", True), ("--keep_last=1", True), ("--total_steps=9", True)],
)  # fmt: skip
def test_changed_settings_are_named_and_refused_where_they_break_the_promise(
    change: str,
    fine: bool,
    flags: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(flags)
    name = change.partition("=")[0].removeprefix("--")
    before = remains(Path(flags["ckpt_dir"]))
    if not fine:
        with pytest.raises(SystemExit) as stop:
            run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", change)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert name in error
        assert "--allow_changes" in error
        assert remains(Path(flags["ckpt_dir"])) == before
        change = f"{change} --allow_changes --total_steps=4"
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", *change.split())
    assert f"{name} from" in capsys.readouterr().out


def test_a_setting_that_the_run_never_knew_is_named_too(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of an earlier version, resumed by one with a new setting."""
    folder = run(flags)
    saved = json.loads((folder / "config.json").read_text())
    del saved["reward_every"]
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit) as stop:
        run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps=5")
    assert stop.value.code == 2
    assert "reward_every from None to 1" in capsys.readouterr().err


def test_a_run_without_a_good_state_is_not_thrown_away(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(flags)
    before = exact(folder)
    for harm in ("damaged", "deleted"):
        for state in states(folder / "state"):
            (state / "policy.safetensors").write_bytes(b"")
        if harm == "deleted":
            shutil.rmtree(folder / "state")
        with pytest.raises(SystemExit) as stop:
            run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps", "5")
        assert stop.value.code == 2
        assert "--overwrite" in capsys.readouterr().err
        assert exact(folder) == before


def test_a_kill_between_the_last_state_and_its_policy_is_made_good(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}))
    save, saves = run_folder.save_policy, []

    def die(*args: Any) -> None:
        saves.append(1)
        if len(saves) == 3:  # best at the end, the checkpoint of step 2, that of step 3
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_policy", die)
        with pytest.raises(SystemExit):
            run(flags, "--eval_every", "3")
    folder = Path(flags["ckpt_dir"])
    assert states(folder / "state")[-1].name == "step_000003"
    assert exact(folder) != whole
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert {k: v for k, v in exact(folder).items() if "best" not in k and "eval" not in k} == {
        k: v for k, v in whole.items() if "best" not in k and "eval" not in k
    }


def test_a_run_stopped_in_its_first_step_is_evaluated_once_before_training(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["--eval_every", "2"]
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}, *extra))
    act, calls = train.act, []

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return act(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train, "act", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(flags, *extra)
    assert stop.value.code == 130
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(Path(flags["ckpt_dir"])) == whole


def test_a_long_update_can_be_abandoned(flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and optimiser are put back as they were before it."""
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}))
    update, calls = train.ppo_update, []

    def interrupted(*args: Any) -> Any:
        done = update(*args)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(train, "ppo_update", interrupted)
        patch.setattr(train, "PATIENCE", -1.0)
        with pytest.raises(SystemExit) as stop:
            run(flags)
    assert stop.value.code == 143
    folder = Path(flags["ckpt_dir"])
    assert pd.read_csv(folder / "metrics.csv").step.tolist() == [1]
    assert states(folder / "state")[-1].name == "step_000001"
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(folder) == whole


def test_a_folder_that_another_run_used_while_this_one_was_loading_is_refused(flags: dict[str, str]) -> None:
    cfg = TrainConfig(ckpt_dir=flags["ckpt_dir"], device="cpu")
    waiting = run_folder.RunFolder(cfg)
    before = exact(run(flags))
    with pytest.raises(UserError, match="meanwhile"), waiting.open():
        pass
    assert exact(Path(flags["ckpt_dir"])) == before


def test_what_was_told_before_is_not_told_again(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder.Doctor, "_findings", lambda self, row: {"odd": "this is odd"})
    run(flags)
    assert capsys.readouterr().out.count("this is odd") == 1
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps=5")
    out = capsys.readouterr().out
    assert "going on after step 3" in out
    assert "this is odd" not in out


def test_a_reader_that_goes_away_is_no_traceback(flags: dict[str, str]) -> None:
    """python train.py | head -1"""
    words = " ".join(f"--{name}={value}" for name, value in flags.items())
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -u {train.__file__} {words} | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_best_is_never_of_a_future_that_is_taken_back(flags: dict[str, str]) -> None:
    folder = run(flags, "--eval_every", "1", "--keep_last", "9")
    best = json.loads((folder / "best" / "eval.json").read_text())
    assert best["sentiment_mean"] == pd.read_csv(folder / "eval.csv").query("step > 0").sentiment_mean.max()
    assert run_folder.best_so_far(folder / "best", 3, None) == best["sentiment_mean"]
    assert run_folder.best_so_far(folder / "best", best["step"] - 1, None) == -math.inf
    assert not (folder / "best").exists()


def test_a_restart_is_told_from_another_job_by_its_name(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "seven")
    folder = run(flags)
    assert run_folder.begun_by("seven", folder)
    assert not run_folder.begun_by("eight", folder)
    assert not run_folder.begun_by(None, folder)
    assert not run_folder.begun_by("seven", folder / "nowhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "eight")
    with pytest.raises(SystemExit) as stop:
        run(flags)
    assert stop.value.code == 2, "another job's folder is refused as ever"


def test_tables_are_never_padded(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(flags)
    metrics = folder / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    with pytest.raises(SystemExit) as stop:
        run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps", "5")
    assert stop.value.code == 2
    assert "metrics.csv" in capsys.readouterr().err
    assert b"\x00" not in metrics.read_bytes()


def test_allowing_changes_once_does_not_allow_them_for_ever(flags: dict[str, str]) -> None:
    run(flags)
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--lr", "1e-4", "--allow_changes", "--total_steps", "4")
    with pytest.raises(SystemExit) as stop:
        run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--lr", "1e-5", "--total_steps", "5")
    assert stop.value.code == 2


# ---- states


@pytest.mark.parametrize("file", ["policy.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    file: str,
    harm: str,
    flags: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run(flags, "--total_steps", "4")
    expected = exact(folder)
    path = folder / "state" / "step_000004" / file
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes({"cut": bytes(data[:-7]), "flipped": bytes(data), "empty": b""}[harm])
    if file == "state.json" and harm == "flipped":
        path.write_bytes(b"\xff" + path.read_bytes())  # one bit in its middle may still be a number
    capsys.readouterr()
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    out = capsys.readouterr().out
    assert "step_000004" in out
    assert "going on after step 2" in out
    assert exact(folder) == expected
    assert damage(folder / "state" / "step_000004") is None


def test_states_are_renamed_into_place_and_the_old_go_last(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    for step in (1, 2, 3):
        save_state(tmp_path, model, optimizer, {"step": step}, keep_last=2)
    assert [state.name for state in states(tmp_path)] == ["step_000002", "step_000003"]
    assert newest_good(tmp_path) == (tmp_path / "step_000003", [])
    assert not (tmp_path / ".partial").exists()
    assert {path.suffix for path in (tmp_path / "step_000003").iterdir()} == {".json", ".safetensors"}


# ---- faults


def test_a_full_disk_ends_in_one_line_and_the_last_good_state(
    flags: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Every write of the run fails once, wherever it comes; afterwards the run goes on as if nothing had been."""
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}, "--total_steps", "4"))
    for function in ("append_row", "save_state", "save_policy", "plot_curves"):
        right, calls = getattr(run_folder, function), []

        def fail(*args: Any, right: Any = right, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return right(*args)

        target = {**flags, "ckpt_dir": str(tmp_path / function)}
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, function, fail)
            with pytest.raises(SystemExit) as stop:
                run(target, "--total_steps", "4")
        message = str(stop.value.code)
        assert message.startswith("error: ")
        assert "No space left" in message
        assert "--resume" in message
        run({"ckpt_dir": target["ckpt_dir"]}, "--resume")
        assert exact(tmp_path / function) == whole, function


def test_a_real_full_disk(flags: dict[str, str], tmp_path: Path) -> None:
    """On a file system of half a megabyte, where mounting one is allowed."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", small], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        with pytest.raises(SystemExit) as stop:
            run({**flags, "ckpt_dir": str(small / "run")}, "--total_steps", "40", "--save_every", "2")
        assert "No space left" in str(stop.value.code) or "cannot be written" in str(stop.value.code)
        found = pd.read_csv(small / "run" / "metrics.csv") if (small / "run" / "metrics.csv").exists() else None
        assert found is None or found.notna().drop(columns=["explained_var"]).all().all()
        good, _ = newest_good(small / "run" / "state")
        assert good is None or damage(good) is None
    finally:
        subprocess.run(["umount", small], check=True)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom pathlib import Path\nfrom tools.states import lock\n"
         f"with lock(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)"],
        stdout=subprocess.PIPE, cwd=Path(train.__file__).parent,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"), lock(tmp_path):
        pass
    holder.kill()  # which leaves the file behind
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM])  # SIGINT: tests/test_train.py
def test_a_signal_stops_soon_saves_and_says_how_to_resume(
    number: signal.Signals,
    flags: dict[str, str],
    tmp_path: Path,
) -> None:
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
    begun = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 128 + number
    assert f"python train.py --resume {folder}" in err
    assert "Traceback" not in err
    assert len(pd.read_csv(folder / "metrics.csv")) < 30
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert exact(folder) == whole


class Forked:
    """What the torture wants of a process, without loading torch anew each time."""

    def __init__(self, flags: list[str], folder: Path) -> None:
        settings = dict(flag.removeprefix("--").split("=") for flag in flags)
        self.process = forked(partial(run, {**settings, "ckpt_dir": str(folder)}, "--resume"), Path(os.devnull))

    def wait(self, patience: float | None = None) -> int:
        self.process.join(patience)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("train.py", patience or 0)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.torture.start", Forked)
    forked(int, Path(os.devnull)).join()  # the first waits for imports
    runs, _, lost = torture(TortureConfig(kills=4, steps=6), tmp_path)
    assert runs >= 1
    assert lost == []


def test_torture_notices_a_difference(tmp_path: Path, flags: dict[str, str]) -> None:
    """The harness itself: one changed bit, one lost row, and it would have told."""
    folder = run(flags)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert remains(copy) == remains(folder)
    table = pd.read_csv(copy / "metrics.csv")
    table.assign(**dict.fromkeys(TIMINGS, 1.0)).to_csv(copy / "metrics.csv", index=False)
    assert json.dumps(sorted(remains(copy))) == json.dumps(sorted(remains(folder)))
    table.iloc[:-1].to_csv(copy / "metrics.csv", index=False)
    assert remains(copy) != remains(folder)
