"""Compares runs: one page, and a picture, with their curves, their points of score and KL, their settings that differ.

    python -m tools.compare ckpts_a ckpts_b                        compare.html and compare.png
    python -m tools.compare runs/* --out runs/all.html
    python -m tools.compare ckpts --summaries a_summary.json b_summary.json

Where eval.py has been run its points are there, too. Its summaries are looked for in each run's folder, beside it, and
in the working directory (*_summary.json); they name the policy that they are of. --summaries names others instead.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, opt

from eval import find_run
from evaluation.comparison import CURVES, ComparedRun, write_comparison
from evaluation.report import PATH, read_columns
from runtime.cli import parse_flags, run
from runtime.files import read_table
from runtime.fingerprints import saved_weights_sha256
from runtime.saved_run import SavedRun
from training.commands import eval_command
from training.earlier_run import SILENT

SUMMARY = ("label", "policy", "kl_seq_exact", "kl_seq_exact_ci", "win_rate", "win_rate_ci", "n", "settings")


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
    names = names if len(set(names)) == len(names) else list(map(str, folders))
    runs = [read_run(folder, evaluations[folder], name) for folder, name in zip(folders, names, strict=True)]
    notes = what_to_mind(runs)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(runs, notes, page)
    except OSError as error:
        raise UserError(f"out={cfg.out} cannot be written ({error.strerror or error}): name another file") from None
    for folder in folders:
        if not evaluations[folder]:
            rm_name = SavedRun(folder).settings["rm_name"]
            print(f"{folder} has no point of eval.py: {eval_command(folder / 'policy_lm', rm_name)}")
        elif are_outdated(folder, evaluations[folder]):
            print(f"note: an evaluation of {folder} is of a policy that it no longer has: run eval.py again")
    print("\n".join(f"note: {note}" for note in notes), end="\n" if notes else "")
    print(f"written: {page} and {page.with_suffix('.png')}")


def read_run(folder: Path, evaluations: list[dict[str, Any]], name: str) -> ComparedRun:
    """A run as its folder has it, under a name (raises UserError where that is not one that has taken a step)."""
    if not SavedRun(folder).exists:
        raise UserError(f"runs: {folder} is not the folder of a run: name one that train.py made")
    known = SavedRun(folder).settings
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    metrics = read_table(folder / "metrics.csv", "episodes", *CURVES)
    if not len(metrics):
        raise UserError(f"runs: {folder} has taken no step yet: wait for its first")
    names = [f.name for f in fields(TrainConfig) if f.name in known and f.name not in SILENT | {"report_to"}]
    settings = {name: about.get(name) for name in [*names, "device_name"]}
    settings["git_commit"] = str(about.get("git_commit") or "unknown")[:10]
    path = read_columns(folder, "eval.csv", PATH)
    return ComparedRun(name, settings, SavedRun(folder).label, metrics, path, evaluations)


def what_to_mind(runs: Sequence[ComparedRun]) -> list[str]:
    """Why figures of these runs may not be comparable."""
    notes = {
        "these runs have different rewards, so their scores cannot be compared": (
            "rm_name",
            "target_label",
            "reward_on_prompt",
        ),
        "these runs have different bases, and each KL is to its own": ("policy_name", "ref_name"),
        "these runs have different prompts": ("dataset", "dataset_config", "text_column", "max_prompt_len"),
        "these runs decode differently, and so do their figures": ("temperature", "top_k", "top_p", "max_new_tokens"),
    }
    differing = [
        note
        for note, names in notes.items()
        if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs for name in names)
    ]
    judges = {one.get("judge_sha256") for run in runs for one in run.evaluations} - {None}
    if len(judges) > 1:
        differing.append("these evaluations have different second judges")
    return differing


# --- what eval.py has written ---------------------------------------------------------------------------------------


def find_evaluations(folders: Sequence[Path], named: Sequence[Path]) -> dict[Path, list[dict[str, Any]]]:
    """The summaries that belong to each run: those named, or else those in it, beside it and here.

    Raises UserError where a named one cannot be read or belongs to none of the runs.
    """
    places = dict.fromkeys(place for folder in folders for place in (folder, folder.parent, Path()))
    files = named or sorted({path.resolve(): path for p in places for path in p.glob("*_summary.json")}.values())
    homes = {folder.resolve(): folder for folder in folders}
    found: dict[Path, list[dict[str, Any]]] = {folder: [] for folder in folders}
    for path in files:
        summary = read_summary(path)
        home = None if summary is None else run_of(path, summary["settings"].get("policy_path", ""))
        folder = None if home is None else homes.get(home)
        if folder is not None and summary is not None:
            found[folder].append(summary)
        elif named:
            problem = "is not a summary of eval.py" if summary is None else "is of none of these runs"
            raise UserError(f"summaries: {path} {problem}: name eval_summary.json files of these runs")
    return found


def are_outdated(folder: Path, summaries: Sequence[dict[str, Any]]) -> bool:
    """Whether a summary is of weights that are in the run no longer, because it was trained on."""
    evaluated = {summary["policy_sha256"] for summary in summaries if summary.get("policy_sha256")}
    if not evaluated:
        return False
    return not evaluated <= {saved_weights_sha256(folder / policy) for policy in ("policy_lm", "best/policy_lm")}


def read_summary(path: Path) -> dict[str, Any] | None:
    """A summary of eval.py; None if the file is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= set(SUMMARY) else None


def run_of(path: Path, policy_path: str) -> Path | None:
    """The folder of the run that a summary is of: the one that it is in, else that of the policy that it names.

    A policy's path is as it was given to eval.py, so it is looked up from here and from where the summary is.
    """
    if SavedRun(path.parent).exists:
        return path.parent.resolve()
    homes = (find_run(str(start / policy_path)) for start in (Path(), path.parent))
    return next((home.resolve() for home in homes if home is not None), None)


if __name__ == "__main__":
    sys.exit(run(main))
