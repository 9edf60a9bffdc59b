"""Fine-tune GPT-2 by PPO towards a sentiment reward, anchored to frozen GPT-2: act, score, learn, report, keep.

    python train.py                  GPT-2 on IMDB
    python train.py --preset tiny    a small world made on the spot: no network, a few minutes
    python train.py --resume         go on with a run that was stopped, as if it had not been
    python train.py --help           every setting

Owns the loop and the run folder. The algorithm itself is in ppo.py.
"""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, is_run, run_cli, saved_settings, with_changes  # isort: skip  (before torch: see there)

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import PromptStream, keep_back, load_examples, load_prompts
from model import GPT2WithValueHead, Sequences, check_fit, generate, load_reference
from ppo import KLController, Rollout, build_optimizer, make_rollout, ppo_update
from reward import SentimentReward
from tools.audit import audit
from tools.doctor import Doctor
from tools.make_models import resolve_name
from tools.plot import plot_curves
from tools.states import damage, load_state, lock, newest_good, remove, save_state, states
from utils import (
    keep_freed_memory,
    load_tokenizer,
    quiet_libraries,
    require_hub,
    resolve_device,
    resolve_dtype,
    resolved_commit,
    spreadsheet_safe,
    uniforms,
    write_whole,
)  # fmt: skip

SHOWN = 4  # prompts per visit to samples.csv
FAILED_STEPS_ALLOWED = 3  # steps in a row in which no minibatch could be learnt from
OWN_FILES = ("config.json", "metrics.csv", "eval.csv", "samples.csv", "curves.png", "policy_lm",
             "value_head.safetensors", "best", "state", "tensorboard")  # fmt: skip
EXPORTED = "exported"  # in a state whose policy is that of policy_lm
TABLES = ("metrics.csv", "eval.csv", "samples.csv")  # which grow, and are cut back on resume
SILENT = {"preset", "ckpt_dir", "resume", "allow_changes", "overwrite", "check"}  # what may differ unsaid
HARMLESS = {"total_steps", "save_every", "keep_last", "report_to", "kl_budget"}  # what may differ and is said


def main(cfg: TrainConfig) -> Path:
    """Train, and return the run folder; wrong input raises UserError before anything is written."""
    quiet_libraries()
    cfg = resolve(cfg)
    run = RunFolder(cfg)
    if run.is_finished(cfg):
        return run.path
    parts = load_parts(cfg)
    audit(parts.policy, parts.reference, parts.reward, parts.tokenizer, parts.prompts.batch(1), cfg, loud=cfg.check)
    if cfg.check:
        return run.path
    keep_freed_memory()
    optimizer = build_optimizer(parts.policy, cfg)
    kl = KLController(cfg.kl_coef, cfg.adaptive_kl_target)
    with run.open(), stop_signals() as stop:
        first = run.start(cfg, parts, optimizer, kl)
        try:
            last = train(cfg, parts, optimizer, kl, run, first, stop)
        except torch.OutOfMemoryError:
            raise UserError("memory does not suffice: lower batch_size, eval_prompts or max_new_tokens") from None
        except BrokenPipeError:
            raise
        except (OSError, SafetensorError) as error:
            sys.exit(f"error: ckpt_dir={run.path} cannot be written ({error}): make room, then {run.how_to_resume()}")
    return run.finish(cfg, last, stop.signal)


def train(
    cfg: TrainConfig, parts: Parts, optimizer: Optimizer, kl: KLController, run: RunFolder, first: int, stop: Stop
) -> int:
    """Take the steps first, first + 1, … and return the last one taken."""
    if cfg.eval_every and not (run.path / "eval.csv").exists():
        run.evaluate(parts, cfg, 0)
    step = first - 1
    if step >= cfg.total_steps:  # killed after the last state was written and before the policy was
        run.save(parts, optimizer, kl, step)
    steps = tqdm(range(first, cfg.total_steps + 1), "training", unit="step", dynamic_ncols=True,
                 initial=first - 1, total=cfg.total_steps)  # fmt: skip
    with steps:
        for step in steps:
            watch = Stopwatch(cfg.device)
            try:
                with stop.may_abandon():
                    # act
                    seqs = act(parts, cfg, step)
                    watch.lap("seconds_generate")
                    # score
                    scores = score(parts, cfg, seqs)
                    rollout = make_rollout(parts.policy, parts.reference, seqs, scores, kl.coef)
                    watch.lap("seconds_score")
            except Abandoned:
                run.save(parts, optimizer, kl, step - 1)
                return step - 1
            except UserError:  # a reward that failed: what was learnt before is kept
                run.save(parts, optimizer, kl, step - 1)
                raise
            # learn
            update = ppo_update(parts.policy, optimizer, rollout, cfg, step)
            watch.lap("seconds_update")
            # report
            row = {"step": step, "episodes": step * cfg.batch_size, "kl_coef": kl.coef, **rollout.metrics(), **update}
            run.log({**row, **watch.metrics(rollout)})
            told = f"sentiment {row['sentiment_mean']:+.2f}, KL {row['kl_seq']:.2f}, beta {kl.coef:.3g}"
            steps.set_postfix_str(told, refresh=False)
            kl.update(row["kl_seq"])
            # keep
            done = step == cfg.total_steps
            if done or step % cfg.sample_every == 0:
                run.add_samples(parts, rollout, cfg, step)
            if cfg.eval_every and (done or step % cfg.eval_every == 0):
                run.evaluate(parts, cfg, step)
            stopped = stop.signal is not None or run.must_give_up()
            if done or stopped or step % cfg.save_every == 0:
                run.save(parts, optimizer, kl, step)
            if stopped:
                break
    return step


# --- what is trained, and on what -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The models and the prompts of a run, on their device."""

    policy: GPT2WithValueHead
    reference: GPT2WithValueHead
    reward: SentimentReward
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptStream
    held_out: PromptStream  # one step of it is all of it


def resolve(cfg: TrainConfig) -> TrainConfig:
    """Settings with `auto` decided and paths made absolute; everything from the hub is known to be within reach."""
    device = resolve_device(cfg.device)
    names = {"policy_name": cfg.policy_name, "ref_name": cfg.ref_name or cfg.policy_name, "rm_name": cfg.rm_name,
             "dataset": cfg.dataset}  # fmt: skip
    for setting, name in names.items():
        if not name.startswith("tiny:"):
            require_hub(setting, name)
    paths = {setting: str(Path(name).resolve()) if Path(name).exists() else name for setting, name in names.items()}
    return with_changes(cfg, device=device, dtype=resolve_dtype(cfg.dtype, device), **paths)


def load_parts(cfg: TrainConfig) -> Parts:
    """Load everything that a run needs (raises UserError)."""
    policy_name, ref_name = resolve_name(cfg.policy_name), resolve_name(cfg.ref_name or cfg.policy_name)
    dtype = getattr(torch, cfg.dtype)
    tokenizer = load_tokenizer("policy_name", policy_name, cfg.policy_revision)
    policy = GPT2WithValueHead.from_pretrained(policy_name, dtype=dtype, revision=cfg.policy_revision).to(cfg.device)
    reference = load_reference(ref_name, dtype=dtype, revision=cfg.ref_revision).to(cfg.device)
    check_fit(policy, reference, tokenizer, cfg.max_prompt_len + cfg.max_new_tokens)
    reward = SentimentReward(
        resolve_name(cfg.rm_name), cfg.target_label, cfg.device, cfg.reward_batch_size, dtype, cfg.rm_revision
    )
    texts, _ = load_examples(
        resolve_name(cfg.dataset, cfg.split), cfg.split, cfg.text_column, revision=cfg.dataset_revision
    )
    prompts = load_prompts(tokenizer, texts, cfg.min_prompt_len, cfg.max_prompt_len)
    kept, back = keep_back(prompts, cfg.eval_prompts if cfg.eval_every else 0, cfg.seed)
    streams = PromptStream(kept, cfg.batch_size, cfg.seed), PromptStream(back, len(back), cfg.seed)
    return Parts(policy, reference, reward, tokenizer, *streams)


def act(parts: Parts, cfg: TrainConfig, step: int, model: GPT2WithValueHead | None = None, rows: int = 0) -> Sequences:
    """Let the policy (or another model) answer the prompts of a step, or the first few of them."""
    rows = rows or cfg.batch_size
    ids, mask = parts.prompts.batch(step)
    noise = uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
    return answer(parts, cfg, ids[:rows], mask[:rows], noise[:rows], model)


def answer(
    parts: Parts, cfg: TrainConfig, ids: Tensor, mask: Tensor, noise: Tensor, model: GPT2WithValueHead | None = None
) -> Sequences:
    """Let the policy (or another model) answer prompts (B, P) with the random numbers (B, R)."""
    return generate(
        model or parts.policy, ids.to(cfg.device), mask.to(cfg.device), noise.to(cfg.device),
        eos_id=int(parts.tokenizer.eos_token_id), temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
    )  # fmt: skip


def score(parts: Parts, cfg: TrainConfig, seqs: Sequences) -> Tensor:
    """The reward's scores (B,) of the responses (raises UserError where it fails or returns something else)."""
    try:
        scores = parts.reward(seqs.texts(parts.tokenizer, cfg.reward_on_prompt))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"rm_name={cfg.rm_name} failed on a batch ({type(error).__name__}: {error})") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != (len(seqs.tokens),):
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"rm_name={cfg.rm_name} returned {found} instead of one real number per response")
    return scores


# --- the run folder -------------------------------------------------------------------------------------------------


class RunFolder:
    """Everything that a run leaves behind; a file or folder is written beside its place and renamed into it."""

    def __init__(self, cfg: TrainConfig) -> None:
        """Refuse a folder that cannot be written or already holds a run (UserError); write nothing yet."""
        self.path = Path(cfg.ckpt_dir)
        self.failed_steps, self.best = 0, -math.inf
        self.seconds_saving, self.started = 0.0, time.perf_counter()
        self.doctor = Doctor(cfg.micro_batch_size or cfg.minibatch_size)
        self.board_type = tensorboard_writer() if cfg.report_to == "tensorboard" else None
        self.board: Any = None
        self.keep_last = cfg.keep_last
        self.state: Path | None = None
        if cfg.check:
            return
        try:
            nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            present = [name for name in OWN_FILES if (self.path / name).exists()]
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
            if name and self.path.resolve() in Path(name).resolve().parents:
                raise UserError(f"ckpt_dir={self.path} holds {name}, which this run needs: choose another folder")
        if cfg.resume:
            self.state = self.find_state(cfg)

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
        changed = {name: (old, getattr(cfg, name)) for name, old in saved.items() if getattr(cfg, name) != old}
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
        finished = not cfg.check and self.state is not None and step_of(self.state) >= cfg.total_steps
        finished = finished and (Path(str(self.state)) / EXPORTED).exists()
        if finished:
            print(f"{self.path}/ is finished: raise --total_steps to go on")
        return finished

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder for this run alone (raises UserError)."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with lock(self.path):
                yield
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise UserError(f"ckpt_dir={self.path} {reason}: choose another folder") from None

    def start(self, cfg: TrainConfig, parts: Parts, optimizer: Optimizer, kl: KLController) -> int:
        """Clear the way or restore the state, say in two lines what is about to happen; returns the first step."""
        size = sum(p.numel() for p in parts.policy.parameters())
        first = 1
        if self.state is not None:
            counters = load_state(self.state, parts.policy, optimizer)
            first, kl.coef, self.failed_steps = counters["step"] + 1, counters["kl_coef"], counters["failed_steps"]
            for newer in states(self.path / "state"):
                if int(newer.name.removeprefix("step_")) >= first:  # damaged, or of a future that is now written anew
                    remove(newer)
            for name, length in counters["lengths"].items():
                cut(self.path / name, length)
            self.best = best_so_far(self.path / "eval.csv", cfg.kl_budget)
        else:
            for name in OWN_FILES[1:]:  # config.json is replaced in one go: it says that this is a run
                remove(self.path / name)
        write_whole(self.path / "config.json", json.dumps(describe(cfg), indent=2) + "\n")
        if self.board_type is not None:
            self.board = self.board_type(self.path / "tensorboard")
        print(f"policy {cfg.policy_name} ({size:,} weights), reward {cfg.rm_name}, on {cfg.device} in {cfg.dtype}")
        print(f"{len(parts.prompts.prompts):,} prompts of {cfg.dataset}; the run is kept in {self.path}/")
        if self.state is not None:
            print(f"going on after step {first - 1}, from {self.state}/")
        return first

    def how_to_resume(self) -> str:
        """The command that goes on with this run."""
        folder = "" if str(self.path) == TrainConfig.ckpt_dir else f" {self.path}"
        return f"python train.py --resume{folder}"

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.csv, flushed to disk, and say what looks wrong, each thing once."""
        append_row(self.path / "metrics.csv", row)
        self.failed_steps = 0 if row["updates"] else self.failed_steps + 1
        for finding in self.doctor.look(row):
            tqdm.write(f"step {row['step']}: {finding}")
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    def evaluate(self, parts: Parts, cfg: TrainConfig, step: int) -> None:
        """Append to eval.csv how the policy does on the prompts kept back; keep it as best/ if none was better."""
        noise = uniforms(cfg.seed, 0, len(parts.held_out.prompts), cfg.max_new_tokens)
        seqs = answer(parts, cfg, *parts.held_out.batch(1), noise)
        scores = score(parts, cfg, seqs)
        row = make_rollout(parts.policy, parts.reference, seqs, scores, cfg.kl_coef).metrics()
        append_row(self.path / "eval.csv", {"step": step, **row})
        within = cfg.kl_budget is None or row["kl_seq_exact"] <= cfg.kl_budget
        if step and within and row["sentiment_mean"] > self.best:
            self.best = row["sentiment_mean"]
            fresh = self.path / ".partial"
            save_policy(parts, fresh)
            replace(fresh, self.path / "best")

    def must_give_up(self) -> bool:
        """Whether several steps in a row taught nothing; the policy is still that of the last good step."""
        return self.failed_steps >= FAILED_STEPS_ALLOWED

    def add_samples(self, parts: Parts, rollout: Rollout, cfg: TrainConfig, step: int) -> None:
        """Append a few prompts with the answers of policy and base, drawn with the same random numbers."""
        base = act(parts, cfg, step, parts.reference, rows=SHOWN)
        base_scores = score(parts, cfg, base)
        answers = rollout.sequences.texts(parts.tokenizer)
        for row, (prompt, text) in enumerate(
            zip(base.prompts(parts.tokenizer), base.texts(parts.tokenizer), strict=True)
        ):
            append_row(self.path / "samples.csv", {
                "step": step, "prompt": prompt, "base": text, "policy": answers[row],
                "base_score": float(base_scores[row]), "policy_score": float(rollout.scores[row]),
            })  # fmt: skip
            if row == 0:
                shown = {"prompt": prompt, f"base   {base_scores[0]:+.2f}": text,
                         f"policy {rollout.scores[0]:+.2f}": answers[0]}  # fmt: skip
                tqdm.write("\n".join([f"step {step}", *(f"  {name:12} {one_line(x)}" for name, x in shown.items())]))
        if step < cfg.total_steps:  # the last picture is drawn when saving
            plot_curves(self.path / "metrics.csv", self.path / "curves.png")

    def save(self, parts: Parts, optimizer: Optimizer, kl: KLController, step: int) -> None:
        """Write a state to resume from, then policy, critic and tokenizer beside the old ones and in their place."""
        begun = time.perf_counter()
        lengths = {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0 for name in TABLES}
        counters: dict[str, Any] = {"step": step, "kl_coef": kl.coef, "failed_steps": self.failed_steps}
        counters["lengths"] = lengths
        state = save_state(self.path / "state", parts.policy, optimizer, counters, self.keep_last)
        fresh = self.path / ".partial"
        save_policy(parts, fresh)
        for name in ("policy_lm", "value_head.safetensors"):
            replace(fresh / name, self.path / name)
        remove(fresh)
        (state / EXPORTED).touch()
        if lengths["metrics.csv"]:
            plot_curves(self.path / "metrics.csv", self.path / "curves.png")
        self.seconds_saving += time.perf_counter() - begun

    def finish(self, cfg: TrainConfig, step: int, received: int | None) -> Path:
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
        return self.path


def save_policy(parts: Parts, folder: Path) -> None:
    """Write policy, critic and tokenizer into a new folder."""
    remove(folder)
    parts.policy.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder / "policy_lm")


def best_so_far(eval_csv: Path, kl_budget: float | None) -> float:
    """The highest sentiment among the evaluations within the KL budget, the one before training left out."""
    table = pd.read_csv(eval_csv) if eval_csv.exists() else pd.DataFrame(columns=["step", "kl_seq_exact"])
    within = table[(table["step"] > 0) & (table["kl_seq_exact"] <= (math.inf if kl_budget is None else kl_budget))]
    return float(within["sentiment_mean"].max()) if len(within) else -math.inf


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


# --- clock and signals ----------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of each phase of a step, waiting for the GPU where there is one."""

    def __init__(self, device: str) -> None:
        self.cuda, self.laps = device == "cuda", dict[str, float]()
        self.last = self._now()

    def lap(self, name: str) -> None:
        """Note the time since the lap before."""
        now = self._now()
        self.laps[name], self.last = now - self.last, now

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """The laps, response tokens per second over all of them, and peak memory (CUDA's, else the process's)."""
        tokens = int(rollout.mask.sum())
        host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if self.cuda else host_peak
        return {**self.laps, "tokens_per_second": tokens / sum(self.laps.values()), "peak_memory_mb": peak / 2**20}

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class Abandoned(BaseException):
    """The run was asked to stop while nothing had been learnt yet in this step."""


@dataclass
class Stop:
    """The signal that asked the run to stop, if one did."""

    signal: int | None = None
    abandoning: bool = False

    @contextmanager
    def may_abandon(self) -> Iterator[None]:
        """Where a request to stop need not wait: what is begun here is forgotten (raises Abandoned)."""
        self.abandoning = True
        try:
            if self.signal is not None:
                raise Abandoned
            yield
        finally:
            self.abandoning = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM stop the run at the next place where it can be saved; a second stops at once."""
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        if stop.signal is not None:
            sys.exit(128 + number)
        stop.signal = number
        with suppress(OSError, RuntimeError):  # nobody may be listening any more
            tqdm.write("stopping (again: at once)", file=sys.stderr)
        if stop.abandoning:
            raise Abandoned

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_cli(TrainConfig, main)
