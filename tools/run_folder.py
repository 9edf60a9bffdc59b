"""The run folder: everything that a run leaves behind, and from which it goes on.

A file or folder is written beside its place, flushed to disk and renamed into it; tables grow by whole rows.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from config import TrainConfig, UserError, is_run, saved_settings  # isort: skip  (before torch: see there)

import pandas as pd
import torch
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from model import GPT2WithValueHead
from ppo import KLController
from tools.doctor import Doctor
from tools.plot import plot_curves
from tools.processes import job
from tools.states import damage, flush, load_state, lock, newest_good, remove, save_state, states
from utils import resolved_commit, spreadsheet_safe, write_whole

FAILED_STEPS_ALLOWED = 3  # steps in a row in which no minibatch could be learnt from
OWN_FILES = ("config.json", "metrics.csv", "eval.csv", "samples.csv", "curves.png", "policy_lm",
             "value_head.safetensors", "best", "state", "tensorboard")  # fmt: skip
EXPORTED = "exported"  # in a state whose policy is that of policy_lm
TABLES = ("metrics.csv", "eval.csv", "samples.csv")  # which grow, and are cut back on resume
SILENT = {"preset", "ckpt_dir", "resume", "allow_changes", "overwrite", "check"}  # what may differ unsaid
HARMLESS = {"total_steps", "save_every", "keep_last", "report_to", "kl_budget"}  # what may differ and is said


class RunFolder:
    """What a run keeps, and what it says of itself."""

    def __init__(self, cfg: TrainConfig) -> None:
        """Refuse a folder that cannot be written or already holds a run (UserError); write nothing yet."""
        self.path, self.cfg = Path(cfg.ckpt_dir), cfg
        self.step, self.failed_steps, self.best, self.evaluated = 0, 0, -math.inf, False
        self.seconds_saving, self.started = 0.0, 0.0
        self.doctor = Doctor(cfg)
        self.board_type = tensorboard_writer() if cfg.report_to == "tensorboard" else None
        self.board: Any = None
        self.state: Path | None = None
        if not cfg.check:
            self.check_folder(cfg)

    def check_folder(self, cfg: TrainConfig) -> None:
        """Refuse what is wrong with the folder, and find the state to go on from (raises UserError)."""
        try:
            nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            present = self.present = self.contents()
        except OSError as error:
            raise UserError(f"ckpt_dir={self.path} cannot be used ({error.strerror}): choose another folder") from None
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"ckpt_dir={self.path} cannot be written: choose another folder")
        if present and not cfg.overwrite and not cfg.resume:
            raise UserError(
                f"ckpt_dir={self.path} already holds {present[0]}: choose another folder, go on with that run with "
                "--resume, or replace it with --overwrite"
            )
        if present and not is_run(self.path):
            raise UserError(f"ckpt_dir={self.path} holds {present[0]}, but not from a run: choose another folder")
        for name in (cfg.policy_name, cfg.ref_name, cfg.rm_name, cfg.dataset):
            if name and Path(name).exists() and self.path.resolve() in Path(name).resolve().parents:
                raise UserError(f"ckpt_dir={self.path} holds {name}, which this run needs: choose another folder")
        if cfg.resume:
            self.state = self.find_state(cfg)

    def contents(self) -> list[str]:
        """What of a run is in the folder: files by their names, and states."""
        found = [name for name in OWN_FILES if (self.path / name).exists()]
        return found + [state.name for state in states(self.path / "state")]

    def find_state(self, cfg: TrainConfig) -> Path | None:
        """The state to go on from: the one named, else the newest good one; None to start anew (raises UserError)."""
        named = Path(str(cfg.resume))
        if (named / "state.json").is_file():
            if problem := damage(named):
                raise UserError(f"resume={named} is damaged ({problem}): choose another, or --resume alone")
            state: Path | None = named
        else:
            state, wrong = newest_good(self.path / "state")
            if state is None and (wrong or (self.path / "policy_lm").exists()):
                problem = wrong[0] if wrong else f"{self.path / 'state'} holds none"
                raise UserError(
                    f"ckpt_dir={self.path} has no good state to resume ({problem}): its policy_lm is still whole; "
                    "start anew in another folder, or with --overwrite"
                )
            for problem in wrong:
                print(f"note: {problem}; the state before it is used")
        saved = saved_settings(self.path / "config.json")
        now = asdict(cfg)
        changed = {name: (saved.get(name), new) for name, new in now.items() if saved and saved.get(name) != new}
        told = ", ".join(f"{name} from {old} to {new}" for name, (old, new) in changed.items() if name not in SILENT)
        breaking = [name for name in changed if name not in HARMLESS | SILENT]
        if breaking and not cfg.allow_changes:
            raise UserError(f"--resume with changed settings would give another result ({told}): leave them out, or "
                            "say --allow_changes")  # fmt: skip
        if told:
            print(f"note: resuming with changed settings: {told}")
        if "total_steps" in changed and cfg.lr_schedule == "linear":
            print("note: the step size falls to 0 at the new last step, so that it jumps where the run goes on")
        return state

    def is_finished(self, cfg: TrainConfig) -> bool:
        """Whether there is nothing left to resume."""
        finished = self.state is not None and step_of(self.state) >= cfg.total_steps
        finished = finished and self.state == states(self.path / "state")[-1]
        finished = finished and (Path(str(self.state)) / EXPORTED).exists()
        if finished:
            print(f"{self.path}/ is finished: raise --total_steps to go on")
        return finished

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder for this run alone (raises UserError)."""
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(self.path))
            except OSError as error:
                reason = f"cannot be written ({error.strerror})"
                raise UserError(f"ckpt_dir={self.path} {reason}: choose another folder") from None
            if self.contents() != self.present:
                raise UserError(f"ckpt_dir={self.path} was used by another run meanwhile: choose another folder")
            yield
            if self.board is not None:
                self.board.close()

    def start(
        self, cfg: TrainConfig, policy: GPT2WithValueHead, tokenizer: PreTrainedTokenizerBase, optimizer: Optimizer,
        kl: KLController, prompts: int,
    ) -> None:  # fmt: skip
        """Clear the way or restore the state, and say in two lines what is about to happen (raises UserError)."""
        self.policy, self.tokenizer, self.optimizer, self.kl = policy, tokenizer, optimizer, kl
        self.started = time.perf_counter()
        about = describe(cfg)
        try:
            for leftover in (".partial", ".best.old", ".policy_lm.old", ".value_head.safetensors.old"):
                remove(self.path / leftover)
            if self.state is None:
                for name in OWN_FILES[1:]:  # config.json is replaced in one go: it says that this is a run
                    remove(self.path / name)
            else:
                self.restore(self.state, about)
            write_whole(self.path / "config.json", json.dumps(about, indent=2) + "\n")
        except OSError as error:
            self.leave_unwritten(error)
        self.evaluated = (self.path / "eval.csv").exists()
        if self.board_type is not None:
            self.board = self.board_type(self.path / "tensorboard", purge_step=self.step + 1)
        size = sum(p.numel() for p in policy.parameters())
        print(f"policy {cfg.policy_name} ({size:,} weights), reward {cfg.rm_name}, on {cfg.device} in {cfg.dtype}")
        print(f"{prompts:,} prompts of {cfg.dataset}; the run is kept in {self.path}/")
        if self.state is not None:
            print(f"going on after step {self.step}, from {self.state}/")

    def restore(self, state: Path, about: dict[str, Any]) -> None:
        """Put everything back as it was when the state was saved (raises UserError)."""
        saved = json.loads((self.path / "config.json").read_text(encoding="utf-8")) if is_run(self.path) else {}
        if not self.cfg.allow_changes:
            for name, commit in saved.get("hub_commits", {}).items():
                if commit and commit != about["hub_commits"][name] and saved[name] == about[name]:
                    raise UserError(
                        f"{name}={about[name]} has changed on the hub since the run began (commit {commit}): name that "
                        "commit as its revision, or say --allow_changes"
                    )
        counters = load_state(state, self.policy, self.optimizer)
        self.step, self.kl.coef, self.failed_steps = counters["step"], counters["kl_coef"], counters["failed_steps"]
        for newer in states(self.path / "state"):
            if int(newer.name.removeprefix("step_")) > self.step:  # damaged, or of a future that is now written anew
                remove(newer)
        for name, length in counters["lengths"].items():
            cut(self.path / name, length)
        self.best = best_so_far(self.path / "best", self.step, self.cfg.kl_budget)
        if (self.path / "metrics.csv").exists():  # so that nothing is told a second time
            for row in pd.read_csv(self.path / "metrics.csv").to_dict("records"):
                self.doctor.look(row)

    def leave_unwritten(self, error: Exception) -> NoReturn:
        """Leave with 1 where the folder could not be written, such as on a full disk."""
        sys.exit(f"error: ckpt_dir={self.path} cannot be written ({error}): make room, then {self.how_to_resume()}")

    def how_to_resume(self) -> str:
        """The command that goes on with this run."""
        folder = "" if str(self.path) == TrainConfig.ckpt_dir else f" {self.path}"
        return f"python train.py --resume{folder}"

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.csv, flushed to disk, and say what looks wrong, each thing once."""
        append_row(self.path / "metrics.csv", row)
        self.count_failed(row)
        for finding in self.doctor.look(row):
            tqdm.write(f"step {row['step']}: {finding}")
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    def add_evaluation(self, step: int, row: dict[str, float]) -> None:
        """Append to eval.csv how the policy does on the prompts kept back; keep it as best/ if none was better."""
        append_row(self.path / "eval.csv", {"step": step, **row})
        within = self.cfg.kl_budget is None or row["kl_seq_exact"] <= self.cfg.kl_budget
        if step and within and row["sentiment_mean"] > self.best:
            self.best = row["sentiment_mean"]
            fresh = self.path / ".partial"
            save_policy(self.policy, self.tokenizer, fresh)
            write_whole(fresh / "eval.json", json.dumps({"step": step, **row}, indent=2) + "\n")
            replace(fresh, self.path / "best")

    def count_failed(self, row: dict[str, Any]) -> None:
        """Note whether a step taught anything."""
        self.failed_steps = 0 if row["updates"] else self.failed_steps + 1

    def must_give_up(self) -> bool:
        """Whether several steps in a row taught nothing; the policy is still that of the last good step."""
        return self.failed_steps >= FAILED_STEPS_ALLOWED

    def add_samples(self, step: int, make_rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Append rows to samples.csv, print the first, and draw the curves so far."""
        rows = make_rows()
        for row in rows:
            append_row(self.path / "samples.csv", row)
        shown = rows[0]
        lines = {"prompt": shown["prompt"], **{f"{name:6} {shown[f'{name}_score']:+.2f}": shown[name] for name in
                                               ("base", "policy")}}  # fmt: skip
        tqdm.write("\n".join([f"step {step}", *(f"  {name:12} {one_line(x)}" for name, x in lines.items())]))
        if step < self.cfg.total_steps:  # the last picture is drawn when saving
            plot_curves(self.path / "metrics.csv", self.path / "curves.png")

    def counters(self) -> dict[str, Any]:
        """What a run goes on from, beside weights and optimiser."""
        return {"step": self.step, "kl_coef": self.kl.coef, "failed_steps": self.failed_steps}

    def save(self, step: int) -> None:
        """Write a state to resume from, then policy, critic and tokenizer beside the old ones and in their place."""
        begun = time.perf_counter()
        lengths = {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0 for name in TABLES}
        self.step = step
        counters = {**self.counters(), "lengths": lengths}
        state = save_state(self.path / "state", self.policy, self.optimizer, counters, self.cfg.keep_last)
        fresh = self.path / ".partial"
        save_policy(self.policy, self.tokenizer, fresh)
        for name in ("policy_lm", "value_head.safetensors"):
            replace(fresh / name, self.path / name)
        remove(fresh)
        (state / EXPORTED).touch()
        if lengths["metrics.csv"]:
            plot_curves(self.path / "metrics.csv", self.path / "curves.png")
        self.seconds_saving += time.perf_counter() - begun

    def finish(self, cfg: TrainConfig, step: int, received: int | None) -> None:
        """Say where things are; leave with 128 + signal after a signal, with 1 after giving up."""
        if received is not None:
            name = signal.Signals(received).name
            print(f"stopped after step {step} by {name}; saved. To go on: {self.how_to_resume()}", file=sys.stderr)
            sys.exit(128 + received)
        if self.must_give_up():
            sys.exit(
                f"error: stopped after step {step}: {FAILED_STEPS_ALLOWED} steps in a row had no finite loss; the last "
                f"good policy is saved in {self.path}/; lower --lr, or check the reward for NaN"
            )
        if cfg.eval_every:
            print(before_after(self.path / "eval.csv"))
        share = self.seconds_saving / (time.perf_counter() - self.started)
        print(f"saving took {self.seconds_saving:.1f} s, {share:.1%} of the time")
        flags = " --preset tiny" if cfg.preset == "tiny" else ""
        flags += "" if cfg.ckpt_dir == TrainConfig.ckpt_dir else f" --policy_path {self.path / 'policy_lm'}"
        print(f"done: see {self.path}/curves.png and samples.csv; compare with the base: python eval.py{flags}")


class Onlooker(RunFolder):
    """The run folder as all processes but the first see it: they know what is decided from it, and write nothing."""

    def check_folder(self, cfg: TrainConfig) -> None:
        """Leave that to the first process."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold nothing."""
        yield

    def start(self, *args: Any) -> None:
        """Touch nothing."""

    def counters(self) -> dict[str, Any]:
        """Process 0 knows."""
        return {}

    def log(self, row: dict[str, Any]) -> None:
        """Only count."""
        self.count_failed(row)

    def add_evaluation(self, step: int, row: dict[str, float]) -> None:
        """Keep nothing."""

    def add_samples(self, step: int, make_rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Make none."""

    def save(self, step: int) -> None:
        """Write nothing."""

    def finish(self, cfg: TrainConfig, step: int, received: int | None) -> None:
        """Leave with the first process's exit code."""
        if received is not None or self.must_give_up():
            sys.exit(1 if received is None else 128 + received)


def save_policy(policy: GPT2WithValueHead, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write policy, critic and tokenizer into a new folder, and wait until they are on the disk."""
    remove(folder)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "policy_lm")
    for path in folder.rglob("*"):
        flush(path)


def best_so_far(best: Path, step: int, kl_budget: float | None) -> float:
    """The sentiment of best/; it is removed where it is of a step yet to come, or over the KL budget."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        row = json.loads((best / "eval.json").read_text(encoding="utf-8"))
        if row["step"] <= step and (kl_budget is None or row["kl_seq_exact"] <= kl_budget):
            return float(row["sentiment_mean"])
    remove(best)
    return -math.inf


def begun_by(job: str | None, folder: Path) -> bool:
    """Whether this very call of torchrun began the run in a folder."""
    if job is None:
        return False
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("job") == job)
    return False


def before_after(eval_csv: Path) -> str:
    """The first and the last evaluation, side by side."""
    table = pd.read_csv(eval_csv)
    names = {"sentiment_mean": "sentiment mean", "positive_rate": "share positive", "kl_seq_exact": "KL, nats",
             "entropy": "entropy, nats per token", "response_len": "response length"}  # fmt: skip
    lines = [f"{'prompts kept back':24}{'before':>9}{'after':>9}"]
    lines += [f"{title:24}{table[name].iloc[0]:9.2f}{table[name].iloc[-1]:9.2f}" for name, title in names.items()]
    return "\n".join(lines)


def one_line(text: str) -> str:
    """A text on one line, cut to what a terminal shows."""
    text = " ".join(text.split())
    width = max(40, shutil.get_terminal_size((120, 24)).columns - 16)
    return text if len(text) <= width else text[: width - 1] + "…"


def tensorboard_writer() -> Any:
    """TensorBoard's writer class (raises UserError where the package is missing)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("report_to=tensorboard needs a package: pip install tensorboard, or leave it out") from None
    return SummaryWriter


def describe(cfg: TrainConfig) -> dict[str, Any]:
    """What config.json holds: every setting as resolved, versions, commits and machine."""
    revisions = {"policy_name": cfg.policy_revision, "ref_name": cfg.ref_revision, "rm_name": cfg.rm_revision,
                 "dataset": cfg.dataset_revision}  # fmt: skip
    return {
        **asdict(cfg),
        "job": job(),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "numpy", "tokenizers")},
        "python": sys.version.split()[0],
        "git_commit": git_commit(),
        "hub_commits": {
            setting: resolved_commit(setting, str(getattr(cfg, setting)), revision)
            for setting, revision in revisions.items()
        },
        "device_name": torch.cuda.get_device_name() if cfg.device == "cuda" else f"{os.cpu_count()} CPU cores",
    }


def git_commit() -> str | None:
    """The commit that runs, where this is a git checkout and git is installed."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a CSV file, with a header if it is new, in a single write that is on disk when this returns."""
    size = path.stat().st_size if path.exists() else 0
    texts = any(isinstance(value, str) for value in row.values())
    row = {name: spreadsheet_safe(value) if isinstance(value, str) else value for name, value in row.items()}
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            # a text may hold any character, a lone \r too
            writer = csv.DictWriter(
                file, row, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if texts else csv.QUOTE_MINIMAL
            )
            if not size:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # such as a full disk: no half row stays
        with suppress(OSError):
            cut(path, size)
        raise


def replace(fresh: Path, place: Path) -> None:
    """Put a new file or folder in the place of an old one, which is removed last."""
    old = place.with_name(f".{place.name}.old")
    remove(old)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    remove(old)


def cut(path: Path, length: int) -> None:
    """Take off what was appended to a file after it had this length; remove it if that is 0 (raises UserError)."""
    if length == 0:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.stat().st_size < length:
        raise UserError(f"{path} is shorter than when the state was saved: put it back, or resume from an older state")
    else:
        os.truncate(path, length)


def step_of(state: Path) -> int:
    """The step that a state was saved after."""
    return int(json.loads((state / "state.json").read_text(encoding="utf-8"))["step"])
