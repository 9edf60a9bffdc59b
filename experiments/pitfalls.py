"""A museum of classic bugs of PPO on language models: plants one at a time, trains with it, and shows what it costs.

    python -m experiments.pitfalls --bug shift                  one bug: what the self-audit says of it
    python -m experiments.pitfalls --bug shift --audit false    trains with it all the same, and evaluates
    python -m experiments.pitfalls --seeds 0,1,2,3              all of them, without the audit, beside the right run
    python -m experiments.pitfalls --draw results/pitfalls.csv  only the table and the figure

The policy that a run leaves is evaluated without the bug. metrics.csv is what the run with the bug reported itself.
Runs that are in the table already are skipped, so the same command again does what is left.
"""

import itertools
import json
import random
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from config import EvalConfig, TrainConfig, UserError, opt

import pandas as pd
import torch

import train
from data import load_examples
from evaluation.comparison import Comparison
from evaluation.settings import settings_of_run
from experiments.bugs import BUGS, Bug, planted, replaced
from experiments.pitfalls_page import CURVES, RIGHT, TAIL, markdown, picture
from pretrain.tiny_world import resolve_name
from runtime.cli import Stopped, numbers, parse_config, parse_flags, run, words
from runtime.files import check_table_path, read_table, remove, write_atomic
from training.audit import audit
from training.diagnostics import Diagnostics
from training.parts import load_models, load_policy
from training.plots import plot_curves
from training.session import Session

KEY = ("bug", "seed")
TRAIN = "--preset=tiny --total_steps=12 --lr=2e-4 --eval_every=0 --sample_every=12 --save_every=6"
EVALUATE = "--preset=tiny --min_prompt_len=10 --max_prompt_len=10 --n_samples=200"


@dataclass(frozen=True, kw_only=True)
class PitfallsConfig:
    """Settings of `python -m experiments.pitfalls`."""

    bug: str | None = opt(None, "Show this bug alone, or right for the run without one (default: train all of them).")
    audit: bool = opt(True, "With --bug: only show what the self-audit says. false trains with the bug.")
    seeds: str = opt("0", "Seeds for each bug.")
    train: str = opt(TRAIN, "Flags of train.py; without --dataset the prompts are openings of 4 to 14 words.")
    evaluate: str = opt(EVALUATE, "Flags of eval.py.")
    folder: str = opt("pitfalls", "Where the runs are kept.", path="written")
    csv: str = opt("results/pitfalls.csv", "The table; _curves.csv and .png are written beside it.", path="written")
    draw: str | None = opt(None, "Only print and draw this table.", path="read")


def main(argv: list[str] | None = None) -> None:
    """Show one bug, or train what is missing of all of them, then print and draw (raises UserError)."""
    cfg = parse_flags(PitfallsConfig, argv, __doc__)
    if parse_config(TrainConfig, words("train", cfg.train)).kl_in_loss:
        raise UserError("train: kl_in_loss must be false, because the bugs are in the formula with KL in the rewards")
    if cfg.draw is None and cfg.bug is not None:
        show(cfg, find(cfg.bug))
        return
    path = Path(cfg.draw or cfg.csv)
    failed = 0 if cfg.draw else run_all(cfg, path)
    table, curves = read_table(path, *KEY, "score"), read_table(curves_path(path), *KEY, *CURVES)
    print(markdown(table, curves, {bug.name: bug.fact for bug in BUGS}))
    picture(table, curves, path.with_suffix(".png"))
    if failed:
        raise UserError(f"{failed} runs failed, see above and log.txt in their folders")


def find(name: str) -> Bug | None:
    """The bug of a name, None for the right run (raises UserError)."""
    found = {RIGHT: None, **{bug.name: bug for bug in BUGS}}
    if name not in found:
        raise UserError(f"bug={name!r} is unknown: choose {', '.join(found)}")
    return found[name]


def name_of(bug: Bug | None) -> str:
    """A bug's name, also of none."""
    return RIGHT if bug is None else bug.name


def show(cfg: PitfallsConfig, bug: Bug | None) -> None:
    """Print what the self-audit says of a bug; without the audit, train with it and print what came of it."""
    print(f"{name_of(bug)}: {bug.wrong if bug else 'nothing is wrong.'}")
    if bug and bug.shipped:
        print(f"Shipped by: {bug.shipped}.")
    seed = numbers("seeds", cfg.seeds, int)[0]
    if cfg.audit:
        try:
            with planted(bug):
                train.main(parse_config(TrainConfig, [*train_flags(cfg, bug, seed), "--check"]))
            print(f"The self-audit does not see it. This test does: python -m pytest {bug.test}" if bug else "")
        except UserError as error:
            print(error)
        print("To train with it all the same: --audit false")
        return
    row, _ = one_run(cfg, bug, seed, Evaluator(words("evaluate", cfg.evaluate)), sys.stdout)
    print(
        f"as its last steps reported: score {row['reported_score']:+.2f}, KL {row['reported_kl']:.2f}, "
        f"length {row['reported_length']:.1f}, warnings: {row['warnings'] or 'none'}"
    )
    print(f"measured without the bug: score {row['score']:+.2f}, KL {row['kl']:.2f}, length {row['length']:.1f}")
    print(row["verdict"])


def run_all(cfg: PitfallsConfig, path: Path) -> int:
    """Train and evaluate the runs that are not in the table; returns how many failed."""
    check_table_path(path)
    evaluator, failed = Evaluator(words("evaluate", cfg.evaluate)), 0
    for seed, bug in itertools.product(numbers("seeds", cfg.seeds, int), [None, *BUGS]):
        if is_done(path, bug, seed):
            continue
        try:
            row, curves = one_run(cfg, bug, seed, evaluator)
        except (UserError, Stopped) as error:
            if isinstance(error, Stopped) and error.code >= 128:  # a signal
                raise
            failed += 1
            print(f"{name_of(bug)} seed {seed} failed: {error}", flush=True)
            continue
        append_rows(curves_path(path), curves)
        append_rows(path, pd.DataFrame([row]))
        print(f"{name_of(bug)} seed {seed}: score {row['score']:+.2f}, KL {row['kl']:.2f}", flush=True)
    return failed


# --- runs -----------------------------------------------------------------------------------------------------------


class Evaluator:
    """Compares policies with base as eval.py does; base's answers and the second judge are made once for all."""

    def __init__(self, flags: list[str]) -> None:
        """Keep the flags of eval.py."""
        self.flags = flags
        self.comparison: Comparison | None = None

    def summary(self, policy: Path) -> dict[str, Any]:
        """All estimates of evaluation/summary.py for a policy (raises UserError)."""
        cfg = parse_config(EvalConfig, [*self.flags, f"--policy_path={policy}"])
        if self.comparison is None:
            settings = settings_of_run(cfg)
            self.comparison = Comparison.of(cfg, settings, load_models(settings, cfg.policy_path))
        tuned, _ = load_policy(self.comparison.run, str(policy))
        comparison = replace(self.comparison, models=replace(self.comparison.models, policy=tuned))
        return comparison.summarise(comparison.results())


def one_run(
    cfg: PitfallsConfig, bug: Bug | None, seed: int, evaluator: Evaluator, out: TextIO | None = None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train with the bug and evaluate without it; returns the row for the table, and the run's own curves.

    What training prints goes into log.txt, or to `out`.
    """
    folder = Path(cfg.folder) / f"{name_of(bug)}_seed{seed}"
    remove(folder)
    folder.mkdir(parents=True)
    flags = train_flags(cfg, bug, seed)
    with (
        (folder / "log.txt").open("w", encoding="utf-8") as log,
        redirect_stdout(out or log),
        redirect_stderr(out or log),
    ):
        settings = train_with(bug, [*flags, f"--ckpt_dir={folder / 'run'}"])
        summary = evaluator.summary(folder / "run" / "policy_lm")
    metrics = pd.read_csv(folder / "run" / "metrics.csv")
    curves = metrics[["step", *CURVES]].assign(bug=name_of(bug), seed=seed)
    row = {"bug": name_of(bug), "seed": seed, **figures(summary, metrics, settings)}
    return row | {"train": shlex.join(flags), "evaluate": cfg.evaluate}, curves


def train_flags(cfg: PitfallsConfig, bug: Bug | None, seed: int) -> list[str]:
    """The flags of train.py for a run."""
    flags = [*words("train", cfg.train), *(bug.flags if bug else ()), f"--seed={seed}"]
    if "--dataset" in cfg.train:
        return flags
    return [*flags, f"--dataset={write_openings(Path(cfg.folder))}", "--min_prompt_len=4", "--max_prompt_len=16"]


def train_with(bug: Bug | None, flags: list[str]) -> TrainConfig:
    """Train with a bug and without the self-audit; returns the settings."""
    settings = parse_config(TrainConfig, flags)
    torch.manual_seed(settings.seed)
    with planted(bug), replaced(audit, lambda *_: None), replaced(plot_curves, lambda *_: None):
        if bug is not None and bug.resumed:
            with stopped_after(settings.total_steps // 2):
                train.main(settings)
            settings = parse_config(TrainConfig, [*flags, "--resume"])
        train.main(settings)
    return settings


@contextmanager
def stopped_after(last: int) -> Iterator[None]:
    """A context in which runs are stopped and saved after a step."""
    right = Session.steps

    def some_steps(self: Session) -> Iterator[int]:
        for step in right(self):
            yield step
            if step == last:
                self.save()
                return

    with replaced(right, some_steps):
        yield


def write_openings(folder: Path) -> str:
    """A file of prompts of 4 to 14 words, so that batches have padding; those of the tiny preset are equally long."""
    path = folder / "openings.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    texts, _ = load_examples(resolve_name("tiny:reviews"), "train", "text")
    lengths = random.Random(0)
    rows = [json.dumps({"text": " ".join(text.split()[: lengths.randint(4, 14)])}) for text in texts]
    write_atomic(path, "\n".join(rows) + "\n")
    return str(path)


def figures(summary: dict[str, Any], metrics: pd.DataFrame, settings: TrainConfig) -> dict[str, Any]:
    """What the evaluation found, and what the run reported: means of its last steps, and the warnings it printed."""
    ours, base = summary["policy"], summary["base"]
    diagnostics, tail = Diagnostics(settings), metrics.tail(TAIL)
    for row in metrics.to_dict("records"):
        diagnostics.warnings(row)
    return {
        "n": summary["n"],
        "score": ours["score_mean"],
        "score_ci": json.dumps(ours["score_ci"]),
        "kl": summary["kl_seq_exact"],
        "kl_ci": json.dumps(summary["kl_seq_exact_ci"]),
        "length": ours["response_len"],
        "length_ci": json.dumps(ours["response_len_ci"]),
        "judge": ours.get("judge_positive_rate"),
        "judge_ci": json.dumps(ours.get("judge_positive_rate_ci")),
        "win_rate": summary["win_rate"],
        "perplexity_ratio": ours["perplexity"] / base["perplexity"],
        "base_score": base["score_mean"],
        "base_length": base["response_len"],
        "base_judge": base.get("judge_positive_rate"),
        "verdict": summary["verdict"],
        "reported_score": tail.score_mean.mean(),
        "reported_kl": tail.kl_seq.mean(),
        "reported_length": tail.response_len.mean(),
        "warnings": " ".join(sorted(diagnostics.given)),
    }


def is_done(path: Path, bug: Bug | None, seed: int) -> bool:
    """Whether a run is in the table."""
    if not path.is_file():
        return False
    table = read_table(path, *KEY)
    return bool(((table.bug == name_of(bug)) & (table.seed == seed)).any())


def append_rows(path: Path, rows: pd.DataFrame) -> None:
    """Add the rows of one run to a table, in place of older ones of the same run."""
    if path.is_file():
        old = read_table(path, *KEY)
        same = (old.bug == rows.bug.iloc[0]) & (old.seed == rows.seed.iloc[0])
        rows = pd.concat([old[~same], rows])
    write_atomic(path, rows.to_csv(index=False, float_format="%.5g", lineterminator="\n"))


def curves_path(path: Path) -> Path:
    """The table of curves, beside the table of runs."""
    return path.with_name(f"{path.stem}_curves.csv")


if __name__ == "__main__":
    sys.exit(run(main))
