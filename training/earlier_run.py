"""What an earlier run left in the folder: whether a new one may start there, and whether it can be resumed.

A resumed run must be the same run: changed settings, data, models or code are refused unless the user allows them.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config import TRACKERS, TrainConfig, UserError

from reward import ScoreScale
from runtime.saved_run import SavedRun
from training.checkpoints import counters_of, find_corruption, list_checkpoints, newest_intact, step_of
from training.reporting import tracker_module

TABLES = ("metrics.csv", "eval.csv", "samples.csv")  # they grow, and are cut back on resume
EXPORTS = ("policy_lm", "value_head.safetensors")  # replaced whenever a checkpoint is saved
OWN_FILES = ("config.json", *TABLES, "curves.png", *EXPORTS, "best", "state", *TRACKERS)
EXPORTED = "exported"  # a file in the checkpoint whose policy is the one in policy_lm
SILENT = {"preset", "ckpt_dir", "resume", "allow_changes", "overwrite", "check"}  # may change without a note
HARMLESS = {"total_steps", "save_every", "keep_last", "report_to", "kl_budget"}  # may change, with a note


@dataclass(frozen=True)
class EarlierRun:
    """What an earlier run left in the folder: its files, and, to resume, a checkpoint and the scale of its scores."""

    contents: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    score_scale: ScoreScale | None = None
    finished: bool = False


def inspect_run_folder(cfg: TrainConfig) -> EarlierRun:
    """Refuse a folder that cannot be written or already holds a run; find the checkpoint to resume from."""
    for tracker in cfg.trackers:
        tracker_module(tracker)
    if cfg.check:
        return EarlierRun()
    path = Path(cfg.ckpt_dir)
    try:
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
        present = contents(path)
    except OSError as error:
        raise UserError(f"ckpt_dir={path} cannot be used ({error.strerror}): choose another folder") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"ckpt_dir={path} cannot be written: choose another folder")
    if present and not cfg.overwrite and not cfg.resume:
        raise UserError(
            f"ckpt_dir={path} already holds {present[0]}: choose another folder, go on with that run with "
            "--resume, or replace it with --overwrite"
        )
    if present and not SavedRun(path).exists:
        raise UserError(f"ckpt_dir={path} holds {present[0]}, but not from a run: choose another folder")
    for name in (cfg.policy_name, cfg.ref_name, cfg.rm_name, cfg.dataset):
        if name and Path(name).exists() and path.resolve() in Path(name).resolve().parents:
            raise UserError(f"ckpt_dir={path} holds {name}, which this run needs: choose another folder")
    if not cfg.resume:
        return EarlierRun(present)
    checkpoint = find_checkpoint(cfg)
    check_same_settings(cfg)
    if checkpoint is None:
        return EarlierRun(present)
    counters = counters_of(checkpoint)
    score_scale = ScoreScale(**counters["score_scale"]) if "score_scale" in counters else None
    return EarlierRun(present, checkpoint, score_scale, is_finished(cfg, checkpoint))


def contents(path: Path) -> list[str]:
    """What of a run is in a folder: files and checkpoints, by name."""
    files = [name for name in OWN_FILES if (path / name).exists()]
    return files + [checkpoint.name for checkpoint in list_checkpoints(path / "state")]


def find_checkpoint(cfg: TrainConfig) -> Path | None:
    """The checkpoint that --resume names, else the newest intact one; None to start anew."""
    named = Path(str(cfg.resume))
    if (named / "state.json").is_file():
        if problem := find_corruption(named):
            raise UserError(f"resume={named} is damaged ({problem}): choose another, or --resume alone")
        return named
    path = Path(cfg.ckpt_dir)
    checkpoint, problems = newest_intact(path / "state")
    if checkpoint is None and (problems or (path / "policy_lm").exists()):
        problem = problems[0] if problems else f"{path / 'state'} holds none"
        raise UserError(
            f"ckpt_dir={path} has no intact checkpoint to resume from ({problem}): its policy_lm is still whole; "
            "start anew in another folder, or with --overwrite"
        )
    for problem in problems:
        print(f"note: {problem}; the checkpoint before it is used")
    return checkpoint


def check_same_settings(cfg: TrainConfig) -> None:
    """Refuse changed settings that would change the result, unless they are allowed; note the others."""
    saved = SavedRun(Path(cfg.ckpt_dir)).settings
    settings = asdict(cfg)
    changed = [name for name in settings if saved and name not in SILENT and saved.get(name) != settings[name]]
    changes = ", ".join(f"{name} from {saved.get(name)} to {settings[name]}" for name in changed)
    if not HARMLESS.issuperset(changed) and not cfg.allow_changes:
        raise UserError(
            f"--resume with changed settings would give another result ({changes}): leave them out, or say "
            "--allow_changes"
        )
    if changed:
        print(f"note: resuming with changed settings: {changes}")
    if "total_steps" in changed and cfg.lr_schedule == "linear":
        print("note: the step size falls to 0 at the new last step, so it jumps where the run resumes")


def is_finished(cfg: TrainConfig, checkpoint: Path) -> bool:
    """Whether a checkpoint is the newest and that of the last step, and its policy is in policy_lm."""
    is_newest = checkpoint in list_checkpoints(Path(cfg.ckpt_dir) / "state")[-1:]
    finished = is_newest and step_of(checkpoint) >= cfg.total_steps and (checkpoint / EXPORTED).exists()
    if finished:
        print(f"{cfg.ckpt_dir}/ is finished: raise --total_steps to go on")
    return finished


def check_same_inputs(saved: SavedRun, record: dict[str, Any]) -> None:
    """Refuse data, models or code that have changed under their names since the run began.

    record is what a start now would write into config.json. A run of an older version has no fingerprints, and then
    nothing is compared.
    """
    if (method := saved.record.get("method")) != record.get("method"):
        raise UserError(
            f"resume: the run was started by experiments.rivals as {method}: resume it with python -m "
            f"experiments.rivals {method}, or say --allow_changes"
        )
    for name, commit in saved.record.get("hub_commits", {}).items():
        if commit and commit != record["hub_commits"][name] and saved.record[name] == record[name]:
            raise UserError(
                f"{name}={record[name]} has changed on the hub since the run began (commit {commit}): name that "
                "commit as its revision, or say --allow_changes"
            )
    details = {
        "tokenizer": " (its tokenizer)",
        "ref_name": " (its weights or its config)",
        "columns": " (a column that the reward is given)",
    }
    owners = {"tokenizer": "policy_name", "columns": "dataset"}
    for name, fingerprint in record["fingerprints"].items():
        if saved.fingerprints.get(name) not in (None, "", fingerprint):
            setting = owners.get(name, name)
            raise UserError(
                f"{setting}={record[setting]} has changed since the run began{details.get(name, '')}, which would give "
                "another result: restore it, or say --allow_changes"
            )


def was_started_by(job: str | None, path: Path) -> bool:
    """Whether this very call of torchrun started the run in a folder."""
    try:
        return job is not None and SavedRun(path).record.get("job") == job
    except UserError:
        return False
