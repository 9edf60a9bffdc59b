"""PPO beside its rivals on one plane of score and KL, each at its best of a few settings, for as many episodes.

    python -m experiments.methods                              the tiny world: three seeds of each method
    python -m experiments.methods --methods rloo,grpo          some of them
    python -m experiments.methods --draw results/methods_tiny.csv          only the tables and the picture
    python -m experiments.methods --train "--policy_name gpt2 --total_steps 40" --csv methods.csv --folder methods_gpt2

Each method is trained with every pair of --lrs and --betas on the search seed. The pair with the largest share of the
best gain at --choose_at nats is trained with the seeds and measured; where no pair gets there it is the one that gets
farthest. A share is read off the line of weights between base and policy, and beyond (tools.interpolate). The search's
runs stand in the table as well. With one step size and one beta there is no search.

A run that the table has is not repeated, on whatever machine the table was made, and an interrupted one is resumed: the
same command again does what is left.
"""

import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import EvalConfig, UserError, opt

import numpy as np
import pandas as pd

from evaluation.files import ResultFiles
from experiments.pictures import draw_methods
from experiments.rivals import METHODS, find_method
from experiments.runner import (
    CURVES,
    Job,
    call,
    evaluate_command,
    figures,
    markdown_row,
    mean_and_range,
    read_runs,
    run_jobs,
    store,
    to_json,
)
from runtime.cli import numbers, parse_config, parse_flags, run, words
from runtime.files import read_table, write_atomic

SHARED = ("seed", "device", "dtype", "rm_name", "reward_weights")  # settings that eval.py and tools.interpolate have
OF_THE_RUNS = (  # settings that curves and evaluation must have in common
    *("dataset", "dataset_config", "split", "text_column", "max_prompt_len", "min_prompt_len", "max_new_tokens"),
    *("ref_name", "target_label", "reward_on_prompt", "temperature", "top_k", "top_p"),
)
SAME_BASE = 0.05  # how far two mean scores of base may be apart: machines and precisions sample otherwise
SEARCH, MEASURED = "search", "measured"  # what a run is for
SETTINGS_HELP = "for all methods, and name=… for one"
Columns = dict[str, tuple[str, float, str]]  # column of the table -> its name, its factor, and how it is written
SHARES: Columns = {
    "share_1": ("of the best gain at 1 nat, %", 100, "{:.0f}"),
    "share_2": ("at 2", 100, "{:.0f}"),
    "share_4": ("at 4", 100, "{:.0f}"),
}
AS_TRAINED: Columns = {
    "score": ("mean score", 1, "{:+.2f}"),
    "kl": ("KL, nats", 1, "{:.2f}"),
    "judge_positive": ("second judge: positive, %", 100, "{:.0f}"),
    "length_ratio": ("length / base's", 1, "{:.2f}"),
    "perplexity_ratio": ("perplexity / base's", 1, "{:.2f}"),
    "distinct_rate": ("distinct responses, %", 100, "{:.0f}"),
    "seconds_per_step": ("seconds per step", 1, "{:.1f}"),
    "memory_mb": ("memory, GB", 1e-3, "{:.1f}"),
}


@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """Settings of `python -m experiments.methods`."""

    methods: str = opt(",".join(METHODS), "Methods to compare.")
    seeds: str = opt("0,1,2", "Seeds to measure each method with.")
    train: str = opt("--preset=tiny --total_steps=16 --eval_every=0 --sample_every=16", "Flags of train.py.")
    evaluate: str = opt("", "Flags of eval.py.")

    search_seed: int = opt(100, "Seed to find the best setting with.", heading="The search")
    lrs: str = opt(
        "1e-4,2e-4,4e-4 best_of_n=2e-4,4e-4,8e-4 dpo=5e-5,1e-4,2e-4 dpo_online=5e-5,1e-4,2e-4",
        f"Step sizes {SETTINGS_HELP}.",
    )
    betas: str = opt("0.03,0.06 dpo=0.1,0.3 dpo_online=0.1,0.3", f"Values of kl_coef {SETTINGS_HELP}.")
    responses: str = opt("4 best_of_n=16", f"Responses per prompt {SETTINGS_HELP}; others have a number of their own.")
    choose_at: float = opt(2.0, "KL, in nats, at which the best setting has the largest share.")

    n_samples: int = opt(128, "Held-out prompts.", heading="What is measured, and where it is kept")
    alphas: str = opt("0.5,0.75,1,1.5,2", "Points of the line between base, at 0, and policy, at 1.")
    frontier: int = opt(16, "Base responses per prompt, for the best possible score.")
    best_gain: str | None = opt(
        None,
        "Read the best gain off this table of tools.interpolate, whose prompts must be the same: nothing is drawn.",
        path="read",
    )
    jobs: int = opt(1, "Runs at a time; with more than one, seconds mean nothing.")
    folder: str = opt("methods", "Where the runs are kept.", path="written")
    csv: str = opt("results/methods_tiny.csv", "The table; _steps.csv and .png are written beside it.", path="written")
    draw: str | None = opt(None, "Only print and draw this table.", path="read")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print and draw (raises UserError, at the end, where runs failed)."""
    cfg = parse_flags(MethodsConfig, argv, __doc__)
    failed = 0
    if cfg.draw is None:
        check_settings(cfg)
        for name in cfg.methods.split(","):
            failed += measure_method(cfg, name)
        add_best_possible(cfg)
    path = Path(cfg.draw or cfg.csv)
    runs, _ = read_runs(path)
    if not len(runs):
        raise UserError(f"{path} has no runs: train them first")
    runs = in_order(runs)
    print(markdown(runs))
    if (runs.role == SEARCH).any():
        print(f"\nThe search:\n\n{markdown_of_search(runs, f'{cfg.choose_at:g}')}")
    draw_methods(runs[runs.role == MEASURED], path.with_suffix(".png"))
    if failed:
        raise UserError(f"{failed} runs failed, see above and log.txt in their folders")


def in_order(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs in the order of METHODS, whatever was run last."""
    return runs.sort_values("method", key=lambda names: names.map(list(METHODS).index), kind="stable")


def check_settings(cfg: MethodsConfig) -> None:
    """Refuse what cannot be run (raises UserError)."""
    for name in cfg.methods.split(","):
        find_method(name)
        for setting in ("lrs", "betas", "responses"):
            of_method(cfg, setting, name)
    if cfg.search_seed in numbers("seeds", cfg.seeds, int):
        raise UserError(f"search_seed={cfg.search_seed} is one of the seeds: a setting is found on another one")
    evaluation = parse_config(EvalConfig, words("evaluate", cfg.evaluate))
    for setting in OF_THE_RUNS:
        if getattr(evaluation, setting) is not None:
            raise UserError(f"evaluate: {setting} must be that of the runs, because their curves have it: leave it out")
    if cfg.frontier < 2:
        raise UserError(f"frontier={cfg.frontier} must be 2 or more: shares of the best gain need it")
    if cfg.best_gain is not None:
        BestGain.read(cfg.best_gain)
    if f"{cfg.choose_at:g}" not in kls():
        raise UserError(f"choose_at={cfg.choose_at:g} is no column of the table: take {', '.join(kls())}")


def kls() -> list[str]:
    """The KLs at which the table has a share."""
    return [column.removeprefix("share_") for column in SHARES]


def of_method(cfg: MethodsConfig, setting: str, method: str) -> list[str]:
    """The values of a setting that lists some for all methods and, as name=…, for one (raises UserError)."""
    values: dict[str, str] = {}
    for word in words(setting, getattr(cfg, setting)):
        name, _, own = word.rpartition("=")
        if name:
            find_method(name)
        values[name] = own
    chosen = values.get(method, values.get(""))
    if chosen is None:
        raise UserError(f"{setting} has nothing for {method}: write values for all methods, and name=… for one")
    numbers(setting, chosen, float)
    return chosen.split(",")


# --- runs -----------------------------------------------------------------------------------------------------------


def measure_method(cfg: MethodsConfig, method: str) -> int:
    """Search, where there is a choice, and measure the best; returns how many runs failed."""
    pairs = list(itertools.product(of_method(cfg, "lrs", method), of_method(cfg, "betas", method)))
    failed = 0
    best: int | None = 0
    if len(pairs) > 1:
        search = [job_of(cfg, method, lr, beta, cfg.search_seed) for lr, beta in pairs]
        failed = run_all(cfg, method, SEARCH, search)
        best = best_setting(cfg, search)
    if best is None:  # all have failed
        return failed
    seeds = numbers("seeds", cfg.seeds, int)
    return failed + run_all(cfg, method, MEASURED, [job_of(cfg, method, *pairs[best], seed) for seed in seeds])


def job_of(cfg: MethodsConfig, method: str, lr: str, beta: str, seed: int) -> Job:
    """The commands that train by a method and evaluate what comes of it."""
    setting = f"{method} lr={lr} kl_coef={beta}"
    flags = [*words("train", cfg.train), f"--lr={lr}", f"--kl_coef={beta}", f"--seed={seed}"]
    if METHODS[method].responses is None:
        flags.append(f"--responses={of_method(cfg, 'responses', method)[0]}")
    folder = Path(cfg.folder) / f"{setting.replace(' ', '_')}_seed{seed}"
    train = ["python", "-m", "experiments.rivals", method, *flags, f"--ckpt_dir={folder}", "--resume"]
    measured = [*words("evaluate", cfg.evaluate), f"--n_samples={cfg.n_samples}"]
    if seed == cfg.search_seed:
        measured.append("--judge=none")
    return Job(setting, seed, folder, train, evaluate_command(measured, folder))


def run_all(cfg: MethodsConfig, method: str, role: str, jobs: Sequence[Job]) -> int:
    """Train, evaluate and interpolate; writes a row for each run and returns how many failed."""

    def measure(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
        steps = pd.read_csv(folder / "metrics.csv")
        seconds = steps.filter(regex="^seconds_(generate|score|update)$").sum(axis=1)
        return {
            "method": method,
            "role": role,
            **figures(summary, folder),
            "seconds_per_step": seconds.median(),
            "memory_mb": steps.peak_memory_mb.max(),
        }

    table = Path(cfg.csv)
    earlier = rows_by_run(table)
    left = [job for job in jobs if not is_measured(earlier.get((job.setting, job.seed), {}), job)]
    failed = run_jobs(left, table, measure, cfg.jobs)
    by_run = rows_by_run(table)
    done = [job for job in left if by_run.get((job.setting, job.seed), {}).get("n", 0) > 0]  # those that did not fail
    if not done:
        return failed
    evaluated = {str(job.folder): by_run[job.setting, job.seed] for job in done}
    curves = interpolate(cfg, Path(cfg.folder) / f"{method}_{role}.csv", evaluated)
    for job in done:
        own = curves[curves.run == str(job.folder)].sort_values("kl")
        store(table, {**by_run[job.setting, job.seed], **shares(own)}, job.folder)
    return failed


def rows_by_run(table: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of the table by setting and seed."""
    rows = read_table(table, "setting", "seed").to_dict("records") if table.exists() else []
    return {(row["setting"], row["seed"]): row for row in rows}


def is_measured(row: dict[str, Any], job: Job) -> bool:
    """Whether a row of the table has the curve of this very run."""
    commands = (shlex.join(job.train), shlex.join(job.evaluate))
    return isinstance(row.get("curve"), str) and (row.get("command"), row.get("judged")) == commands


def interpolate(cfg: MethodsConfig, path: Path, evaluated: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The curves of some runs, on the prompts of their evaluation (raises UserError).

    evaluated has the folder of each run with its row of the table, whose figures are those of alpha 1.
    """
    evaluation = parse_config(EvalConfig, words("evaluate", cfg.evaluate))
    settings = {
        "alphas": cfg.alphas,
        "frontier": 0 if cfg.best_gain else cfg.frontier,
        "n_samples": cfg.n_samples,
        "judge": "none",
        **{name: getattr(evaluation, name) for name in SHARED if getattr(evaluation, name) is not None},
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = ["python", "-m", "tools.interpolate", *evaluated, "--curve", "--each", *flags]
    run_once([*command, f"--csv={path}"], path)
    curves = read_table(path, "run", "alpha", "kl", "score", "base_score", "optimal_share")
    if 1 not in numbers("alphas", cfg.alphas, float):
        as_trained = pd.DataFrame([{"run": folder, "alpha": 1.0, **row} for folder, row in evaluated.items()])
        curves = pd.concat([curves, as_trained[["run", "alpha", "kl", "score", "base_score"]]])
    if cfg.best_gain is not None:
        return BestGain.read(cfg.best_gain).with_shares(curves)
    return curves


@dataclass(frozen=True)
class BestGain:
    """The best gain of the mean score at some KLs, in rising order, that other runs on the same prompts were held to.

    kl and gain are arrays of the same length; base_score is the mean score of base's responses.
    """

    path: str
    kl: np.ndarray
    gain: np.ndarray
    base_score: float

    @classmethod
    def read(cls, path: str) -> "BestGain":
        """Read a table of tools.interpolate (raises UserError)."""
        table = read_table(Path(path), "kl", "score", "base_score", "optimal_share")
        points = table.dropna(subset="optimal_share").sort_values("kl")
        if not len(points):
            raise UserError(f"best_gain={path} has no shares of the best gain: name a table made with --frontier")
        gain = (points.score - points.base_score) / points.optimal_share
        return cls(path, points.kl.to_numpy(), gain.to_numpy(), float(points.base_score.mean()))

    def with_shares(self, curves: pd.DataFrame) -> pd.DataFrame:
        """Fill in the share of the best gain, NaN beyond the KLs that are known (raises UserError)."""
        base_score = curves.base_score.mean()
        if abs(base_score - self.base_score) > SAME_BASE:
            raise UserError(
                f"best_gain={self.path} has other prompts or another reward: base has {self.base_score:.3f} there and "
                f"{base_score:.3f} here"
            )
        best = np.interp(curves.kl, self.kl, self.gain, math.nan, math.nan)
        return curves.assign(optimal_share=(curves.score - curves.base_score) / best)

    def columns(self) -> dict[str, Any]:
        """What eval.py --frontier would say of the best possible, for the picture."""
        curve = {"kl": [0.0, *self.kl], "score_mean": [self.base_score, *(self.base_score + self.gain)]}
        base = [{"n": 1, "kl": 0.0, "score_mean": self.base_score}]
        return {"optimal_curve": to_json(curve), "best_of_n": to_json(base), "kl_certain": float(self.kl[-1])}


def run_once(command: Sequence[str], path: Path) -> None:
    """Run a command that writes a table, unless this very command has written it (raises UserError)."""
    note, log = path.with_suffix(".txt"), path.with_suffix(".log")
    if note.exists() and note.read_text(encoding="utf-8") == shlex.join(command):
        return
    if code := call(command, log, os.cpu_count() or 1):
        raise UserError(f"{path} could not be made: code {code}, see {log}")
    write_atomic(note, shlex.join(command))


def shares(curve: pd.DataFrame) -> dict[str, Any]:
    """Shares of the best gain at some KLs, NaN beyond the ends of a run's curve, and the curve itself."""
    known = curve.dropna(subset="optimal_share")  # there is none close to base
    found: dict[str, Any] = {
        f"share_{kl}": float(np.interp(float(kl), known.kl, known.optimal_share, math.nan, math.nan))
        if len(known)
        else math.nan
        for kl in kls()
    }
    return {**found, "curve": to_json(curve[["alpha", "kl", "score"]].to_dict("list"))}


def best_setting(cfg: MethodsConfig, jobs: Sequence[Job]) -> int | None:
    """Which of the search's runs has the largest share at choose_at, or the largest KL; None where all have failed."""
    by_run = rows_by_run(Path(cfg.csv))
    found = [by_run[job.setting, job.seed] for job in jobs]
    for column in (f"share_{cfg.choose_at:g}", "kl"):
        values = np.array([row.get(column, math.nan) for row in found], dtype=float)
        if not np.isnan(values).all():
            return int(np.nanargmax(values))
    return None


def add_best_possible(cfg: MethodsConfig) -> None:
    """Give the first run that is measured the best possible, for the picture: from a table or many draws of base."""
    table = Path(cfg.csv)
    runs, _ = read_runs(table)
    measured = runs[runs.role == MEASURED] if len(runs) else runs
    if not len(measured):
        return
    row = measured.sort_values(["setting", "seed"]).iloc[0].to_dict()  # always the same one
    if isinstance(row.get("optimal_curve"), str):  # else NaN: null is read as missing
        return
    if cfg.best_gain is not None:
        store(table, {**row, **BestGain.read(cfg.best_gain).columns()}, Path(cfg.folder))
        return
    path = Path(cfg.folder) / "best_possible.csv"
    # the last of two flags counts
    run_once([*shlex.split(row["judged"]), f"--out_csv={path}", f"--frontier={4 * cfg.frontier}"], path)
    summary = json.loads(ResultFiles(path).summary.read_text(encoding="utf-8"))
    best = {column: to_json(summary.get(column)) for column in CURVES}
    store(table, {**row, **best, "kl_certain": summary["kl_certain"]}, Path(cfg.folder))


# --- the tables -----------------------------------------------------------------------------------------------------


def markdown(runs: pd.DataFrame) -> str:
    """Two tables with a row for each method: shares at equal KL, and the policies as trained."""
    measured = runs[runs.role == MEASURED]
    by_method = list(measured.groupby(["method", "setting"], sort=False))
    shares = [heading("method", "lr, β", "seeds", *titles(SHARES), "episodes", "with the search")]
    policies = [heading("method", *titles(AS_TRAINED))]
    for (method, setting), seeds in by_method:
        name = f"`{method}`"
        episodes = seeds.episodes.iloc[0]
        of_search = runs[(runs.method == method) & (runs.role == SEARCH)].episodes.sum()
        counts = [f"{episodes:,.0f}", f"{episodes + of_search:,.0f}"]
        shares.append(markdown_row(name, lr_and_beta(setting), str(len(seeds)), *cells(seeds, SHARES), *counts))
        policies.append(markdown_row(name, *cells(seeds, AS_TRAINED)))
    return "\n".join([*shares, "\nThe policies as trained:\n", *policies])


def heading(*words: str) -> str:
    """The first two rows of a table in Markdown."""
    return f"{markdown_row(*words)}\n{markdown_row(*['---'] * len(words))}"


def titles(columns: Columns) -> list[str]:
    """What columns are called."""
    return [title for title, _, _ in columns.values()]


def lr_and_beta(setting: str) -> str:
    """The values in the name of a setting."""
    return ", ".join(word.partition("=")[2] for word in setting.split()[1:])


def cells(runs: pd.DataFrame, columns: Columns) -> list[str]:
    """What columns say of the runs of one method: means (lowest to highest), a dash where a run has no such figure."""
    return [
        mean_and_range(factor * runs[column], form) if column in runs and runs[column].notna().all() else "–"
        for column, (_, factor, form) in columns.items()
    ]


def markdown_of_search(runs: pd.DataFrame, kl: str) -> str:
    """A row for each method: the share of each setting that was tried, in the order of lr and beta."""
    search = runs[runs.role == SEARCH]
    lines = [heading("method", f"lr, β: share of the best gain at {kl} nats, %")]
    for method, tried in search.groupby("method", sort=False):
        shares = tried[f"share_{kl}"]
        values = ["–" if math.isnan(share) else f"{100 * share:.0f}" for share in shares]
        pairs = [f"{lr_and_beta(setting)}: {value}" for setting, value in zip(tried.setting, values, strict=True)]
        lines.append(markdown_row(f"`{method}`", "; ".join(pairs)))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
