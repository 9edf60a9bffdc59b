"""Nothing is lost: N steps are k steps and a resume, bit for bit; damage is found; what would break this is refused."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from config import TrainConfig, UserError

import pandas as pd
import pytest
import torch
from conftest import exact, run, run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from experiments.torture import remains
from runtime.cli import parse_config
from training import earlier_run, run_folder, run_record
from training.checkpoints import list_checkpoints
from training.earlier_run import inspect_run_folder
from training.run_folder import RunFolder, open_run_folder

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_resume_of_a_finished_run_can_only_make_it_longer(
    flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = run(
        {**flags, "ckpt_dir": str(tmp_path / "long")},
        "--total_steps",
        "5",
        "--lr_schedule",
        "constant",
        "--eval_every",
        "0",
        "--sample_every",
        "5",
    )
    short = run(flags, "--lr_schedule", "constant", "--eval_every", "0", "--sample_every", "5")
    before = exact(short)
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert "--total_steps" in capsys.readouterr().out
    assert exact(short) == before
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps", "5")
    assert "total_steps from 3 to 5" in capsys.readouterr().out
    same = [name for name in exact(long) if "samples" not in name]  # the shorter run also sampled at its end
    assert {name: exact(short)[name] for name in same} == {name: exact(long)[name] for name in same}


def test_resume_can_name_a_run_or_a_checkpoint(flags: dict[str, str], tmp_path: Path) -> None:
    folder = run(flags, "--total_steps", "6", "--keep_last", "9")
    expected = exact(folder)
    for name in (folder, folder / "state" / "step_000002", folder / "state" / "step_000004"):
        sys.argv = ["train.py", "--resume", str(name)]
        run_script(TrainConfig, train.main)
        assert exact(folder) == expected
    with pytest.raises(UserError, match="resume"):
        parse_config(TrainConfig, ["--resume", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ("--batch_size=4", False),
        ("--lr=0.5", False),
        ("--seed=3", False),
        ("--max_new_tokens=7", False),
        ("--save_every=5", True),
        ("--keep_last=1", True),
        ("--total_steps=9", True),
    ],
)
def test_changed_settings_are_named_and_refused_where_they_change_the_result(
    change: str, fine: bool, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
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


def test_a_setting_newer_than_the_run_is_named(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A run of an earlier version, resumed by one with a new setting."""
    folder = run(flags)
    saved = json.loads((folder / "config.json").read_text())
    del saved["reward_every"]
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit) as stop:
        run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps=5")
    assert stop.value.code == 2
    assert "reward_every from None to 1" in capsys.readouterr().err


def test_resume_without_an_intact_checkpoint_changes_nothing(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(flags)
    before = exact(folder)
    for harm in ("damaged", "deleted"):
        for state in list_checkpoints(folder / "state"):
            (state / "policy.safetensors").write_bytes(b"")
        if harm == "deleted":
            shutil.rmtree(folder / "state")
        with pytest.raises(SystemExit) as stop:
            run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps", "5")
        assert stop.value.code == 2
        assert "--overwrite" in capsys.readouterr().err
        assert exact(folder) == before


def test_resume_after_a_kill_between_checkpoint_and_policy(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exact(run({**flags, "ckpt_dir": str(tmp_path / "whole")}))
    save, saves = RunFolder.export_policy, []

    def die(folder: RunFolder) -> Path:
        saves.append(1)
        if len(saves) == 3:  # best at the end, the checkpoint of step 2, that of step 3
            raise KeyboardInterrupt
        return save(folder)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "export_policy", die)
        with pytest.raises(SystemExit):
            run(flags, "--eval_every", "3")
    folder = Path(flags["ckpt_dir"])
    assert list_checkpoints(folder / "state")[-1].name == "step_000003"
    assert exact(folder) != whole
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert {k: v for k, v in exact(folder).items() if "best" not in k and "eval" not in k} == {
        k: v for k, v in whole.items() if "best" not in k and "eval" not in k
    }


def test_a_folder_that_another_run_used_while_this_one_was_loading_is_refused(flags: dict[str, str]) -> None:
    cfg = TrainConfig(ckpt_dir=flags["ckpt_dir"], device="cpu")
    earlier = inspect_run_folder(cfg)
    before = exact(run(flags))
    with pytest.raises(UserError, match="meanwhile"), open_run_folder(cfg, None, None, earlier):  # type: ignore[arg-type]
        pass
    assert exact(Path(flags["ckpt_dir"])) == before


def test_a_warning_is_not_repeated_after_a_resume(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    warning = "the score is paid on the last token"
    run(flags, "--reward_every=0", "--gae_lambda=0.5")
    assert capsys.readouterr().out.count(warning) == 1
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--total_steps=5")
    out = capsys.readouterr().out
    assert "resuming after step 3" in out
    assert warning not in out


def test_best_of_a_later_step_is_removed_on_resume(flags: dict[str, str]) -> None:
    folder = run(flags, "--eval_every", "1", "--keep_last", "9")
    best = json.loads((folder / "best" / "eval.json").read_text())
    assert best["score_mean"] == pd.read_csv(folder / "eval.csv").query("step > 0").score_mean.max()
    assert run_folder.best_so_far(folder / "best", 3, None) == best["score_mean"]
    assert run_folder.best_so_far(folder / "best", best["step"] - 1, None) == -math.inf
    assert not (folder / "best").exists()


def test_a_restart_by_torchrun_is_recognised_by_its_job(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "seven")
    folder = run(flags)
    assert earlier_run.was_started_by("seven", folder)
    assert not earlier_run.was_started_by("eight", folder)
    assert not earlier_run.was_started_by(None, folder)
    assert not earlier_run.was_started_by("seven", folder / "nowhere")
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


def test_allow_changes_holds_for_one_start_only(flags: dict[str, str]) -> None:
    run(flags)
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--lr", "1e-4", "--allow_changes", "--total_steps", "4")
    with pytest.raises(SystemExit) as stop:
        run({"ckpt_dir": flags["ckpt_dir"]}, "--resume", "--lr", "1e-5", "--total_steps", "5")
    assert stop.value.code == 2


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_best_is_the_highest_sentiment_within_the_kl_budget(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentiment rises at every evaluation; the last is beyond the budget."""
    weights = []
    save, evaluate = RunFolder.export_policy, train.evaluate_held_out

    def note(folder: RunFolder) -> Path:
        fresh = save(folder)
        weights.append(load_file(fresh / "policy_lm" / "model.safetensors"))
        return fresh

    monkeypatch.setattr(RunFolder, "export_policy", note)
    scores, kls = iter([0.5, 0.1, 0.2, 0.9]), iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(
        train,
        "evaluate_held_out",
        lambda *args: {**evaluate(*args), "score_mean": next(scores), "kl_seq_exact": next(kls)},
    )
    folder = run(flags, "--eval_every", "1", "--kl_budget", "2.5")
    best = load_file(folder / "best" / "policy_lm" / "model.safetensors")
    final = load_file(folder / "policy_lm" / "model.safetensors")
    assert any(not torch.equal(best[name], final[name]) for name in best)
    assert all(torch.equal(best[name], weights[-2 if len(weights) > 3 else 1][name]) for name in best)
    assert AutoModelForCausalLM.from_pretrained(folder / "best" / "policy_lm")


def test_a_folder_with_a_run_is_refused_without_overwrite(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(flags)
    (folder / "notes.txt").write_text("mine")
    before = files_in(folder)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "seed": "5"})
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files_in(folder) == before
    run({**flags, "seed": "5"}, "--overwrite")
    after = files_in(folder)
    assert len(pd.read_csv(folder / "metrics.csv")) == 3
    assert after["metrics.csv"] != before["metrics.csv"]
    assert after["notes.txt"] == b"mine"


def test_files_that_are_not_from_a_run_are_left_alone(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(flags["ckpt_dir"])
    folder.mkdir()
    (folder / "metrics.csv").write_text("mine")
    for extra, words in (((), "metrics.csv"), (("--overwrite",), "not from a run")):
        with pytest.raises(SystemExit) as stop:
            run(flags, *extra)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert (folder / "metrics.csv").read_text() == "mine"


def test_overwrite_spares_the_policy_that_the_run_starts_from(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run({**flags, "total_steps": "1"})
    before = files_in(folder)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "policy_name": str(folder / "policy_lm")}, "--overwrite")
    assert stop.value.code == 2
    assert "which this run needs" in capsys.readouterr().err
    assert files_in(folder) == before


def test_a_hub_name_is_not_taken_for_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inspect_run_folder(TrainConfig(ckpt_dir=str(tmp_path), policy_name="gpt2"))
    (tmp_path / "here" / "gpt2").mkdir()
    with pytest.raises(UserError, match="holds gpt2, which this run needs"):
        inspect_run_folder(TrainConfig(ckpt_dir=str(tmp_path), policy_name="gpt2"))


@pytest.fixture
def no_commit_yet() -> Iterator[None]:
    """The commit is read once in a process; here it is read anew, and again afterwards."""
    run_record.git_commit.cache_clear()
    yield
    run_record.git_commit.cache_clear()


@pytest.mark.usefixtures("no_commit_yet")
def test_train_needs_no_git(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    folder = run({**flags, "total_steps": "1"})
    assert json.loads((folder / "config.json").read_text())["git_commit"] is None


@pytest.mark.usefixtures("no_commit_yet")
@pytest.mark.skipif(os.name == "nt", reason="a script of the shell")
def test_train_does_not_wait_for_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexec sleep 60\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(run_record, "GIT_SECONDS", 0.2)
    begun = time.monotonic()
    assert run_record.git_commit() is None
    assert time.monotonic() - begun < 30


def test_a_hub_name_with_another_commit_is_refused_on_resume(
    flags: dict[str, str],
    gpt2_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "hub" / "models--someone--gpt2"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(gpt2_dir, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "hub"))
    run({**flags, "policy_name": "someone/gpt2", "total_steps": "1"})
    (cache / "refs" / "main").write_text("b" * 40)
    more = {"ckpt_dir": flags["ckpt_dir"], "total_steps": "2"}
    with pytest.raises(SystemExit) as stop:
        run(more, "--resume")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "policy_name=someone/gpt2" in error
    assert "a" * 40 in error
    run(more, "--resume", "--allow_changes")


# --- what a run is made of, changed under its name ------------------------------------------------------------------


def change_dataset(flags: dict[str, str]) -> None:
    file = Path(flags["dataset"])
    file.write_text(file.read_text().replace("rare", "raw", 1))


def change_weights(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_policy(flags: dict[str, str]) -> None:
    change_weights(Path(flags["policy_name"]), "transformer.wte.weight")


def change_reward(flags: dict[str, str]) -> None:
    change_weights(Path(flags["rm_name"]), "classifier.bias")


def change_config(flags: dict[str, str], setting: str, **changes: object) -> None:
    file = Path(flags[setting]) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def swap_labels(flags: dict[str, str]) -> None:
    change_config(flags, "rm_name", id2label={0: "positive", 1: "negative"}, label2id={"positive": 0, "negative": 1})


def change_architecture(flags: dict[str, str]) -> None:
    change_config(flags, "policy_name", layer_norm_epsilon=1.0)


def change_tokenizer(flags: dict[str, str]) -> None:
    file = Path(flags["policy_name"]) / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(rules))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_dataset, "dataset=DATASET has changed since the run began"),
        (change_policy, "ref_name=POLICY_NAME has changed since the run began (its weights or its config)"),
        (change_architecture, "ref_name=POLICY_NAME has changed since the run began (its weights or its config)"),
        (change_reward, "rm_name=RM_NAME has changed since the run began"),
        (swap_labels, "rm_name=RM_NAME has changed since the run began"),
        (change_tokenizer, "policy_name=POLICY_NAME has changed since the run began (its tokenizer)"),
    ],
)
def test_what_has_changed_under_its_name_is_named_on_resume(
    change: Callable[[dict[str, str]], None],
    named: str,
    flags: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags |= {"eval_every": "0"}
    for name in ("policy_name", "rm_name"):
        flags[name] = shutil.copytree(flags[name], tmp_path / name).__fspath__()
    flags["dataset"] = shutil.copy(flags["dataset"], tmp_path / "reviews.jsonl").__fspath__()
    folder = run({**flags, "total_steps": "1"})
    resume = {"ckpt_dir": str(folder), "total_steps": "2"}
    before = exact(folder)
    change(flags)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(resume, "--resume")
    assert stop.value.code == 2
    for name in ("dataset", "policy_name", "rm_name"):
        named = named.replace(name.upper(), flags[name])
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert exact(folder) == before
    run(resume, "--resume", "--allow_changes")
    assert len(pd.read_csv(folder / "metrics.csv")) == 2


def test_a_run_of_a_version_without_fingerprints_resumes(flags: dict[str, str]) -> None:
    flags |= {"eval_every": "0"}
    folder = run({**flags, "total_steps": "1"})
    saved = json.loads((folder / "config.json").read_text())
    del saved["fingerprints"]
    (folder / "config.json").write_text(json.dumps(saved))
    run({"ckpt_dir": str(folder), "total_steps": "2"}, "--resume")
    assert "fingerprints" in json.loads((folder / "config.json").read_text())


def test_a_run_that_is_replaced_takes_its_evaluation_along(flags: dict[str, str]) -> None:
    flags |= {"eval_every": "0", "total_steps": "1"}
    folder = Path(flags["ckpt_dir"])
    folder.mkdir()
    names = ("eval_results.csv", "eval_summary.json", "eval_report.html", "best_eval_summary.json")
    for name in (*names, "my_notes.csv"):
        (folder / name).write_text("x")
    run(flags)
    assert all((folder / name).exists() for name in names), "they are of no run that is replaced"
    run(flags, "--overwrite")
    assert not any((folder / name).exists() for name in names)
    assert (folder / "my_notes.csv").exists()
