"""Settings times seeds: trains each combination, evaluates all alike, and keeps one table of the figures.

    python -m experiments.study --grid 'lr=1e-5,2e-5 kl_coef=0.1' --seeds 0,1,2 --csv results/study.csv
    python -m experiments.study --peer 'python other.py --seed {seed} --out {folder}/policy_lm' --seeds 0,1 --csv …
    python -m experiments.study --draw results/study.csv          only the table and the picture

Further flags of train.py and eval.py go into --train and --evaluate. Finished runs are kept and interrupted ones are
resumed, so the same command again does what is left. --jobs runs at a time share the cores.
"""

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from config import UserError, opt

import numpy as np
import pandas as pd
from tqdm import tqdm

from evaluation.summary import summarise
from experiments.pictures import draw_study
from experiments.runner import (
    KEY,
    Job,
    call,
    evaluate_command,
    figures,
    markdown_row,
    mean_and_range,
    read_runs,
    run_jobs,
    store,
)
from runtime.cli import numbers, parse_flags, run, words
from runtime.files import read_table

UNSAFE = r'[ /\\:*?"<>|]'  # in the name of a folder, on one system or another
SHOWN = {  # column of the table -> its name, its factor, and how it is written
    "positive": ("positive, %", 100, "{:.1f}"),
    "base_score": ("base's mean score", 1, "{:+.2f}"),
    "score": ("mean score", 1, "{:+.2f}"),
    "win_rate": ("win-rate, %", 100, "{:.1f}"),
    "kl": ("KL, nats", 1, "{:.2f}"),
    "optimal_share": ("of the best gain, %", 100, "{:.0f}"),
    "judge_positive": ("second judge: positive, %", 100, "{:.1f}"),
    "length_ratio": ("length / base's", 1, "{:.2f}"),
}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of `python -m experiments.study`."""

    grid: str = opt("", "Settings to cross: name=a,b name=c,d. Empty: train.py's defaults.")
    seeds: str = opt("0", "Seeds for each setting.")
    train: str = opt("", "Further flags of train.py, the same for all runs.")
    evaluate: str = opt("", "Further flags of eval.py, the same for all runs.")
    peer: str | None = opt(
        None,
        "Another program instead of train.py; {seed} and {folder} are filled in.",
        heading="Another program instead of train.py",
    )
    peer_name: str = opt("peer", "Its name in the table.")
    frontier: int = opt(
        0,
        "Base responses per prompt, drawn once for all runs, for the best possible reward.",
        heading="What is measured, and where it is kept",
    )
    jobs: int = opt(1, "Runs at a time.")
    folder: str = opt("study", "Where the runs are kept.", path="written")
    csv: str = opt("study.csv", "The table; a picture of the same name is drawn beside it.", path="written")
    draw: str | None = opt(None, "Only print and draw this table.", path="read")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print and draw (raises UserError, at the end, where runs failed)."""
    cfg = parse_flags(StudyConfig, argv, __doc__)
    if cfg.jobs < 1:
        raise UserError(f"jobs={cfg.jobs} must be at least 1")
    if cfg.frontier < 0 or cfg.frontier == 1:
        raise UserError(f"frontier={cfg.frontier} must be 0, or 2 and more")
    failed = 0
    if cfg.draw is None:
        seeds = numbers("seeds", cfg.seeds, int)
        jobs = [job_of(cfg, setting, seed) for setting, seed in itertools.product(settings(cfg), seeds)]
        failed = run_jobs(jobs, Path(cfg.csv), figures, cfg.jobs)
        add_optimal_share(cfg)
    path = Path(cfg.draw or cfg.csv)
    runs, steps = read_runs(path)
    print(markdown(runs))
    draw_study(runs, steps, path.with_suffix(".png"))
    if failed:
        raise UserError(f"{failed} of {len(jobs)} runs failed, see above and log.txt in their folders")


# --- runs -----------------------------------------------------------------------------------------------------------


def settings(cfg: StudyConfig) -> list[tuple[str, ...]]:
    """The flags of each setting: every combination of the values in the grid (raises UserError)."""
    if cfg.peer:
        return [()]
    choices = []
    for word in words("grid", cfg.grid):
        name, equals, values = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"grid={word!r} is not understood: write name=a,b")
        choices.append([f"--{name}={value}" for value in values.split(",")])
    return list(itertools.product(*choices))


def job_of(cfg: StudyConfig, setting: Sequence[str], seed: int) -> Job:
    """The commands that train one setting with one seed, or another program, and evaluate what comes of it."""
    if cfg.peer:
        name = cfg.peer_name
        folder = folder_of(cfg, name, seed)
        peer = words("peer", cfg.peer)
        train = [word.replace("{seed}", str(seed)).replace("{folder}", str(folder)) for word in peer]
    else:
        name = " ".join(flag.removeprefix("--") for flag in setting) or "defaults"
        folder = folder_of(cfg, name, seed)
        flags = [*words("train", cfg.train), *setting]
        train = ["python", "train.py", *flags, f"--seed={seed}", f"--ckpt_dir={folder}", "--resume"]
    reward = [flag for flag in setting if flag.startswith("--rm_name=")]  # a Python reward must be named each time
    evaluate = evaluate_command([*words("evaluate", cfg.evaluate), *reward], folder)
    return Job(name, seed, folder, train, evaluate)


def folder_of(cfg: StudyConfig, setting: str, seed: int) -> Path:
    """Where a run is kept."""
    return Path(cfg.folder) / f"{re.sub(UNSAFE, '_', setting)}_seed{seed}"


# --- the best possible ----------------------------------------------------------------------------------------------


def add_optimal_share(cfg: StudyConfig) -> None:
    """Add to every run its share of the best possible gain, from base responses drawn once for all runs of one base."""
    table = read_table(Path(cfg.csv), *KEY)
    rows = [row for row in table.to_dict("records") if row.get("n", 0) > 0]  # runs that did not fail
    folders = [folder_of(cfg, row["setting"], row["seed"]) for row in rows]
    with_draws = [results for folder in folders if (results := read_results(folder / "drawn.csv")) is not None]
    for row, folder in zip(rows, folders, strict=True):
        results = read_results(folder / "eval_results.csv")
        if results is None:
            continue
        same_base = [other for other in (results, *with_draws) if has_same_base(results, other)]
        most = max(same_base, key=count_draws)
        if count_draws(most) < cfg.frontier:
            drawn = evaluate_with_draws(cfg, row["judged"], folder)
            if drawn is not None:
                with_draws.append(drawn)
                most = drawn
        if count_draws(most):
            results["base_draws"] = most.base_draws
        earlier = json.loads((folder / "eval_summary.json").read_text(encoding="utf-8"))
        summary = summarise(results, earlier["label"], earlier["judge_label"])
        store(Path(cfg.csv), {**row, **figures(summary, folder)}, folder)


def count_draws(results: pd.DataFrame) -> int:
    """How many base responses an evaluation has per prompt."""
    return len(str(results.base_draws.iloc[0]).split()) if "base_draws" in results else 0


def read_results(path: Path) -> pd.DataFrame | None:
    """The table of eval.py, one row per prompt, if it can be read; an empty response is not a missing one."""
    with suppress(OSError, ValueError):
        return pd.read_csv(path, keep_default_na=False)
    return None


def has_same_base(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two evaluations have the same prompts, base responses and base scores."""
    same_texts = all(list(one[name]) == list(other[name]) for name in ("prompt", "base_text"))
    return same_texts and np.allclose(one.base_score, other.base_score, atol=1e-3)


def evaluate_with_draws(cfg: StudyConfig, judged: str, folder: Path) -> pd.DataFrame | None:
    """Evaluate once more with many base responses per prompt, in a table of its own; None where that fails."""
    path = folder / "drawn.csv"
    command = [*shlex.split(judged), f"--out_csv={path}", f"--frontier={cfg.frontier}"]  # the last of two flags counts
    code = call(command, folder / "log.txt", os.cpu_count() or 1)
    drawn = None if code else read_results(path)
    if drawn is None:
        tqdm.write(f"base responses could not be drawn: code {code}, see {folder}/log.txt")
    return drawn


# --- the table ------------------------------------------------------------------------------------------------------


def markdown(runs: pd.DataFrame) -> str:
    """A row for each base and setting: means over seeds (lowest to highest), or one run's figures [95 % interval].

    Where scores are no label's probability each setting has units of its own, and its base's mean stands beside it.
    """
    own_units = has_own_units(runs)
    if own_units:
        shown = [column for column in SHOWN if column in runs and runs[column].notna().any()]
    else:
        shown = [column for column in SHOWN if column != "base_score"]
    titles = [SHOWN[column][0] for column in shown]
    lines = [markdown_row("setting", "seeds", "episodes", *titles, "sd of score")]
    lines.append(markdown_row(*["---"] * (4 + len(shown))))
    if not own_units:
        bases = (
            runs.filter(regex="^base_(score|positive|judge_positive)")
            .drop_duplicates()
            .rename(columns=lambda name: name.removeprefix("base_"))
        )
        for i in range(len(bases)):
            lines.append(markdown_row("base", "", "", *(cell(bases[i : i + 1], column) for column in shown), ""))
    for name, seeds in runs.groupby("setting", sort=False):
        episodes = seeds.get("episodes", pd.Series(dtype=float)).dropna().unique()
        spread = ""
        if len(seeds) > 1:
            spread = f"{seeds.score.std():.3g}" if own_units else f"{seeds.score.std():.3f}"
        cells = [cell(seeds, column) for column in shown]
        counts = ", ".join(f"{n:,.0f}" for n in episodes)
        lines.append(markdown_row(f"`{name}`", str(len(seeds)), counts, *cells, spread))
    return "\n".join(lines)


def has_own_units(runs: pd.DataFrame) -> bool:
    """Whether scores are no label's probability, so that nothing is positive or not."""
    return "positive" not in runs or bool(runs.positive.isna().any())


def cell(runs: pd.DataFrame, column: str) -> str:
    """What a column says of the runs of one setting."""
    if column not in runs or runs[column].isna().all():
        return ""
    _, factor, form = SHOWN[column]
    if column in ("score", "base_score") and has_own_units(runs):
        form = "{:+.4g}"
    values = factor * runs[column]
    if column == "base_score" and values.nunique() == 1:  # all seeds are compared with the same responses of base
        return form.format(values.iloc[0])
    text = mean_and_range(values, form)
    interval = runs[f"{column}_ci"].iloc[0] if f"{column}_ci" in runs else None
    if len(runs) == 1 and isinstance(interval, str) and interval != "null":
        text += f" [{', '.join(form.format(factor * end) for end in json.loads(interval))}]"
    return text


if __name__ == "__main__":
    sys.exit(run(main))
