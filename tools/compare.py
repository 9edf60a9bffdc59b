"""Compares runs: one page, and a picture, with their curves, their points of score and KL, their settings that differ.

    python -m tools.compare ckpts_a ckpts_b                        compare.html and compare.png
    python -m tools.compare runs/* --out runs/all.html
    python -m tools.compare ckpts --summaries a_summary.json b_summary.json

Where eval.py has been run its points are there, too. Its summaries are looked for in each run's folder, beside it, and
in the working directory (*_summary.json); they name the policy that they are of. --summaries names others instead.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import UserError, opt

from evaluation.files import read_summary
from evaluation.pictures import CURVES, EVALUATED, read_columns
from evaluation.runs_page import ComparedRun, write_runs
from runtime.cli import parse_flags, run
from runtime.files import read_table
from runtime.fingerprints import saved_weights_sha256
from runtime.saved_run import SavedRun
from training.commands import eval_command
from training.earlier_run import SILENT

SHOWN = {"label", "policy", "kl_seq_exact", "kl_seq_exact_ci", "win_rate", "win_rate_ci", "n"}  # of a summary
NOT_COMPARABLE = {  # why figures of runs may not be, and the settings in which they then differ
    "these runs have different rewards, so their scores cannot be compared": (
        "rm_name",
        "reward_weights",
        "target_label",
        "score_log_odds",
        "reward_on_prompt",
    ),
    "these runs have different bases, and each KL is to its own": ("policy_name", "ref_name"),
    "these runs have different prompts": ("dataset", "dataset_config", "text_column", "max_prompt_len"),
    "these runs decode differently, and so do their figures": ("temperature", "top_k", "top_p", "max_new_tokens"),
}
Summary = dict[str, Any]  # of eval_summary.json


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `python -m tools.compare`."""

    runs: list[str] = field(
        default_factory=lambda: ["ckpts"], metadata={"help": "Run folders; --runs may be left out.", "path": "read"}
    )
    summaries: list[str] = field(
        default_factory=list,
        metadata={"help": "Files of eval.py (default: those found in or beside the runs).", "path": "read"},
    )
    out: str = opt("compare.html", "The page; a picture of the same name, .png, is drawn beside it.", path="written")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, and write the page and the picture (raises UserError)."""
    cfg = parse_flags(CompareConfig, argv, __doc__, first="runs")
    page = Path(cfg.out)
    if page.suffix != ".html":
        raise UserError(f"out={cfg.out} must end in .html: the picture takes the same name with .png")
    folders = list(dict.fromkeys(Path(name) for name in cfg.runs))
    evaluations = find_evaluations(folders, [Path(name) for name in cfg.summaries])
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = [read_run(folder, evaluations[folder], name) for folder, name in zip(folders, names, strict=True)]
    notes = what_to_mind(runs)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_runs(runs, notes, page)
    except OSError as error:
        raise UserError(f"out={cfg.out} cannot be written ({error.strerror or error}): name another file") from None
    for folder in folders:
        if not evaluations[folder]:
            run = SavedRun(folder)
            print(f"{folder} has no point of eval.py: {eval_command(run.policy, run.settings['rm_name'])}")
        elif are_outdated(folder, evaluations[folder]):
            print(f"note: an evaluation of {folder} is of a policy that it no longer has: run eval.py again")
    for note in notes:
        print(f"note: {note}")
    print(f"written: {page} and {page.with_suffix('.png')}")


def read_run(folder: Path, evaluations: list[Summary], name: str) -> ComparedRun:
    """A run as its folder has it, under a name (raises UserError where that is not one that has taken a step)."""
    run = SavedRun.named("runs", str(folder))
    silent = SILENT | {"report_to"}
    settings = {setting: value for setting, value in run.settings.items() if setting not in silent}
    settings["device_name"] = run.record.get("device_name")
    settings["git_commit"] = str(run.record.get("git_commit") or "unknown")[:10]
    metrics = read_table(folder / "metrics.csv", "episodes", *CURVES)
    if not len(metrics):
        raise UserError(f"runs: {folder} has taken no step yet: wait for its first")
    return ComparedRun(name, settings, run.label, metrics, read_columns(run, "eval.csv", EVALUATED), evaluations)


def what_to_mind(runs: Sequence[ComparedRun]) -> list[str]:
    """Why figures of these runs may not be comparable."""
    differing = []
    for note, names in NOT_COMPARABLE.items():
        values = [[run.settings.get(name) for name in names] for run in runs]
        if any(value != values[0] for value in values):
            differing.append(note)
    judges = {one.get("judge_sha256") for run in runs for one in run.evaluations} - {None}
    if len(judges) > 1:
        differing.append("these evaluations have different second judges")
    return differing


# --- what eval.py has written ---------------------------------------------------------------------------------------


def find_evaluations(folders: Sequence[Path], named: Sequence[Path]) -> dict[Path, list[Summary]]:
    """The summaries that belong to each run: those named, or else those in it, beside it and here.

    Raises UserError where a named one cannot be read or belongs to none of the runs.
    """
    places = dict.fromkeys(place for folder in folders for place in (folder, folder.parent, Path()))
    files = named or sorted({path.resolve(): path for p in places for path in p.glob("*_summary.json")}.values())
    homes = {folder.resolve(): folder for folder in folders}
    evaluations: dict[Path, list[Summary]] = {folder: [] for folder in folders}
    for path in files:
        summary = read_summary(path)
        is_summary = summary.keys() >= SHOWN
        home = run_of(path, summary["settings"].get("policy_path", "")) if is_summary else None
        if home in homes:
            evaluations[homes[home]].append(summary)
        elif named:
            problem = "is of none of these runs" if is_summary else "is not a summary of eval.py"
            raise UserError(f"summaries: {path} {problem}: name eval_summary.json files of these runs")
    return evaluations


def run_of(path: Path, policy_path: str) -> Path | None:
    """The folder of the run that a summary is of: the one that it is in, else that of the policy that it names.

    A policy's path is as it was given to eval.py, so it is looked up from here and from where the summary is.
    """
    if SavedRun(path.parent).exists:
        return path.parent.resolve()
    for start in (Path(), path.parent):
        run = SavedRun.of_policy(str(start / policy_path))
        if run is not None:
            return run.folder.resolve()
    return None


def are_outdated(folder: Path, summaries: Sequence[Summary]) -> bool:
    """Whether a summary is of weights that are in the run no longer, because it was trained on."""
    evaluated = {summary["policy_sha256"] for summary in summaries if summary.get("policy_sha256")}
    if not evaluated:
        return False
    return not evaluated <= {saved_weights_sha256(folder / policy) for policy in ("policy_lm", "best/policy_lm")}


if __name__ == "__main__":
    sys.exit(run(main))
