"""One start of a run: the steps that are left, what is reported and saved, and how it ends.

Everything that can cut a run short is handled here, so that the loop in train.py need not mention it. A request to stop
is obeyed between steps. It, a reward that fails and steps that learn nothing all end with what was learnt saved; a full
disk ends with the last checkpoint.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, runs_python

import pandas as pd
from safetensors import SafetensorError
from torch.optim import Optimizer
from tqdm import tqdm

from ppo import KLController, Rollout, build_optimizer, build_scaler
from reward import UNSCALED, score_title, show_score
from runtime.cli import Stopped
from runtime.device import enough_memory, keep_freed_memory, peak_memory_mb
from runtime.distributed import is_main_process, raise_on_all_ranks
from runtime.files import WINDOWS
from runtime.terminal import progress_bar
from training.checkpoints import list_checkpoints, step_of
from training.commands import eval_command, resume_command
from training.earlier_run import EarlierRun
from training.estimate import duration, note_slow_run
from training.parts import Parts
from training.phase_times import OF_STEP, PhaseTimes
from training.ranks import broadcast_state
from training.run_folder import RunFolder, open_run_folder
from training.signals import StopRequest, stop_signals

FAILED_STEPS_ALLOWED = 3  # steps in a row in which every minibatch was skipped


@contextmanager
def open_session(cfg: TrainConfig, parts: Parts, earlier: EarlierRun) -> Iterator["Session"]:
    """Begin or resume the run, hand it to the loop, and end it in good order.

    Raises UserError on wrong input, Stopped after a signal (128 + its number) or where the run cannot go on (1).
    """
    times = PhaseTimes()
    keep_freed_memory()
    optimizer = build_optimizer(parts.models.policy, cfg)
    with ExitStack() as resources:
        folder: RunFolder | None = None
        resources.enter_context(_disk_errors_stop(cfg))
        with raise_on_all_ranks():
            if is_main_process():
                folder = resources.enter_context(open_run_folder(cfg, parts, optimizer, earlier))
        own_counters = {} if folder is None else folder.counters
        counters = broadcast_state(parts.models.policy, optimizer, own_counters)
        announce(cfg, parts, counters["step"], earlier.checkpoint)
        session = Session(cfg, parts, folder, optimizer, counters, times)
        resources.enter_context(stop_signals(session.stop))
        resources.enter_context(session.bar)
        with enough_memory("batch_size or max_new_tokens"):  # outside: an update cut short by it is not saved
            try:
                yield session
            except UserError:  # such as a reward that failed: what was learnt is saved
                session.save()
                raise
        session.bar.close()
        # all ranks wait here: torchrun ends the others when one leaves, and one may still be saving
        session.stop.on_any_rank()
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
        optimizer: Optimizer,
        counters: dict[str, Any],
        times: PhaseTimes,
    ) -> None:
        self.cfg = cfg
        self.parts = parts
        self.folder = folder
        self.optimizer = optimizer
        self.times = times
        self.label = parts.models.reward.label
        self.step: int = counters["step"]  # the last one taken
        self.first_step = self.step + 1  # of this start
        self.failed_steps: int = counters["failed_steps"]
        self.evaluated: bool = counters["evaluated"]
        self.kl_controller = KLController(counters["kl_coef"], cfg.adaptive_kl_target, cfg.adaptive_kl_gain)
        self.scaler = build_scaler(parts.models.policy)
        if counters.get("loss_scale"):
            self.scaler.load_state_dict(counters["loss_scale"])
        self.saved_step: int | None = None
        self.stop = StopRequest(self.what_is_left, self.what_is_kept)
        self.step_under_way: int | None = None
        self.step_started = 0.0
        self.seconds_last_step: float | None = None
        self.seconds_last_save = 0.0
        self.bar = progress_bar(title="training", unit="step", initial=self.step, total=cfg.total_steps)

    # --- what the loop calls ---

    def steps(self) -> Iterator[int]:
        """The steps that are left, until the run is done or asked to stop; what was learnt is saved at the end."""
        for step in range(self.step + 1, self.cfg.total_steps + 1):
            if self.stop.on_any_rank():
                break
            self.step_under_way = step
            self.step_started = time.perf_counter()
            yield step
            self.seconds_last_step = time.perf_counter() - self.step_started
            self.bar.update()
            if self.failed_steps >= FAILED_STEPS_ALLOWED:
                break
        if self.saved_step != self.step:
            self.save()

    def report(self, step: int, rollout: Rollout, update: dict[str, float]) -> None:
        """Count the step as taken, append its row to metrics.csv, and steer beta."""
        self.step = step
        self.failed_steps = 0 if update["updates"] else self.failed_steps + bool(update["skipped"])
        row = {
            "step": step,
            "episodes": step * self.cfg.batch_size,
            "kl_coef": self.kl_controller.coef,
            **rollout.metrics(),
            **update,
            **rollout.seconds,
        }
        self.times.add_step(row)
        seconds = sum(row[column] for column in OF_STEP)
        row["tokens_per_second"] = int(rollout.mask.sum()) / seconds
        row["peak_memory_mb"] = peak_memory_mb(self.cfg.device)
        if self.folder is not None:
            self.folder.append_metrics(row)
        score = f"{score_title(self.label)} {show_score(row['score_mean'], self.label)}"
        postfix = f"{score}, KL {row['kl_seq']:.2f}, beta {self.kl_controller.coef:.3g}"
        self.bar.set_postfix_str(postfix, refresh=False)
        self.kl_controller.update(row["kl_seq"])

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens after this one; the last one counts."""
        return every > 0 and (self.step % every == 0 or self.step == self.cfg.total_steps)

    def add_samples(self, make_rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Append samples, print the first, and draw the curves so far."""
        if self.folder is None:
            return
        rows = make_rows()
        self.folder.append_samples(rows)
        first = rows[0]
        lines = [f"step {self.step}", f"  {'prompt':12} {one_line(first['prompt'])}"]
        for name in ("base", "policy"):
            title = f"{name:6} {show_score(first[f'{name}_score'], self.label)}"
            lines.append(f"  {title:12} {one_line(first[name])}")
        tqdm.write("\n".join(lines))
        if self.step < self.cfg.total_steps:  # the last picture is drawn when saving
            self.folder.plot(self.step)

    def add_evaluation(self, evaluate: Callable[[], dict[str, float]]) -> None:
        """Make an evaluation on the held-out prompts, on all ranks, and keep it, and the policy if it is the best."""
        with self.times.measured("evaluating"):
            row = evaluate()
        self.evaluated = True
        if self.folder is not None:
            with self.times.measured("saving"):
                self.folder.append_evaluation(self.step, row)

    def save(self) -> None:
        """Save a checkpoint and the policy as they are after the last step taken."""
        self.saved_step = self.step
        if self.folder is None:
            return
        counters = {
            "step": self.step,
            "kl_coef": self.kl_controller.coef,
            "failed_steps": self.failed_steps,
            "score_scale": asdict(self.parts.models.score_scale),
            "loss_scale": self.scaler.state_dict(),
        }
        begun = time.perf_counter()
        with self.times.measured("saving"):
            self.folder.save(counters)
        self.seconds_last_save = time.perf_counter() - begun

    # --- how it ends ---

    def what_is_left(self) -> str:
        """What is done before the run ends where it is asked to stop now, and about how long that takes."""
        if self.step_under_way is None:
            return "finishing what is under way, then saving"
        line = f"finishing step {self.step_under_way}, then saving"
        if self.seconds_last_step is None:
            return line
        seconds_left = self.seconds_last_step - (time.perf_counter() - self.step_started)
        return f"{line} (about {duration(max(1.0, seconds_left + self.seconds_last_save))})"

    def what_is_kept(self) -> str:
        """From where the run can be resumed where it is killed now."""
        checkpoints = list_checkpoints(Path(self.cfg.ckpt_dir) / "state")
        start = f"after step {step_of(checkpoints[-1])}" if checkpoints else "from the start"
        return f"{resume_command(self.cfg)} goes on {start}"

    def finish(self) -> None:
        """Print where things are (raises Stopped after a signal or after too many failed steps)."""
        cfg = self.cfg
        if self.stop.signal is not None:
            name = signal.Signals(self.stop.signal).name
            line = f"stopped after step {self.step} by {name}; saved. To go on: {resume_command(cfg)}"
            raise Stopped(128 + self.stop.signal, line)
        if self.failed_steps >= FAILED_STEPS_ALLOWED:
            raise Stopped(
                1,
                f"error: stopped after step {self.step}: {FAILED_STEPS_ALLOWED} steps in a row had no finite loss; the "
                f"last good policy is saved in {cfg.ckpt_dir}/; lower --lr, or check the reward for NaN",
            )
        if self.folder is None:
            return
        if cfg.eval_every:
            print(before_after(self.folder.path / "eval.csv", self.label))
        print(self.times.line(self.first_step))
        command = eval_command(self.folder.path / "policy_lm", cfg.rm_name)
        print(f"done: see {cfg.ckpt_dir}/curves.png and samples.csv; compare with the base: {command}")


def announce(cfg: TrainConfig, parts: Parts, step: int, checkpoint: Path | None) -> None:
    """Print what is about to happen."""
    policy = parts.models.policy
    size = sum(p.numel() for module in (policy.lm, policy.value_head) for p in module.parameters())
    print(f"policy {cfg.policy_name} ({size:,} weights), reward {cfg.rm_name}, on {cfg.device} in {cfg.dtype}")
    print(f"{len(parts.prompts.prompts):,} prompts of {cfg.dataset}; the run is kept in {cfg.ckpt_dir}/")
    if runs_python(cfg.rm_name) and not cfg.reward_every:
        critic = "a critic of its own, " if cfg.critic == "own" else ""
        falling = f" (from 1, over {cfg.lambda_warmup_steps} steps)" if cfg.lambda_warmup_steps else ""
        print(
            f"a Python reward judges finished responses: it is paid on their last token, with {critic}gae_lambda "
            f"{cfg.gae_lambda:g}{falling} and lr {cfg.lr:g}"
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
    rows = [
        ("score_mean", f"mean {score_title(label)}", "9.4g" if label is None else "9.2f"),
        ("positive_rate", f"share {label}", "9.2f"),
        ("kl_seq_exact", "KL, nats", "9.2f"),
        ("entropy", "entropy, nats per token", "9.2f"),
        ("response_len", "response length", "9.2f"),
    ]
    lines = [f"{'held-out prompts':24}{'before':>9}{'after':>9}"]
    for column, title, form in rows:
        if column in table:
            lines.append(f"{title:24}{table[column].iloc[0]:{form}}{table[column].iloc[-1]:{form}}")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """A text on one line, cut to the width of the terminal."""
    text = " ".join(text.split())
    width = max(40, shutil.get_terminal_size((120, 24)).columns - 16)
    return text if len(text) <= width else text[: width - 1] + "…"
