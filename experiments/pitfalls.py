"""A museum of classic bugs of PPO on language models: plants one at a time, trains with it, and shows what it costs.

    python -m experiments.pitfalls --bug shift                  one bug: what the self-check says of it
    python -m experiments.pitfalls --bug shift --self_check false          trains with it all the same, and evaluates
    python -m experiments.pitfalls --seeds 0,1,2,3              all of them, without self-check, beside the right run
    python -m experiments.pitfalls --draw results/pitfalls.csv  only the table and the figure

The policy that a run leaves is evaluated without the bug. metrics.csv is what the run with the bug reported itself.
Finished runs are kept, so the same command again does what is left.
"""

import itertools
import json
import random
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, opt

import pandas as pd

import train
from data import load_examples
from experiments.bugs import BUGS, RIGHT, Bug, find_bug, train_with
from experiments.pictures import draw_pitfalls
from experiments.planting import planted
from experiments.runner import (
    TRAINED,
    Job,
    evaluate_command,
    figures,
    markdown_row,
    mean_and_range,
    read_runs,
    run_job,
    run_jobs,
)
from pretrain.tiny_world import resolve_name
from runtime.cli import numbers, parse_config, parse_flags, run, words
from runtime.files import remove, write_atomic
from runtime.saved_run import SavedRun
from training.diagnostics import Diagnostics

TRAIN = "--preset=tiny --total_steps=12 --lr=2e-4 --eval_every=0 --sample_every=12 --save_every=6"
EVALUATE = "--dataset=tiny:reviews --min_prompt_len=10 --max_prompt_len=10 --n_samples=200"
TAIL = 4  # steps at the end over which a curve is averaged
JUDGED = [  # columns of metrics.csv that may give a bug away; explained_var means nothing once all scores are alike
    "score_mean",
    "kl_seq",
    "response_len",
    "entropy",
    "approx_kl",
    "clip_frac",
    "ratio_max",
    "value_loss",
    "grad_norm",
]
SHOWN = {  # heading -> column of the table, its factor, and how it is written
    "mean score": ("score", 1, "{:+.2f}"),
    "score as reported": ("reported_score", 1, "{:+.2f}"),
    "KL, nats": ("kl", 1, "{:.2f}"),
    "KL as reported": ("reported_kl", 1, "{:.2f}"),
    "length": ("length", 1, "{:.1f}"),
    "second judge: positive, %": ("judge_positive", 100, "{:.0f}"),
}


@dataclass(frozen=True, kw_only=True)
class PitfallsConfig:
    """Settings of `python -m experiments.pitfalls`."""

    bug: str | None = opt(None, "Show this bug alone, or right for the run without one (default: train all of them).")
    self_check: bool = opt(True, "With --bug: only show what the self-check says. false trains with the bug.")
    seeds: str = opt("0", "Seeds for each bug.")
    train: str = opt(TRAIN, "Flags of train.py; without --dataset the prompts are openings of 4 to 14 words.")
    evaluate: str = opt(EVALUATE, "Flags of eval.py.")
    folder: str = opt("pitfalls", "Where the runs are kept.", path="written")
    csv: str = opt("results/pitfalls.csv", "The table; _steps.csv and .png are written beside it.", path="written")
    draw: str | None = opt(None, "Only print and draw this table.", path="read")


def main(argv: list[str] | None = None) -> None:
    """Show one bug, or train what is missing of all of them, then print and draw (raises UserError)."""
    cfg = parse_flags(PitfallsConfig, argv, __doc__)
    if parse_config(TrainConfig, words("train", cfg.train)).kl_in_loss:
        raise UserError("train: kl_in_loss must be false, because the bugs are in the formula with KL in the rewards")
    seeds = numbers("seeds", cfg.seeds, int)
    if cfg.draw is None and cfg.bug is not None:
        show(cfg, find_bug(cfg.bug), seeds[0])
        return
    failed = 0
    if cfg.draw is None:
        jobs = [job_of(cfg, bug, seed) for seed, bug in itertools.product(seeds, [None, *BUGS])]
        failed = run_jobs(jobs, Path(cfg.csv), figures_of_bug)
    path = Path(cfg.draw or cfg.csv)
    runs, steps = read_runs(path)
    if steps is None or not len(runs):
        raise UserError(f"{path} has no runs, or no table of their steps beside it: train them first")
    print(markdown(runs, steps))
    names = [name for name in runs.setting.unique() if name != RIGHT]
    draw_pitfalls(runs, steps, names, RIGHT, path.with_suffix(".png"))
    if failed:
        raise UserError(f"{failed} runs failed, see above and log.txt in their folders")


def show(cfg: PitfallsConfig, bug: Bug | None, seed: int) -> None:
    """Print the page's section on a bug and what the self-check says; or train with it and print what came of it."""
    print(f"{name_of(bug)}\n\n{bug.section if bug else 'Nothing is wrong.'}\n")
    if cfg.self_check:
        show_self_check(cfg, bug, seed)
        return
    job = job_of(cfg, bug, seed)
    remove(job.folder)
    train_with(bug, [*train_flags(cfg, bug, seed), f"--ckpt_dir={job.folder}"])
    write_atomic(job.folder / TRAINED, shlex.join(job.train))
    row = run_job(job, figures_of_bug)
    if "failed" in row:
        raise UserError(row["failed"])
    print(
        f"as its last steps reported: score {row['reported_score']:+.2f}, KL {row['reported_kl']:.2f}, "
        f"length {row['reported_length']:.1f}, warnings: {row['warnings'] or 'none'}"
    )
    print(f"measured without the bug: score {row['score']:+.2f}, KL {row['kl']:.2f}, length {row['length']:.1f}")
    print(row["verdict"])


def show_self_check(cfg: PitfallsConfig, bug: Bug | None, seed: int) -> None:
    """Print the self-check of a run with a bug, and the test that notices what it passes."""
    try:
        with planted(bug):
            train.main(parse_config(TrainConfig, [*train_flags(cfg, bug, seed), "--check"]))
        if bug:
            print(f"The self-check does not see it. This test does: python -m pytest {bug.test}")
    except UserError as error:
        print(error)
    print("To train with it all the same: --self_check false")


# --- runs -----------------------------------------------------------------------------------------------------------


def name_of(bug: Bug | None) -> str:
    """A bug's name, also of none."""
    return RIGHT if bug is None else bug.name


def job_of(cfg: PitfallsConfig, bug: Bug | None, seed: int) -> Job:
    """The commands that train with a bug and evaluate without it."""
    name = name_of(bug)
    folder = Path(cfg.folder) / f"{name}_seed{seed}"
    flags = [*train_flags(cfg, bug, seed), f"--ckpt_dir={folder}"]
    evaluate = evaluate_command(words("evaluate", cfg.evaluate), folder)
    return Job(name, seed, folder, ["python", "-m", "experiments.bugs", name, *flags], evaluate, resumable=False)


def train_flags(cfg: PitfallsConfig, bug: Bug | None, seed: int) -> list[str]:
    """The flags of train.py for a run."""
    flags = [*words("train", cfg.train), *(bug.flags if bug else ()), f"--seed={seed}"]
    if "--dataset" in cfg.train:
        return flags
    return [*flags, f"--dataset={write_openings(Path(cfg.folder))}", "--min_prompt_len=4", "--max_prompt_len=16"]


def write_openings(folder: Path) -> str:
    """A file of prompts of 4 to 14 words, so that batches have padding; those of the tiny preset are equally long."""
    path = folder / "openings.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    texts, _ = load_examples(resolve_name("tiny:reviews"), "train", "text")
    lengths = random.Random(0)
    rows = [json.dumps({"text": " ".join(text.split()[: lengths.randint(4, 14)])}) for text in texts]
    write_atomic(path, "\n".join(rows) + "\n")
    return str(path)


def figures_of_bug(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the evaluation measured, and what the run reported: means of its last steps, and the warnings it printed."""
    metrics = pd.read_csv(folder / "metrics.csv")
    tail = metrics.tail(TAIL)
    diagnostics = Diagnostics(TrainConfig(**SavedRun(folder).settings))
    for row in metrics.to_dict("records"):
        diagnostics.warnings(row)
    return {
        **figures(summary, folder),
        "reported_score": tail.score_mean.mean(),
        "reported_kl": tail.kl_seq.mean(),
        "reported_length": tail.response_len.mean(),
        "warnings": " ".join(sorted(diagnostics.given)),
    }


# --- the table ------------------------------------------------------------------------------------------------------


def markdown(runs: pd.DataFrame, steps: pd.DataFrame) -> str:
    """A row for each bug: means over seeds (lowest to highest), whether the self-check refuses it, what else tells."""
    heads = ["bug", "self-check", *SHOWN, "more positive than base", "would the curves have told?"]
    lines = [markdown_row(*heads), markdown_row(*["---"] * len(heads))]
    base = runs[:1].filter(regex="^base_").rename(columns=lambda name: name.removeprefix("base_"))
    lines.append(markdown_row("base", "", *cells(base), "", ""))
    for name in sorted(runs.setting.unique(), key=lambda name: name != RIGHT):  # the right run first
        seeds = runs[runs.setting == name]
        better = seeds.verdict.str.startswith("The policy writes more positively").sum()
        refuses = told = ""
        if bug := find_bug(name):
            refuses = "refuses" if bug.fact else "passes"
            told = what_tells(name, seeds, steps)
        lines.append(markdown_row(f"`{name}`", refuses, *cells(seeds), f"{better} of {len(seeds)}", told))
    return "\n".join(lines)


def cells(runs: pd.DataFrame) -> list[str]:
    """The columns that are shown of the runs of one bug, blank where a run lacks the figure."""
    texts = []
    for column, factor, form in SHOWN.values():
        is_known = column in runs and runs[column].notna().all()
        texts.append(mean_and_range(factor * runs[column], form) if is_known else "")
    return texts


def what_tells(name: str, runs: pd.DataFrame, steps: pd.DataFrame) -> str:
    """The warnings that runs with a bug printed, and the curves that stand out beside the right run; no if neither."""
    warned = runs.warnings.dropna()
    all_warnings = ", ".join(sorted({warning for text in warned for warning in text.split()}))
    if len(warned) == len(runs):
        return f"yes, a warning: {all_warnings}"
    hints = []
    if len(warned):
        hints.append(f"a warning in {len(warned)} of {len(runs)} runs: {all_warnings}")
    if outside := standing_out(name, steps):
        hints.append(f"beside a right run: {', '.join(outside)}")
    return "; ".join(hints) or "no"


def standing_out(name: str, steps: pd.DataFrame) -> list[str]:
    """The columns of metrics.csv that end outside the right runs' range in every run with a bug.

    Each is averaged over its last steps, and the range is widened by its own width on both sides.
    """
    ends = steps.groupby(["setting", "seed"])[JUDGED].apply(lambda run: run.tail(TAIL).mean())
    low, high = ends.loc[RIGHT].min(), ends.loc[RIGHT].max()
    width = high - low
    above = (ends.loc[name] > high + width).all()
    below = (ends.loc[name] < low - width).all()
    return [column for column in JUDGED if above[column] or below[column]]


if __name__ == "__main__":
    sys.exit(run(main))
