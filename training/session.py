"""One start of a run: the steps that are left, what is reported and saved, and how it ends.

Everything that can cut a run short is handled here, so that the loop in train.py need not mention it. Sampling, scoring
and the gradients before the first optimiser step can be discarded: a request to stop is obeyed there at once. From the
first optimiser step on the update is finished, or, if updates take long, undone. A reward that fails, a full disk and
steps that learn nothing all end with what was learnt saved.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, python_reward

import pandas as pd
from safetensors import SafetensorError
from tqdm import tqdm

from ppo import KLController, Rollout, build_optimizer, build_scaler
from reward import UNSCALED, score_title, show_score
from runtime.cli import Interrupted, Stopped
from runtime.device import enough_memory, keep_freed_memory, peak_memory_mb
from runtime.distributed import all_reduce_max, is_main_process, raise_on_all_ranks
from runtime.files import WINDOWS
from runtime.terminal import progress_bar
from training.checkpoints import Snapshot
from training.commands import eval_command, resume_command
from training.estimate import note_slow_run
from training.parts import Parts
from training.ranks import broadcast_state
from training.run_folder import Found, RunFolder, open_run_folder
from training.signals import StopRequest, stop_signals

FAILED_STEPS_ALLOWED = 3  # steps in a row in which every minibatch was skipped
SLOW_UPDATE = 8.0  # seconds: an update that takes longer is undone on a request to stop, and not finished


@contextmanager
def open_session(cfg: TrainConfig, parts: Parts, found: Found) -> Iterator["Session"]:
    """Begin or resume the run, hand it to the loop, and end it in good order.

    Raises UserError on wrong input, Stopped after a signal (128 + its number) or where the run cannot go on (1).
    """
    keep_freed_memory()
    optimizer = build_optimizer(parts.models.policy, cfg)
    with ExitStack() as held:
        folder: RunFolder | None = None
        with raise_on_all_ranks(), _disk_errors_stop(cfg):
            if is_main_process():
                folder = held.enter_context(open_run_folder(cfg, parts, optimizer, found))
            stop = held.enter_context(stop_signals())
        known = {} if folder is None else {**folder.counters, "evaluated": folder.evaluated}
        counters = broadcast_state(parts.models.policy, optimizer, known)
        announce(cfg, parts, counters["step"], found.checkpoint)
        session = Session(cfg, parts, folder, optimizer, stop, counters)
        held.enter_context(session.bar)
        with _disk_errors_stop(cfg), enough_memory("batch_size or max_new_tokens"):
            try:
                yield session
            except Interrupted:
                session.undo_step()
                session.save()
            except UserError:  # such as a reward that failed: what was learnt is saved
                session.save()
                raise
        session.bar.close()
        all_reduce_max(0.0)  # a barrier: torchrun ends the others when one leaves, and one may still be saving
        session.finish()


@contextmanager
def _disk_errors_stop(cfg: TrainConfig) -> Iterator[None]:
    """Turn a full disk and the like into one line that says how to resume (raises Stopped)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        remedy = "close what has it open" if WINDOWS and isinstance(error, PermissionError) else "make room"
        line = f"error: ckpt_dir={cfg.ckpt_dir} cannot be written ({error}): {remedy}, then {resume_command(cfg)}"
        raise Stopped(1, line) from error


class Session:
    """The run as the loop sees it; every rank has one, and the main process's has the run folder."""

    def __init__(
        self,
        cfg: TrainConfig,
        parts: Parts,
        folder: RunFolder | None,
        optimizer: Any,
        stop: StopRequest,
        counters: dict[str, Any],
    ) -> None:
        """Start after the step that counters name."""
        self.cfg, self.parts, self.folder, self.optimizer, self.stop = cfg, parts, folder, optimizer, stop
        self.label = parts.models.reward.label
        self.step: int = counters["step"]
        self.failed_steps: int = counters["failed_steps"]
        self.evaluated: bool = counters["evaluated"]
        self.kl = KLController(counters["kl_coef"], cfg.adaptive_kl_target, cfg.adaptive_kl_gain)
        self.scaler = build_scaler(parts.models.policy)
        if counters.get("loss_scale"):
            self.scaler.load_state_dict(counters["loss_scale"])
        self.loss_scale = self.scaler.state_dict()  # after the last step taken: an update may be undone
        self.saved_step: int | None = None
        self.snapshot: Snapshot | None = None
        self.step_begun, self.seconds_update = False, 0.0
        self.bar = progress_bar(title="training", unit="step", initial=self.step, total=cfg.total_steps)
        optimizer.register_step_pre_hook(lambda *_: self._before_optimizer_step())

    # --- what the loop calls ---

    def steps(self) -> Iterator[int]:
        """The steps that are left, until the run is done or asked to stop."""
        if self.step >= self.cfg.total_steps:  # killed after its last checkpoint, before the policy was exported
            self.save()
        for step in range(self.step + 1, self.cfg.total_steps + 1):
            self.step_begun, self.snapshot = True, None
            self.stop.allow_interruption()
            yield step
            self.bar.update()
            if self.stop.on_any_rank() or self.failed_steps >= FAILED_STEPS_ALLOWED:
                if self.saved_step != self.step:
                    self.save()
                return

    def report(self, step: int, rollout: Rollout, update: dict[str, float]) -> None:
        """Count the step as taken, append its row to metrics.csv, and steer beta."""
        self.stop.interruptible, self.step = False, step
        self.failed_steps = 0 if update["updates"] else self.failed_steps + bool(update["skipped"])
        self.loss_scale = self.scaler.state_dict()
        row = {
            "step": step,
            "episodes": step * self.cfg.batch_size,
            "kl_coef": self.kl.coef,
            **rollout.metrics(),
            **update,
            **rollout.seconds,
        }
        seconds = sum(row[f"seconds_{phase}"] for phase in ("generate", "score", "update"))
        row |= {
            "tokens_per_second": int(rollout.mask.sum()) / seconds,
            "peak_memory_mb": peak_memory_mb(self.cfg.device),
        }
        self.seconds_update = row["seconds_update"]
        if self.folder is not None:
            self.folder.append_metrics(row)
        score = f"{score_title(self.label)} {show_score(row['score_mean'], self.label)}"
        postfix = f"{score}, KL {row['kl_seq']:.2f}, beta {self.kl.coef:.3g}"
        self.bar.set_postfix_str(postfix, refresh=False)
        self.kl.update(row["kl_seq"])

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens after this one; the last one counts."""
        return every > 0 and (self.step % every == 0 or self.step == self.cfg.total_steps)

    def add_samples(self, make_rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Append samples, print the first, and draw the curves so far."""
        if self.folder is None:
            return
        rows = make_rows()
        self.folder.append_samples(rows)
        lines = {"prompt": rows[0]["prompt"]}
        for name in ("base", "policy"):
            lines[f"{name:6} {show_score(rows[0][f'{name}_score'], self.label)}"] = rows[0][name]
        tqdm.write("\n".join([f"step {self.step}", *(f"  {name:12} {one_line(x)}" for name, x in lines.items())]))
        if self.step < self.cfg.total_steps:  # the last picture is drawn when saving
            self.folder.plot()

    def add_evaluation(self, row: dict[str, float]) -> None:
        """Keep an evaluation on the held-out prompts, and the policy if it is the best so far."""
        self.evaluated = True
        if self.folder is not None:
            self.folder.append_evaluation(self.step, row)

    def save(self) -> None:
        """Save a checkpoint and the policy as they are after the last step taken."""
        self.saved_step = self.step
        if self.folder is not None:
            self.folder.save(
                {
                    "step": self.step,
                    "kl_coef": self.kl.coef,
                    "failed_steps": self.failed_steps,
                    "score_scale": asdict(self.parts.models.score_scale),
                    "loss_scale": self.loss_scale,
                }
            )

    # --- interruption and end ---

    def _before_optimizer_step(self) -> None:
        """Called before every optimiser step: at the first one of an update, decide whether it can be undone."""
        if not self.step_begun:
            return
        self.step_begun = False
        if not self.stop.interruptible:
            return
        if self.seconds_update > SLOW_UPDATE:
            self.snapshot = Snapshot(self.parts.models.policy, self.optimizer)
        else:
            self.stop.interruptible = False

    def undo_step(self) -> None:
        """Restore weights and optimiser as they were before the step that was interrupted."""
        self.stop.interruptible = False
        if self.snapshot is not None:
            self.snapshot.restore()

    def finish(self) -> None:
        """Print where things are (raises Stopped after a signal or after too many failed steps)."""
        cfg, path = self.cfg, self.cfg.ckpt_dir
        if self.stop.signal is not None:
            name = signal.Signals(self.stop.signal).name
            line = f"stopped after step {self.step} by {name}; saved. To go on: {resume_command(cfg)}"
            raise Stopped(128 + self.stop.signal, line)
        if self.failed_steps >= FAILED_STEPS_ALLOWED:
            raise Stopped(
                1,
                f"error: stopped after step {self.step}: {FAILED_STEPS_ALLOWED} steps in a row had no finite loss; the "
                f"last good policy is saved in {path}/; lower --lr, or check the reward for NaN",
            )
        if self.folder is None:
            return
        if cfg.eval_every:
            print(before_after(self.folder.path / "eval.csv", self.label))
        share = self.folder.seconds_saving / (time.perf_counter() - self.folder.started)
        print(f"saving took {self.folder.seconds_saving:.1f} s, {share:.1%} of the time")
        command = eval_command(self.folder.path / "policy_lm", cfg.rm_name)
        print(f"done: see {path}/curves.png and samples.csv; compare with the base: {command}")


def announce(cfg: TrainConfig, parts: Parts, step: int, checkpoint: Path | None) -> None:
    """Print what is about to happen."""
    size = sum(p.numel() for p in parts.models.policy.parameters())
    print(f"policy {cfg.policy_name} ({size:,} weights), reward {cfg.rm_name}, on {cfg.device} in {cfg.dtype}")
    print(f"{len(parts.prompts.prompts):,} prompts of {cfg.dataset}; the run is kept in {cfg.ckpt_dir}/")
    if python_reward(cfg.rm_name) and not cfg.reward_every:
        print(
            f"a Python reward judges finished responses: it is paid on their last token, with gae_lambda "
            f"{cfg.gae_lambda:g} and lr {cfg.lr:g}"
        )
    scale = parts.models.score_scale
    if scale != UNSCALED:
        print(f"scores are paid as (score {-scale.mean:+.4g}) / {scale.std:.4g}, which standardises those of the base")
    if note := note_slow_run(parts.models, cfg, cfg.total_steps - step):
        print(note)
    if checkpoint is not None:
        print(f"resuming after step {step}, from {checkpoint}/")


def before_after(eval_csv: Path, label: str | None) -> str:
    """The first and the last evaluation, side by side; label is the one whose probability is scored, if any."""
    table = pd.read_csv(eval_csv)
    names = {
        "score_mean": f"{score_title(label)} mean",
        "positive_rate": f"share {label}",
        "kl_seq_exact": "KL, nats",
        "entropy": "entropy, nats per token",
        "response_len": "response length",
    }
    lines = [f"{'held-out prompts':24}{'before':>9}{'after':>9}"]
    for column, name in names.items():
        if column in table:
            form = "9.4g" if column == "score_mean" and label is None else "9.2f"
            lines.append(f"{name:24}{table[column].iloc[0]:{form}}{table[column].iloc[-1]:{form}}")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """A text on one line, cut to the width of the terminal."""
    text = " ".join(text.split())
    width = max(40, shutil.get_terminal_size((120, 24)).columns - 16)
    return text if len(text) <= width else text[: width - 1] + "…"
