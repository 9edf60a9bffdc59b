"""Settings times seeds: trains each combination, evaluates all alike, and keeps one table of the figures.

    python -m experiments.study --grid 'lr=1e-5,2e-5 kl_coef=0.1' --seeds 0,1,2 --csv results/study.csv
    python -m experiments.study --peer 'python other.py --seed {seed} --out {folder}/policy_lm' --seeds 0,1 --csv …
    python -m experiments.study --draw results/study.csv          only the table and the picture

Further flags of train.py and eval.py go into --train and --evaluate. Finished runs are kept and interrupted ones are
resumed, so the same command again does what is left. --jobs runs at a time share the cores.
"""

import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError, opt

import numpy as np
import pandas as pd
from tqdm import tqdm

from evaluation.studies import markdown, picture
from evaluation.summary import summarise
from runtime.cli import numbers, parse_flags, run, words
from runtime.files import check_table_path, read_table, write_atomic
from runtime.terminal import progress_bar

ROOT = Path(__file__).parent.parent
KEY = ("setting", "seed")  # of a row
UNSAFE = r'[ /\\:*?"<>|]'  # in the name of a folder, on one system or another
STEP_COLUMNS = ("step", "episodes", "score_mean", "positive_rate", "kl_seq", "kl_seq_exact", "response_len")


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
        runs = list(itertools.product(settings(cfg), numbers("seeds", cfg.seeds, int)))
        check_table_path(Path(cfg.csv))
        for path in filter(Path.exists, (Path(cfg.csv), steps_path(Path(cfg.csv)))):
            read_table(path, *KEY)  # so that an error comes now, not after the first run
        with ThreadPoolExecutor(cfg.jobs) as pool, progress_bar(unit="run", total=len(runs)) as bar:
            for row in pool.map(lambda run: one_run(cfg, *run), runs):
                bar.update()
                tqdm.write(f"{row['setting']} seed {row['seed']}: {row.get('failed') or one_line(row)}")
                failed += "failed" in row
                store_row(cfg, row)
        add_optimal_share(cfg)
    path = Path(cfg.draw or cfg.csv)
    table = read_table(path, *KEY)
    print(markdown(table))
    steps = read_table(steps_path(path), *KEY, *STEP_COLUMNS[:3]) if steps_path(path).is_file() else None
    picture(table, steps, path.with_suffix(".png"))
    if failed:
        raise UserError(f"{failed} of {len(runs)} runs failed, see above and log.txt in their folders")


# --- runs -----------------------------------------------------------------------------------------------------------


def settings(cfg: StudyConfig) -> list[tuple[str, ...]]:
    """The flags of each setting: every combination of the values in the grid (raises UserError)."""
    if cfg.peer:
        return [()]
    choices = []
    for part in words("grid", cfg.grid):
        name, equals, values = part.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"grid={part!r} is not understood: write name=a,b")
        choices.append([f"--{name}={value}" for value in values.split(",")])
    return list(itertools.product(*choices))


def one_run(cfg: StudyConfig, setting: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Train and evaluate, unless that is done already; returns the row for the table."""
    name = cfg.peer_name if cfg.peer else " ".join(flag.removeprefix("--") for flag in setting) or "defaults"
    folder = folder_of(cfg, name, seed)
    threads = str(max(1, (os.cpu_count() or 1) // cfg.jobs))
    env = {"OMP_NUM_THREADS": threads, **os.environ}
    if cfg.peer:
        command = [w.replace("{seed}", str(seed)).replace("{folder}", str(folder)) for w in words("peer", cfg.peer)]
    else:
        command = [
            "python",
            "train.py",
            *words("train", cfg.train),
            *setting,
            f"--seed={seed}",
            f"--ckpt_dir={folder}",
            "--resume",
        ]
    reward = [flag for flag in setting if flag.startswith("--rm_name=")]  # a Python reward must be named each time
    judged = [
        "python",
        "eval.py",
        *words("evaluate", cfg.evaluate),
        *reward,
        f"--policy_path={folder / 'policy_lm'}",
        f"--out_csv={folder / 'eval_results.csv'}",
    ]
    row: dict[str, Any] = {"setting": name, "seed": seed, "command": shlex.join(command), "judged": shlex.join(judged)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for argv, note in ((command, "trained.txt"), (judged, "judged.txt")):
            if not was_run(folder / note, shlex.join(argv)):
                with (folder / "log.txt").open("a", encoding="utf-8") as log:
                    done = subprocess.run(command_line(argv), env=env, stdout=log, stderr=subprocess.STDOUT)
                if done.returncode:
                    return {**row, "failed": f"code {done.returncode}, see {folder}/log.txt"}
                write_atomic(folder / note, shlex.join(argv))
        summary = json.loads((folder / "eval_summary.json").read_text(encoding="utf-8"))
        return {**row, **figures(summary, folder / "metrics.csv")}
    except (OSError, ValueError, KeyError) as error:
        return {**row, "failed": f"{folder} cannot be read ({type(error).__name__}: {error})"}


def folder_of(cfg: StudyConfig, name: str, seed: int) -> Path:
    """Where a run is kept."""
    return Path(cfg.folder) / f"{re.sub(UNSAFE, '_', name)}_seed{seed}"


def add_optimal_share(cfg: StudyConfig) -> None:
    """Add to every run its share of the best possible gain, from base responses drawn once for all runs of one base."""
    table = read_table(Path(cfg.csv), *KEY)
    rows = [row for row in table.to_dict("records") if row.get("n", 0) > 0]  # runs that did not fail
    folders = [folder_of(cfg, row["setting"], row["seed"]) for row in rows]
    drawn = [one for folder in folders if (one := read_results(folder / "drawn.csv")) is not None]
    for row, folder in zip(rows, folders, strict=True):
        if (found := read_results(folder / "eval_results.csv")) is None:
            continue
        draws = [one for one in (found, *drawn) if count_draws(one) and has_same_base(found, one)]
        if max(map(count_draws, draws), default=0) < cfg.frontier:
            more = evaluate_with_draws(cfg, row["judged"], folder)
            draws, drawn = draws + more, drawn + more
        if draws:
            found["base_draws"] = max(draws, key=count_draws).base_draws
        store_row(cfg, {**row, **figures(summarise(found, *labels_of(folder)), folder / "metrics.csv")})


def labels_of(folder: Path) -> tuple[str | None, str]:
    """The labels of the reward and of the second judge, as an evaluation recorded them."""
    summary = json.loads((folder / "eval_summary.json").read_text(encoding="utf-8"))
    return summary["label"], summary["judge_label"]


def count_draws(results: pd.DataFrame) -> int:
    """How many base responses an evaluation has per prompt."""
    return len(str(results.base_draws.iloc[0]).split()) if "base_draws" in results else 0


def read_results(path: Path) -> pd.DataFrame | None:
    """The table of eval.py, one row per prompt, if it can be read; an empty answer is not a missing one."""
    with suppress(OSError, ValueError):
        return pd.read_csv(path, keep_default_na=False)
    return None


def has_same_base(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two evaluations have the same prompts, base answers and base scores."""
    return all(list(one[name]) == list(other[name]) for name in ("prompt", "base_text")) and np.allclose(
        one.base_score, other.base_score, atol=1e-3
    )


def evaluate_with_draws(cfg: StudyConfig, judged: str, folder: Path) -> list[pd.DataFrame]:
    """Evaluate once more with many base responses per prompt, in a table of its own; nothing where that fails."""
    path = folder / "drawn.csv"
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        command = command_line(
            [*shlex.split(judged), f"--out_csv={path}", f"--frontier={cfg.frontier}"]
        )  # the last one counts
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    drawn = None if done.returncode else read_results(path)
    if drawn is None:
        tqdm.write(f"base responses could not be drawn: code {done.returncode}, see {folder}/log.txt")
    return [] if drawn is None else [drawn]


def was_run(note: Path, command: str) -> bool:
    """Whether this very command has been run in a folder (raises UserError where another one has)."""
    if not note.exists():
        return False
    if note.read_text(encoding="utf-8") != command:
        raise UserError(f"{note} names another command: choose another --folder")
    return True


def command_line(words: list[str]) -> list[str]:
    """A command with this Python and this project's scripts."""
    return [
        {"python": sys.executable, "train.py": str(ROOT / "train.py"), "eval.py": str(ROOT / "eval.py")}.get(w, w)
        for w in words
    ]


def figures(summary: dict[str, Any], metrics: Path) -> dict[str, Any]:
    """The columns of the study's table: figures of the evaluation, and of the run's metrics.csv if there is one."""
    ours, base = summary["policy"], summary["base"]
    intervals = {
        "positive": ours.get("positive_ci"),
        "score": ours.get("score_ci"),
        "win_rate": summary.get("win_rate_ci"),
        "kl": summary.get("kl_seq_exact_ci"),
        "judge_positive": ours.get("judge_positive_rate_ci"),
        "base_score": base.get("score_ci"),
        "gain": summary.get("score_gain_ci"),
    }
    found = {
        "n": summary["n"],
        "score": ours["score_mean"],
        "base_score": base["score_mean"],
        "positive": ours.get("positive_rate"),
        "base_positive": base.get("positive_rate"),
        "win_rate": summary["win_rate"],
        "gain": summary["score_gain"],
        "kl": summary["kl_seq_exact"],
        "judge_positive": ours.get("judge_positive_rate"),
        "base_judge_positive": base.get("judge_positive_rate"),
        "judge_gain": summary.get("judge_gain"),
        "judge_gain_expected": summary.get("judge_gain_expected"),
        "distinct_rate": ours["distinct_rate"],
        "commonest": ours.get("commonest"),
        "length_expected_ratio": summary.get("response_len_expected", math.nan) / base["response_len"],
        **{
            f"{short}_ratio": ours.get(name, math.nan) / base.get(name, math.nan)
            for short, name in (("perplexity", "perplexity"), ("distinct_2", "distinct_2"), ("length", "response_len"))
        },
        **best_possible(summary),
        **{f"{name}_ci": to_json(interval) for name, interval in intervals.items()},
    }
    if (table := read_steps(metrics)) is not None:
        found |= {
            "episodes": int(table.episodes.iloc[-1]),
            "kl_max": table.kl_seq.max(),
            "kl_min": table.kl_seq.min(),
            "first_score": table.score_mean.iloc[0],
            "seconds": table.filter(like="seconds_").to_numpy().sum(),
        }
    return found


def best_possible(summary: dict[str, Any]) -> dict[str, Any]:
    """The best possible as an evaluation found it, where base responses were drawn."""
    kept = {"optimal_share_ci": "optimal_share_rate_ci", "best_of_n": "best_of_n", "optimal_curve": "optimal_curve"}
    return {"optimal_share": summary.get("optimal_share_rate"), "kl_certain": summary.get("kl_certain")} | {
        name: to_json(summary.get(key)) for name, key in kept.items()
    }


def to_json(value: Any) -> str:
    """JSON with numbers of four digits."""
    return json.dumps(json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.4g}")))


def one_line(row: dict[str, Any]) -> str:
    """A row in a few words."""
    return f"score {row['score']:+.4g}, win-rate {row['win_rate']:.1%}, KL {row['kl']:.2f}"


def store_row(cfg: StudyConfig, row: dict[str, Any]) -> None:
    """Write a run into the table, and the steps of its training into the table of steps.

    A failed run never replaces a successful one, whose models may no longer exist.
    """
    path = Path(cfg.csv)
    if "score" not in row and path.exists():
        old = read_table(path, *KEY)
        if "score" in old and old[is_same_run(old, row)].score.notna().any():
            return
    replace_rows(path, pd.DataFrame([row]))
    steps = read_steps(folder_of(cfg, row["setting"], row["seed"]) / "metrics.csv")
    if steps is not None:
        own = steps[[name for name in STEP_COLUMNS if name in steps]]
        replace_rows(steps_path(path), own.assign(setting=row["setting"], seed=row["seed"]))


def read_steps(metrics: Path) -> pd.DataFrame | None:
    """The steps of a run's training, if its program logged them as train.py does."""
    with suppress(OSError, ValueError):
        table = pd.read_csv(metrics)
        if len(table) and {*STEP_COLUMNS[:3], "kl_seq"} <= set(table):
            return table
    return None


def steps_path(path: Path) -> Path:
    """The table of training steps, beside the study's table."""
    return path.with_name(f"{path.stem}_steps.csv")


def replace_rows(path: Path, rows: pd.DataFrame) -> None:
    """Write the rows of one setting and seed into a table, in place of older ones."""
    if path.exists():
        old = read_table(path, *KEY)
        kept = old[~is_same_run(old, rows.iloc[0])]
        rows = pd.DataFrame([*kept.to_dict("records"), *rows.to_dict("records")])
    write_atomic(path, rows.to_csv(index=False, float_format="%.5g", lineterminator="\n"))


def is_same_run(table: pd.DataFrame, run: Mapping[str, Any] | pd.Series) -> pd.Series:
    """Which rows of a table are of the same setting and seed."""
    return (table.setting == run["setting"]) & (table.seed == run["seed"])


if __name__ == "__main__":
    sys.exit(run(main))
