"""Kills training at random moments, resumes it, and compares what is left with an undisturbed run.

    python -m experiments.torture --kills 100

SIGKILL, which no program can catch, comes at any time: while loading, sampling, learning, saving or drawing. Every
run must end with the same weights, optimiser and tables, bit for bit. So must the making of the tiny models.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from config import UserError, opt

import pandas as pd

from experiments.benchmark import Workload, make_random_models
from runtime.cli import Stopped, parse_flags, run
from runtime.hub import quiet_libraries
from runtime.terminal import progress_bar
from training.checkpoints import list_checkpoints, step_of

ROOT = Path(__file__).parent.parent
SMALL = Workload((2, 32, 2), (1, 32, 2), batch=8, prompt=8, response=8, minibatch=4)
TIMINGS = ["seconds_generate", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_mb"]


@dataclass(frozen=True, kw_only=True)
class TortureConfig:
    """Settings of `python -m experiments.torture`."""

    kills: int = opt(20, "How often to kill, over as many runs as that takes.")
    making: int = opt(0, "How often to kill the first-time making of the tiny models (half a minute each).")
    steps: int = opt(30, "PPO steps of a run.")
    seed: int = opt(0, "Seed of the moments to kill at.")


def main(argv: list[str] | None = None) -> None:
    """Kill and resume, and print what was lost (raises Stopped with code 1 if anything was)."""
    cfg = parse_flags(TortureConfig, argv, __doc__)
    if cfg.kills < 1 or cfg.steps < 2:
        raise UserError("kills must be at least 1, steps at least 2")
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        lost = torture_making(cfg, Path(folder)) if cfg.making else []
        runs, resumed, more = torture_training(cfg, Path(folder))
        lost += more
    print(f"{cfg.kills} kills in {runs} runs, resumed after steps {sorted(resumed)}; {cfg.making} while making models")
    if lost:
        raise Stopped(1, "\n".join(lost))
    print("nothing was lost: every run ended bit for bit like the undisturbed one")


def torture_training(cfg: TortureConfig, folder: Path) -> tuple[int, set[int], list[str]]:
    """How many runs there were, after which steps they were resumed, and what differed at their ends."""
    names = make_random_models(SMALL, folder / "models", vocabulary=300)
    flags = [f"--{name}={value}" for name, value in names.items()]
    flags += [
        f"--total_steps={cfg.steps}",
        "--batch_size=8",
        "--minibatch_size=4",
        "--max_prompt_len=8",
        "--lr=1e-3",
        "--max_new_tokens=8",
        "--save_every=3",
        "--sample_every=4",
        "--eval_every=5",
        "--device=cpu",
    ]
    begun = time.monotonic()
    start(flags, folder / "undisturbed").wait()
    duration = time.monotonic() - begun
    expected = remains(folder / "undisturbed")
    moments, kills, runs, resumed, lost = random.Random(cfg.seed), 0, 0, set[int](), list[str]()
    with progress_bar(title="killing", unit="kill", total=cfg.kills) as bar:
        while kills < cfg.kills:
            runs += 1
            victim = folder / f"run{runs}"
            while True:
                begun, is_first = time.monotonic(), not victim.exists()
                process = start(flags, victim)
                timeout = None if kills == cfg.kills else moments.uniform(0, 1.1) * duration
                try:
                    code = process.wait(timeout)
                    if is_first:  # the machine may be faster now, and moments after the end kill nothing
                        duration = time.monotonic() - begun
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    bar.update()
                    resumed |= {step_of(checkpoint) for checkpoint in list_checkpoints(victim / "state")[-1:]}
            found = remains(victim)
            differing = [name for name in expected if found.get(name) != expected[name]]
            if code or differing:
                lost.append(f"run {runs} ended with code {code}; differing: {', '.join(differing)}")
            shutil.rmtree(victim, ignore_errors=True)
    return runs, resumed, lost


def torture_making(cfg: TortureConfig, folder: Path) -> list[str]:
    """What differs between models made undisturbed and models whose making was killed again and again."""
    command = [sys.executable, "-c", "from pretrain.tiny_world import resolve_name; resolve_name('tiny:policy')"]

    def make(cache: Path, timeout: float | None) -> None:
        env = {**os.environ, "GPT2_PPO_CACHE": str(cache)}
        quiet = subprocess.DEVNULL
        subprocess.run(command, cwd=ROOT, env=env, stdout=quiet, stderr=quiet, timeout=timeout, check=True)

    begun = time.monotonic()
    make(folder / "made", None)
    duration, moments = time.monotonic() - begun, random.Random(cfg.seed)
    for _ in progress_bar(range(cfg.making), "killing while making models", "kill"):
        with suppress(subprocess.TimeoutExpired):  # which kills
            make(folder / "killed", moments.uniform(0.1, 0.98) * duration)
    make(folder / "killed", None)
    made, killed = (
        {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("tiny-*/*/*")}
        for cache in (folder / "made", folder / "killed")
    )
    return [f"made differently: {name}" for name in made if killed.get(name) != made[name]]


def start(flags: list[str], run: Path) -> "subprocess.Popen[bytes]":
    """Start a run, or go on with it."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, f"--ckpt_dir={run}", "--resume"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def remains(run: Path) -> dict[str, bytes]:
    """What a run leaves behind and must be the same every time: all but timings and pictures."""
    patterns = ("**/*.safetensors", "samples.csv", "eval.csv")
    kept = [path for pattern in patterns for path in sorted(run.glob(pattern))]
    found = {str(path.relative_to(run)): path.read_bytes() for path in kept}
    if (run / "metrics.csv").is_file():
        table = pd.read_csv(run / "metrics.csv", dtype=str).drop(columns=TIMINGS)
        found["metrics.csv"] = table.to_csv(index=False).encode()
    return found


if __name__ == "__main__":
    sys.exit(run(main))
