"""Kills training at random moments, resumes it, and compares what is left with an undisturbed run.

    python -m experiments.torture --kills 100

SIGKILL, which no program can catch, comes at any time: while loading, sampling, learning, saving or drawing. Every
run must end with the same weights, optimiser and tables, bit for bit.
"""

import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from config import UserError, opt

import pandas as pd

from experiments.random_models import Workload, make_random_models
from experiments.runner import ROOT
from runtime.cli import Stopped, parse_flags, run
from runtime.hub import quiet_libraries
from runtime.terminal import progress_bar
from training.checkpoints import list_checkpoints, step_of

SMALL = Workload((2, 32, 2), (1, 32, 2), batch=8, prompt=8, response=8, minibatch=4)
SETTINGS = {
    "batch_size": SMALL.batch,
    "minibatch_size": SMALL.minibatch,
    "max_prompt_len": SMALL.prompt,
    "max_new_tokens": SMALL.response,
    "lr": 1e-3,
    "save_every": 3,
    "sample_every": 4,
    "eval_every": 5,
    "device": "cpu",
}
TIMINGS = ["seconds_generate", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_mb"]


@dataclass(frozen=True, kw_only=True)
class TortureConfig:
    """Settings of `python -m experiments.torture`."""

    kills: int = opt(20, "How often to kill, over as many runs as that takes.")
    steps: int = opt(30, "PPO steps of a run.")
    seed: int = opt(0, "Seed of the moments to kill at.")


def main(argv: list[str] | None = None) -> None:
    """Kill and resume, and print what was lost (raises Stopped with code 1 if anything was)."""
    cfg = parse_flags(TortureConfig, argv, __doc__)
    if cfg.kills < 1 or cfg.steps < 2:
        raise UserError("kills must be at least 1, steps at least 2")
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        lost = torture(cfg, Path(folder))
    if lost:
        raise Stopped(1, "\n".join(lost))
    print("nothing was lost: every run ended bit for bit like the undisturbed one")


def torture(cfg: TortureConfig, folder: Path) -> list[str]:
    """Kill runs again and again, until so many kills are done and the last run has ended; returns what was lost."""
    settings = {**SETTINGS, **make_random_models(SMALL, folder / "models", vocabulary=300), "total_steps": cfg.steps}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    begun = time.monotonic()
    start(flags, folder / "undisturbed").wait()
    duration = time.monotonic() - begun
    expected = remains(folder / "undisturbed")

    moments = random.Random(cfg.seed)
    kills, runs, resumed, lost = 0, 0, set[int](), list[str]()
    with progress_bar(title="killing", unit="kill", total=cfg.kills) as bar:
        while kills < cfg.kills:
            runs += 1
            victim = folder / f"run{runs}"
            code = None
            while code is None:
                begun, is_first = time.monotonic(), not victim.exists()
                process = start(flags, victim)
                timeout = None if kills == cfg.kills else moments.uniform(0, 1.1) * duration
                try:
                    code = process.wait(timeout)
                    if is_first:  # the machine may be faster now, and moments after the end kill nothing
                        duration = time.monotonic() - begun
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    bar.update()
                    resumed |= {step_of(checkpoint) for checkpoint in list_checkpoints(victim / "state")[-1:]}
            left = remains(victim)
            differing = [name for name in expected if left.get(name) != expected[name]]
            if code or differing:
                lost.append(f"run {runs} ended with code {code}; differing: {', '.join(differing)}")
            shutil.rmtree(victim, ignore_errors=True)
    print(f"{kills} kills in {runs} runs, resumed after steps {sorted(resumed)}")
    return lost


def start(flags: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a run, or go on with it."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, f"--ckpt_dir={folder}", "--resume"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def remains(folder: Path) -> dict[str, str]:
    """The SHA-256 of all that a run leaves behind and that must be the same every time: not timings, not pictures."""
    patterns = ("**/*.safetensors", "samples.csv", "eval.csv")
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    left = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    if (folder / "metrics.csv").is_file():
        table = pd.read_csv(folder / "metrics.csv", dtype=str).drop(columns=TIMINGS)
        left["metrics.csv"] = table.to_csv(index=False).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in left.items()}


if __name__ == "__main__":
    sys.exit(run(main))
