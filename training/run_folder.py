"""The run folder: everything that a run leaves behind, and from which it resumes. The main process alone has one.

A file or folder is written under a temporary name, flushed to disk and renamed; tables grow by whole rows.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, python_reward

import pandas as pd
from torch.optim import Optimizer
from tqdm import tqdm

from ppo import Models
from reward import Classifier, Reward, ScoreScale, score_title
from runtime.device import device_name
from runtime.distributed import torchrun_job
from runtime.files import append_row, fsync, lock, move_into_place, remove, truncate, write_atomic
from runtime.fingerprints import model_sha256, texts_sha256, tokenizer_sha256
from runtime.hub import resolved_commit
from runtime.saved_run import SavedRun
from training.card import write_card
from training.checkpoints import (
    find_corruption,
    list_checkpoints,
    load_checkpoint,
    newest_intact,
    save_checkpoint,
    step_of,
)
from training.diagnostics import Diagnostics
from training.parts import Parts
from training.plots import plot_curves
from training.reporting import Trackers, require_trackers

OWN_FILES = (
    "config.json",
    "metrics.csv",
    "eval.csv",
    "samples.csv",
    "curves.png",
    "policy_lm",
    "value_head.safetensors",
    "best",
    "state",
    "tensorboard",
    "wandb",
)
EVALUATIONS = [  # what eval.py writes into a run folder, of its policy_lm and of its best/
    f"{policy}eval_{ending}" for policy in ("", "best_") for ending in ("results.csv", "summary.json", "report.html")
]
EXPORTED = "exported"  # a file in the checkpoint whose policy is the one in policy_lm
TABLES = ("metrics.csv", "eval.csv", "samples.csv")  # they grow, and are cut back on resume
SILENT = {"preset", "ckpt_dir", "resume", "allow_changes", "overwrite", "check"}  # may change without a note
CHANGED_INPUTS = {  # of a fingerprint: the setting that names what was taken, and what of it has changed
    "dataset": ("dataset", ""),
    "tokenizer": ("policy_name", " (its tokenizer)"),
    "ref_name": ("ref_name", " (its weights or its config)"),
    "rm_name": ("rm_name", ""),
}
HARMLESS = {"total_steps", "save_every", "keep_last", "report_to", "kl_budget"}  # may change, with a note


# --- before a start -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What an earlier run left in the folder: its files, and, to resume, a checkpoint and the scale of its scores."""

    contents: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    score_scale: ScoreScale | None = None
    finished: bool = False


def inspect_run_folder(cfg: TrainConfig) -> Found:
    """Refuse a folder that cannot be written or already holds a run; find the checkpoint to resume from (UserError)."""
    require_trackers(cfg.trackers)
    if cfg.check:
        return Found()
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
        return Found(present)
    checkpoint = find_checkpoint(cfg)
    check_same_settings(cfg)
    return Found(present, checkpoint, saved_scale(checkpoint), is_finished(cfg, checkpoint))


def contents(path: Path) -> list[str]:
    """What of a run is in a folder: files and checkpoints, by name."""
    found = [name for name in OWN_FILES if (path / name).exists()]
    return found + [checkpoint.name for checkpoint in list_checkpoints(path / "state")]


def find_checkpoint(cfg: TrainConfig) -> Path | None:
    """The checkpoint that --resume names, else the newest intact one; None to start anew (raises UserError)."""
    path, named = Path(cfg.ckpt_dir), Path(str(cfg.resume))
    if (named / "state.json").is_file():
        if problem := find_corruption(named):
            raise UserError(f"resume={named} is damaged ({problem}): choose another, or --resume alone")
        return named
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
    """Refuse changed settings that would change the result, unless allowed (raises UserError); note the others."""
    saved = SavedRun(Path(cfg.ckpt_dir)).settings
    changed = {name: (saved.get(name), new) for name, new in asdict(cfg).items() if saved and saved.get(name) != new}
    listed = ", ".join(f"{name} from {old} to {new}" for name, (old, new) in changed.items() if name not in SILENT)
    if changed.keys() - HARMLESS - SILENT and not cfg.allow_changes:
        raise UserError(
            f"--resume with changed settings would give another result ({listed}): leave them out, or "
            "say --allow_changes"
        )
    if listed:
        print(f"note: resuming with changed settings: {listed}")
    if "total_steps" in changed and cfg.lr_schedule == "linear":
        print("note: the step size falls to 0 at the new last step, so it jumps where the run resumes")


def is_finished(cfg: TrainConfig, checkpoint: Path | None) -> bool:
    """Whether the newest checkpoint is that of the last step, and its policy is in policy_lm."""
    if checkpoint is None or step_of(checkpoint) < cfg.total_steps or not (checkpoint / EXPORTED).exists():
        return False
    finished = checkpoint == list_checkpoints(Path(cfg.ckpt_dir) / "state")[-1]
    if finished:
        print(f"{cfg.ckpt_dir}/ is finished: raise --total_steps to go on")
    return finished


def saved_label(config_json: Path) -> str | None:
    """The label whose probability a run's scores are, as its config.json says; None where they are any numbers."""
    try:
        label = json.loads(config_json.read_text(encoding="utf-8"))["reward"]["label"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{config_json} is not that of a run ({type(error).__name__})"
        raise UserError(f"{reason}: name the folder of a run") from None
    return None if label is None else str(label)


def saved_scale(checkpoint: Path | None) -> ScoreScale | None:
    """The scale in which a run's scores are paid, as its checkpoint has it."""
    counters = {} if checkpoint is None else json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return ScoreScale(**counters["score_scale"]) if "score_scale" in counters else None


def was_begun_by(job: str | None, path: Path) -> bool:
    """Whether this very call of torchrun began the run in a folder."""
    if job is None:
        return False
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((path / "config.json").read_text(encoding="utf-8")).get("job") == job)
    return False


# --- during a run ---------------------------------------------------------------------------------------------------


@contextmanager
def open_run_folder(cfg: TrainConfig, parts: Parts, optimizer: Optimizer, found: Found) -> Iterator["RunFolder"]:
    """Lock the folder, clear it or resume the run in it, and hand it out (raises UserError)."""
    path = Path(cfg.ckpt_dir)
    with ExitStack() as held:
        try:
            path.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(path))
        except OSError as error:
            raise UserError(f"ckpt_dir={path} cannot be written ({error.strerror}): choose another folder") from None
        if contents(path) != found.contents:
            raise UserError(f"ckpt_dir={path} was used by another run meanwhile: choose another folder")
        about = describe(cfg) | {"reward": describe_reward(parts.models), "fingerprints": fingerprints(parts)}
        for leftover in (".partial", ".best.old", ".policy_lm.old", ".value_head.safetensors.old"):
            remove(path / leftover)
        if found.checkpoint is None:
            for name in OWN_FILES[1:]:  # config.json is replaced in one go: it marks the folder as a run's
                remove(path / name)
            for name in EVALUATIONS if found.contents else ():  # of the run that is replaced
                remove(path / name)
            counters: dict[str, Any] = {}
        else:
            counters = restore(cfg, parts.models, optimizer, found.checkpoint, about)
        write_atomic(path / "config.json", json.dumps(about, indent=2) + "\n")
        folder = RunFolder(cfg, parts.models, optimizer, counters)
        try:
            yield folder
        finally:
            folder.close()


def restore(
    cfg: TrainConfig, models: Models, optimizer: Optimizer, checkpoint: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Restore weights, optimiser and tables as they were at a checkpoint; returns its counters (raises UserError)."""
    path = Path(cfg.ckpt_dir)
    if SavedRun(path).exists and not cfg.allow_changes:
        check_same_inputs(json.loads((path / "config.json").read_text(encoding="utf-8")), about)
    counters = load_checkpoint(checkpoint, models.policy, optimizer)
    for other in list_checkpoints(path / "state"):
        if int(other.name.removeprefix("step_")) > counters["step"]:  # damaged, or of steps that are taken anew
            remove(other)
    for name, length in counters["lengths"].items():
        truncate(path / name, length)
    return counters


def check_same_inputs(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse data, models or code that have changed under their names since the run began (raises UserError).

    Both are contents of config.json; one of an older version has no fingerprints, and then nothing is compared.
    """
    for name, commit in saved.get("hub_commits", {}).items():
        if commit and commit != now["hub_commits"][name] and saved[name] == now[name]:
            raise UserError(
                f"{name}={now[name]} has changed on the hub since the run began (commit {commit}): name that "
                "commit as its revision, or say --allow_changes"
            )
    before = saved_fingerprints(saved)
    for name, fingerprint in now["fingerprints"].items():
        if before.get(name) and before[name] != fingerprint:
            setting, what = CHANGED_INPUTS[name]
            raise UserError(
                f"{setting}={now[setting]} has changed since the run began{what}, which would give another result: "
                "restore it, or say --allow_changes"
            )


class RunFolder:
    """The tables, pictures, checkpoints and exported policy of a run; its constructor writes none of them."""

    def __init__(self, cfg: TrainConfig, models: Models, optimizer: Optimizer, counters: dict[str, Any]) -> None:
        """Take over a folder that is ready; counters are those of the checkpoint resumed from, if any."""
        self.path, self.cfg, self.models, self.optimizer = Path(cfg.ckpt_dir), cfg, models, optimizer
        self.counters = {"step": 0, "kl_coef": cfg.kl_coef, "failed_steps": 0} | counters
        self.best = best_so_far(self.path / "best", self.counters["step"], cfg.kl_budget)
        self.evaluated = (self.path / "eval.csv").exists()
        self.seconds_saving, self.started = 0.0, time.perf_counter()
        self.diagnostics = Diagnostics(cfg)
        if (self.path / "metrics.csv").exists():  # so that no warning is given a second time
            for row in pd.read_csv(self.path / "metrics.csv").to_dict("records"):
                self.diagnostics.warnings(row)
        self.trackers = Trackers(cfg, self.path)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.csv, and print a warning for what looks wrong."""
        append_row(self.path / "metrics.csv", row)
        for warning in self.diagnostics.warnings(row):
            tqdm.write(f"step {row['step']}: {warning}")
        self.trackers.add_metrics(row)

    def append_evaluation(self, step: int, row: dict[str, float]) -> None:
        """Append an evaluation to eval.csv, and save the policy in best/ if it is the best one within the KL budget."""
        append_row(self.path / "eval.csv", {"step": step, **row})
        self.evaluated = True
        within = self.cfg.kl_budget is None or row["kl_seq_exact"] <= self.cfg.kl_budget
        if step and within and row["score_mean"] > self.best:
            self.best = row["score_mean"]
            fresh = self._save_policy()
            write_atomic(fresh / "eval.json", json.dumps({"step": step, **row}, indent=2) + "\n")
            move_into_place(fresh, self.path / "best")

    def append_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to samples.csv."""
        for row in rows:
            append_row(self.path / "samples.csv", row)
        self.trackers.add_samples(rows)

    def plot(self) -> None:
        """Draw the curves so far."""
        if (self.path / "metrics.csv").exists():
            plot_curves(self.path / "metrics.csv", self.path / "curves.png", self.models.reward.label)
            self.trackers.add_picture(self.path / "curves.png")

    def save(self, counters: dict[str, Any]) -> None:
        """Write a checkpoint, then replace the exported policy, critic and tokenizer, and the picture."""
        begun = time.perf_counter()
        sizes = {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0 for name in TABLES}
        checkpoint = save_checkpoint(
            self.path / "state", self.models.policy, self.optimizer, {**counters, "lengths": sizes}, self.cfg.keep_last
        )
        fresh = self._save_policy()
        for name in ("policy_lm", "value_head.safetensors"):
            move_into_place(fresh / name, self.path / name)
        remove(fresh)
        (checkpoint / EXPORTED).touch()
        self.plot()
        self.seconds_saving += time.perf_counter() - begun

    def _save_policy(self) -> Path:
        """Write policy, critic, tokenizer and card into a temporary folder, and wait until they are on the disk."""
        fresh = self.path / ".partial"
        remove(fresh)
        self.models.policy.save_pretrained(fresh)
        self.models.tokenizer.save_pretrained(fresh / "policy_lm")
        write_card(self.path, fresh / "policy_lm")
        for path in fresh.rglob("*"):
            fsync(path)
        return fresh

    def close(self) -> None:
        """Close what report_to has opened."""
        self.trackers.close()


def best_so_far(best: Path, step: int, kl_budget: float | None) -> float:
    """The mean score of best/, which is removed if it is from a later step or over the KL budget."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        row = json.loads((best / "eval.json").read_text(encoding="utf-8"))
        if row["step"] <= step and (kl_budget is None or row["kl_seq_exact"] <= kl_budget):
            return float(row["score_mean"])
    remove(best)
    return -math.inf


def describe(cfg: TrainConfig) -> dict[str, Any]:
    """The contents of config.json: every setting as resolved, versions, commits and machine."""
    revisions = {
        "policy_name": cfg.policy_revision,
        "ref_name": cfg.ref_revision,
        "rm_name": cfg.rm_revision,
        "dataset": cfg.dataset_revision,
    }
    return {
        **asdict(cfg),
        "job": torchrun_job(),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "numpy", "tokenizers")},
        "python": sys.version.split()[0],
        "git_commit": git_commit(),
        "hub_commits": {
            setting: resolved_commit(setting, str(getattr(cfg, setting)), revision)
            for setting, revision in revisions.items()
            if not python_reward(str(getattr(cfg, setting)))
        },
        "device_name": device_name(cfg.device),
    }


def describe_reward(models: Models) -> dict[str, Any]:
    """The part of config.json on the reward: what its scores are, in which scale they are paid, and a user's code."""
    reward, scale = models.reward, models.score_scale
    return {
        "scores": score_title(reward.label),
        "label": reward.label,
        "mean": scale.mean,
        "std": scale.std,
        "file": getattr(reward, "file", ""),
        "sha256": getattr(reward, "sha256", ""),
    }


def fingerprints(parts: Parts) -> dict[str, str]:
    """The part of config.json by which a later start knows that data, models and code are still the same."""
    models = parts.models
    return {
        "dataset": parts.dataset_sha256,
        "tokenizer": tokenizer_sha256(models.tokenizer),
        "ref_name": model_sha256(models.reference.lm),
        "rm_name": reward_sha256(models.reward),
    }


def saved_fingerprints(saved: dict[str, Any]) -> dict[str, str]:
    """The fingerprints in a config.json; one of an older version has that of a Python reward at most."""
    return {"rm_name": saved.get("reward", {}).get("sha256", "")} | saved.get("fingerprints", {})


def reward_sha256(reward: Reward) -> str:
    """The fingerprint of a reward: of a classifier and its tokenizer, or of a user's code."""
    if isinstance(reward, Classifier):
        return texts_sha256([model_sha256(reward.model), tokenizer_sha256(reward.tokenizer)])
    return str(getattr(reward, "sha256", ""))


def git_commit() -> str | None:
    """The commit of this code, where it is a git checkout and git is installed."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
