"""The run folder: everything that a run leaves behind, and from which it resumes. The main process alone has one.

A file or folder is written under a temporary name, flushed to disk and renamed; tables grow by whole rows.
"""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError

import pandas as pd
from torch.optim import Optimizer
from tqdm import tqdm

from ppo import Models
from runtime.files import append_row, fsync, lock, move_into_place, remove, truncate, write_atomic
from runtime.saved_run import SavedRun
from training.card import write_card
from training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint, step_of
from training.diagnostics import Diagnostics
from training.earlier_run import EXPORTED, EXPORTS, OWN_FILES, TABLES, EarlierRun, check_same_inputs, contents
from training.parts import Parts
from training.plots import plot_curves
from training.reporting import Trackers
from training.run_record import run_record

EVALUATIONS = [  # what eval.py writes into a run folder, of its policy_lm and of its best/
    f"{policy}eval_{ending}" for policy in ("", "best_") for ending in ("results.csv", "summary.json", "report.html")
]
LEFTOVERS = (".partial", *(f".{name}.old" for name in ("best", *EXPORTS)))  # of a process that was killed


@contextmanager
def open_run_folder(cfg: TrainConfig, parts: Parts, optimizer: Optimizer, earlier: EarlierRun) -> Iterator["RunFolder"]:
    """Lock the folder, clear it or resume the run in it, and hand it out."""
    path = Path(cfg.ckpt_dir)
    with ExitStack() as resources:
        # 1. own the folder, as it was when it was inspected
        try:
            path.mkdir(parents=True, exist_ok=True)
            resources.enter_context(lock(path))
        except OSError as error:
            raise UserError(f"ckpt_dir={path} cannot be written ({error.strerror}): choose another folder") from None
        if contents(path) != earlier.contents:
            raise UserError(f"ckpt_dir={path} was used by another run meanwhile: choose another folder")
        # 2. make it that of this run
        record = run_record(cfg, parts)
        for name in LEFTOVERS:
            remove(path / name)
        if earlier.checkpoint is None:
            clear(path, earlier)
            counters: dict[str, Any] = {}
        else:
            counters = restore(cfg, parts.models, optimizer, earlier.checkpoint, record)
        write_atomic(path / "config.json", json.dumps(record, indent=2) + "\n")
        # 3. use it
        folder = RunFolder(cfg, parts.models, optimizer, counters)
        try:
            yield folder
        finally:
            folder.trackers.close()


def clear(path: Path, earlier: EarlierRun) -> None:
    """Remove what an earlier run left, its evaluations too; config.json stays, as the mark of a run's folder."""
    for name in OWN_FILES:
        if name != "config.json":
            remove(path / name)
    if earlier.contents:
        for name in EVALUATIONS:
            remove(path / name)


def restore(
    cfg: TrainConfig, models: Models, optimizer: Optimizer, checkpoint: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Restore weights, optimiser and tables as they were at a checkpoint; returns its counters."""
    path = Path(cfg.ckpt_dir)
    if not cfg.allow_changes:
        check_same_inputs(SavedRun(path), record)
    counters = load_checkpoint(checkpoint, models.policy, optimizer)
    for other in list_checkpoints(path / "state"):
        if step_of(other) > counters["step"]:  # damaged, or of steps that are taken anew
            remove(other)
    for name, length in counters["lengths"].items():
        truncate(path / name, length)
    return counters


class RunFolder:
    """The tables, pictures, checkpoints and exported policy of a run; its constructor writes none of them."""

    def __init__(self, cfg: TrainConfig, models: Models, optimizer: Optimizer, counters: dict[str, Any]) -> None:
        """Take over a folder that is ready; counters are those of the checkpoint resumed from, if any."""
        self.path = Path(cfg.ckpt_dir)
        self.metrics_csv = self.path / "metrics.csv"
        self.cfg = cfg
        self.models = models
        self.optimizer = optimizer
        self.counters = {
            "step": 0,
            "kl_coef": cfg.kl_coef,
            "failed_steps": 0,
            "evaluated": (self.path / "eval.csv").exists(),
            **counters,
        }
        self.best = best_so_far(self.path / "best", self.counters["step"], cfg.kl_budget)
        self.diagnostics = Diagnostics(cfg)
        if self.metrics_csv.exists():  # so that no warning is given a second time
            for row in pd.read_csv(self.metrics_csv).to_dict("records"):
                self.diagnostics.warnings(row)
        self.trackers = Trackers(cfg, self.path)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.csv, and print a warning for what looks wrong."""
        append_row(self.metrics_csv, row)
        for warning in self.diagnostics.warnings(row):
            tqdm.write(f"step {row['step']}: {warning}")
        self.trackers.add(row["step"], metrics=row)

    def append_evaluation(self, step: int, row: dict[str, float]) -> None:
        """Append an evaluation to eval.csv, and save the policy in best/ if it is the best one within the KL budget."""
        row = {"step": step, **row}
        append_row(self.path / "eval.csv", row)
        within = self.cfg.kl_budget is None or row["kl_seq_exact"] <= self.cfg.kl_budget
        if step and within and row["score_mean"] > self.best:
            self.best = row["score_mean"]
            fresh = self.export_policy()
            write_atomic(fresh / "eval.json", json.dumps(row, indent=2) + "\n")
            move_into_place(fresh, self.path / "best")

    def append_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append the rows of a step to samples.csv."""
        for row in rows:
            append_row(self.path / "samples.csv", row)
        self.trackers.add(rows[0]["step"], samples=rows)

    def plot(self, step: int) -> None:
        """Draw the curves up to a step."""
        if self.metrics_csv.exists():
            picture = self.path / "curves.png"
            plot_curves(self.metrics_csv, picture, self.models.reward.label)
            self.trackers.add(step, picture=picture)

    def save(self, counters: dict[str, Any]) -> None:
        """Write a checkpoint, then replace the exported policy, critic and tokenizer, and the picture."""
        tables = [self.path / name for name in TABLES]
        lengths = {table.name: table.stat().st_size if table.exists() else 0 for table in tables}
        checkpoint = save_checkpoint(
            self.path / "state",
            self.models.policy,
            self.optimizer,
            {**counters, "lengths": lengths},
            self.cfg.keep_last,
        )
        fresh = self.export_policy()
        for name in EXPORTS:
            move_into_place(fresh / name, self.path / name)
        remove(fresh)
        (checkpoint / EXPORTED).touch()
        self.plot(counters["step"])

    def export_policy(self) -> Path:
        """Write policy, critic, tokenizer and card into a temporary folder, and wait until they are on the disk."""
        fresh = self.path / ".partial"
        remove(fresh)
        self.models.policy.save_pretrained(fresh)
        self.models.tokenizer.save_pretrained(fresh / "policy_lm")
        write_card(self.path, fresh / "policy_lm")
        for path in fresh.rglob("*"):
            fsync(path)
        return fresh


def best_so_far(best: Path, step: int, kl_budget: float | None) -> float:
    """The mean score of best/, which is removed if it is from a later step or over the KL budget."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        row = json.loads((best / "eval.json").read_text(encoding="utf-8"))
        if row["step"] <= step and (kl_budget is None or row["kl_seq_exact"] <= kl_budget):
            return float(row["score_mean"])
    remove(best)
    return -math.inf
