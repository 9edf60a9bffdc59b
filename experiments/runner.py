"""Many runs, alike: each is trained and evaluated once, what is done is kept, and one table holds the figures.

A run is a setting and a seed. Beside the table of runs stands one of their training steps. Both study and pitfalls
train and evaluate this way; they differ in the commands of their runs.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError

import pandas as pd
from tqdm import tqdm

from evaluation.table import INTERVALS
from runtime.files import check_table_path, read_table, remove, write_atomic
from runtime.terminal import progress_bar

ROOT = Path(__file__).parent.parent
KEY = ("setting", "seed")  # of a row
TRAINED, EVALUATED = "trained.txt", "judged.txt"  # notes in a run's folder: the commands that are done
TIMINGS = ["seconds_generate", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_mb"]
STEP_COLUMNS = ("step", "episodes", "score_mean", "kl_seq")  # that every table of steps has
FIGURES = {  # column of the table -> estimate in eval_summary.json
    "n": "n",
    "score": "policy.score_mean",
    "base_score": "base.score_mean",
    "positive": "policy.positive_rate",
    "base_positive": "base.positive_rate",
    "win_rate": "win_rate",
    "gain": "score_gain",
    "kl": "kl_seq_exact",
    "judge_positive": "policy.judge_positive_rate",
    "base_judge_positive": "base.judge_positive_rate",
    "judge_gain": "judge_gain",
    "judge_gain_expected": "judge_gain_expected",
    "distinct_rate": "policy.distinct_rate",
    "commonest": "policy.commonest",
    "length": "policy.response_len",
    "base_length": "base.response_len",
    "optimal_share": "optimal_share_rate",
    "kl_certain": "kl_certain",
    "verdict": "verdict",
}
RATIOS = {  # column of the table -> two estimates, the first divided by the second
    "length_expected_ratio": ("response_len_expected", "base.response_len"),
    "perplexity_ratio": ("policy.perplexity", "base.perplexity"),
    "distinct_2_ratio": ("policy.distinct_2", "base.distinct_2"),
    "length_ratio": ("policy.response_len", "base.response_len"),
}
WITH_CI = ["score", "base_score", "positive", "win_rate", "gain", "kl", "judge_positive", "length", "optimal_share"]
CURVES = ("best_of_n", "optimal_curve")  # of the table, written as JSON under the same names


@dataclass(frozen=True)
class Job:
    """One run: the folder that it is kept in, and the commands that train and evaluate it, as a person types them."""

    setting: str
    seed: int
    folder: Path
    train: Sequence[str]
    evaluate: Sequence[str]
    resumable: bool = True  # else its training starts anew where it was interrupted


Measure = Callable[[dict[str, Any], Path], dict[str, Any]]  # eval_summary.json and the run's folder -> its row


def evaluate_command(flags: Sequence[str], folder: Path) -> list[str]:
    """The command that evaluates the policy in a run's folder, and keeps the results there."""
    return [
        "python",
        "eval.py",
        *flags,
        f"--policy_path={folder / 'policy_lm'}",
        f"--out_csv={folder / 'eval_results.csv'}",
    ]


# --- running --------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], table: Path, measure: Measure, parallel: int = 1) -> int:
    """Do what is left of the jobs, some at a time, and keep a row for each; returns how many failed."""
    check_table_path(table)
    for path in (table, steps_path(table)):
        if path.exists():
            read_table(path, *KEY)  # so that an error comes now, not after the first run
    failed = 0
    with ThreadPoolExecutor(parallel) as pool, progress_bar(unit="run", total=len(jobs)) as bar:
        rows = pool.map(lambda job: run_job(job, measure, parallel), jobs)
        for job, row in zip(jobs, rows, strict=True):
            bar.update()
            tqdm.write(f"{job.setting} seed {job.seed}: {row.get('failed') or one_line(row)}")
            failed += "failed" in row
            store(table, row, job.folder)
    return failed


def run_job(job: Job, measure: Measure, parallel: int = 1) -> dict[str, Any]:
    """Train and evaluate, unless that is done already; returns the row for the table, which says what failed."""
    row = {
        "setting": job.setting,
        "seed": job.seed,
        "command": shlex.join(job.train),
        "judged": shlex.join(job.evaluate),
    }
    threads = max(1, (os.cpu_count() or 1) // parallel)
    try:
        if not job.resumable and not (job.folder / TRAINED).exists():
            remove(job.folder)
        job.folder.mkdir(parents=True, exist_ok=True)
        for command, note in ((job.train, TRAINED), (job.evaluate, EVALUATED)):
            if was_run(job.folder / note, command):
                continue
            if code := call(command, job.folder / "log.txt", threads):
                return {**row, "failed": f"code {code}, see {job.folder}/log.txt"}
            write_atomic(job.folder / note, shlex.join(command))
        summary = json.loads((job.folder / "eval_summary.json").read_text(encoding="utf-8"))
        return {**row, **measure(summary, job.folder)}
    except (OSError, ValueError, KeyError) as error:
        return {**row, "failed": f"{job.folder} cannot be read ({type(error).__name__}: {error})"}


def was_run(note: Path, command: Sequence[str]) -> bool:
    """Whether this very command has been run in a folder (raises UserError where another one has)."""
    if not note.exists():
        return False
    if note.read_text(encoding="utf-8") != shlex.join(command):
        raise UserError(f"{note} names another command: choose another --folder")
    return True


def call(command: Sequence[str], log: Path, threads: int) -> int:
    """Run a command with this Python and this project's scripts, and add what it prints to a log; returns its code."""
    here = {"python": sys.executable, "train.py": str(ROOT / "train.py"), "eval.py": str(ROOT / "eval.py")}
    argv = [here.get(word, word) for word in command]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(argv, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode


def one_line(row: Mapping[str, Any]) -> str:
    """A row in a few words."""
    return f"score {row['score']:+.4g}, win-rate {row['win_rate']:.1%}, KL {row['kl']:.2f}"


# --- figures --------------------------------------------------------------------------------------------------------


def figures(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The columns of a run's row: estimates of its evaluation and, if it logged them, figures of its training."""
    estimates, intervals = dict[str, Any](), dict[str, Any]()
    for place, group in (("", summary), ("policy.", summary["policy"]), ("base.", summary["base"])):
        for key, estimate in group.items():
            estimates[place + key] = estimate
            intervals[place + key] = group.get(INTERVALS.get(key, f"{key}_ci"))
    for column in ("n", "score", "base_score", "win_rate", "gain", "kl", "distinct_rate"):
        estimates[FIGURES[column]]  # raises KeyError
    row = {column: estimates.get(key) for column, key in FIGURES.items()}
    for column, (above, below) in RATIOS.items():
        row[column] = estimates.get(above, math.nan) / estimates.get(below, math.nan)
    for column in CURVES:
        row[column] = to_json(estimates.get(column))
    for column in WITH_CI:
        row[f"{column}_ci"] = to_json(intervals.get(FIGURES[column]))
    steps = read_steps(folder)
    if steps is not None:
        row |= {
            "episodes": int(steps.episodes.iloc[-1]),
            "kl_max": steps.kl_seq.max(),
            "kl_min": steps.kl_seq.min(),
            "first_score": steps.score_mean.iloc[0],
            "seconds": steps.filter(like="seconds_").to_numpy().sum(),
        }
    return row


def to_json(value: Any) -> str:
    """JSON with numbers of four digits."""
    return json.dumps(json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.4g}")))


def read_steps(folder: Path) -> pd.DataFrame | None:
    """The steps of a run's training, if its program logged them as train.py does."""
    with suppress(OSError, ValueError):
        steps = pd.read_csv(folder / "metrics.csv")
        if len(steps) and set(STEP_COLUMNS) <= set(steps):
            return steps
    return None


# --- tables ---------------------------------------------------------------------------------------------------------


def store(table: Path, row: dict[str, Any], folder: Path) -> None:
    """Write a run into the table, and the steps of its training into the table of steps.

    A failed run never replaces a successful one, whose models may no longer exist.
    """
    if "score" not in row and table.exists():
        old = read_table(table, *KEY)
        if "score" in old and old[is_same_run(old, row)].score.notna().any():
            return
    replace_rows(table, pd.DataFrame([row]))
    steps = read_steps(folder)
    if steps is not None:
        kept = steps.drop(columns=TIMINGS, errors="ignore")  # the machine's, not the method's
        replace_rows(steps_path(table), kept.assign(setting=row["setting"], seed=row["seed"]))


def replace_rows(path: Path, rows: pd.DataFrame) -> None:
    """Write the rows of one setting and seed into a table, in place of older ones."""
    if path.exists():
        old = read_table(path, *KEY)
        others = old[~is_same_run(old, rows.iloc[0])]
        rows = pd.DataFrame([*others.to_dict("records"), *rows.to_dict("records")])
    write_table(path, rows)


def write_table(path: Path, table: pd.DataFrame, digits: str = "%.5g") -> None:
    """Write a table as CSV, whole or not at all."""
    write_atomic(path, table.to_csv(index=False, float_format=digits, lineterminator="\n"))


def is_same_run(table: pd.DataFrame, run: Mapping[str, Any] | pd.Series) -> pd.Series:
    """Which rows of a table are of the same setting and seed."""
    return (table.setting == run["setting"]) & (table.seed == run["seed"])


def steps_path(table: Path) -> Path:
    """The table of training steps, beside the table of runs."""
    return table.with_name(f"{table.stem}_steps.csv")


def read_runs(table: Path) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The runs that did not fail, and the steps of their training if there is such a table (raises UserError)."""
    runs = read_table(table, *KEY)
    steps = steps_path(table)
    return succeeded(runs), read_table(steps, *KEY, *STEP_COLUMNS[:3]) if steps.is_file() else None


def succeeded(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of the runs that did not fail."""
    return runs.dropna(subset="score") if "score" in runs else runs[:0]


def markdown_row(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def mean_and_range(values: pd.Series, form: str) -> str:
    """The mean over seeds (lowest to highest)."""
    shown = form.format(values.mean())
    if len(values) == 1:
        return shown
    return f"{shown} ({form.format(values.min())} to {form.format(values.max())})"
