"""Moves a trained policy between base and beyond: one run, and any KL or the whole curve of score against KL.

    python -m tools.interpolate ckpts --kl 1 --out ckpts_1_nat        the policy that is 1 nat from base
    python -m tools.interpolate ckpts --curve --csv curve.csv         every point of the curve, as a table and a picture
    python -m tools.interpolate ckpts_a ckpts_b --kl 2 --out both     the average of two runs, at 2 nats
    python -m tools.interpolate ckpts_a ckpts_b --curve --each        the curves of both, one beside the other
    python -m tools.interpolate --draw a.csv,b.csv --csv both         both.png: shares of the best gain, from tables

The weights are theta_ref + alpha (theta_policy - theta_ref), where theta_policy is the average over the runs named: the
linear interpolation towards the initial weights and the averaging of WARP (Rame et al. 2024, arXiv 2406.16768).
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from config import REWARD_WEIGHTS_HELP, UserError, opt

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.comparison import Comparison, token_kl
from evaluation.intervals import bootstrap_ci
from evaluation.pictures import curve_picture, place_of, shares_picture
from evaluation.settings import eval_config, settings_of_run
from model import GPT2WithValueHead
from runtime.cli import numbers, parse_flags, run, whole_path
from runtime.device import keep_freed_memory
from runtime.files import check_table_path, new_folder, read_table, write_atomic
from runtime.hub import load_gpt2, load_tokenizer, quiet_libraries
from runtime.saved_run import SavedRun
from runtime.terminal import progress_bar
from training.card import write_card
from training.commands import eval_command
from training.parts import load_models

FARTHEST = 8.0  # alpha beyond which no KL is looked for
CLOSE = 0.02  # of the KL asked for: 256 prompts do not know it better
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig:
    """Settings of `python -m tools.interpolate`."""

    runs: list[str] = field(
        default_factory=lambda: ["ckpts"], metadata={"help": "Run folders; --runs may be left out.", "path": "read"}
    )
    kl: float | None = opt(None, "Find the policy at this KL to base, in nats per response, and write it to --out.")
    out: str | None = opt(None, "Folder to make; its policy_lm is a plain Hugging Face model.", path="written")
    curve: bool = opt(False, "Compare with base at every alpha of --alphas.", heading="The curve of score against KL")
    each: bool = opt(False, "A curve for each run instead of one for their average.")
    alphas: str = opt("0.25,0.5,0.75,1,1.25,1.5", "Points of the curve: 0 is base, 1 the policy.")
    at_kl: str = opt("1,2,4", "KLs, in nats, at which to print the share of the best gain, read off the curves.")
    csv: str = opt("interpolation.csv", "Table of the curve; a picture of its name is drawn beside it.", path="written")
    frontier: int = opt(16, "Base responses per prompt, for the best possible score on the curve (0: none).")
    n_samples: int = opt(256, "Held-out prompts.")
    batch_size: int = opt(128, "Prompts per forward pass.")
    judge: str = opt(
        "labels", "Second judge on the curve: labels, none or a classifier, as eval.py has it.", path="read"
    )
    rm_name: str | None = opt(None, "Reward (default: the run's, but a Python reward must be named here).", path="read")
    reward_weights: str | None = opt(None, f"{REWARD_WEIGHTS_HELP} (default: the run's).")
    draw: str | None = opt(
        None, "Only draw these tables, made with --frontier, a panel each; the picture is named after --csv."
    )
    seed: int = opt(
        4321,
        "Seed of the prompts and of the sampling, another one than that of eval.py.",
        heading="Where and how it runs",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = opt("auto", "auto takes cuda, else mps (Apple), else cpu.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "Precision of matrix products.")


def main(argv: Sequence[str] | None = None) -> None:
    """Find the policy at one KL, or compare with base along the whole curve (raises UserError)."""
    cfg = read_settings(argv)
    if cfg.draw is not None:
        draw_shares(cfg.draw, Path(cfg.csv.removesuffix(".csv") + ".png"))
        return
    quiet_libraries()
    # 1. the models of the first run, with the weights of all of them
    path = SavedRun(Path(cfg.runs[0])).policy
    judge = cfg.judge if cfg.curve else "none"
    evaluation = eval_config(cfg, policy_path=str(path), judge=judge)
    settings = settings_of_run(evaluation)
    models = load_models(settings, str(path))
    groups = [[folder] for folder in cfg.runs] if cfg.each else [cfg.runs]
    lines = {" + ".join(group): Line(models.reference, models.policy, group) for group in groups}
    # 2. what they are measured on
    comparison = Comparison.of(evaluation, settings, models)
    keep_freed_memory()
    # 3. what was asked for
    if cfg.kl is not None:
        write_at_kl(cfg, next(iter(lines.values())), comparison)
    if cfg.curve:
        write_curves(cfg, lines, comparison)


def read_settings(argv: Sequence[str] | None = None) -> InterpolateConfig:
    """Command line -> settings; words before the first flag are runs (raises UserError)."""
    cfg = parse_flags(InterpolateConfig, argv, __doc__, first="runs")
    if cfg.draw is not None:
        return cfg
    if cfg.kl is None and not cfg.curve:
        raise UserError("nothing to do: ask for --kl NATS --out DIR, for --curve or for --draw CSV")
    if cfg.kl is not None and not 0 < cfg.kl < math.inf:
        raise UserError(f"kl={cfg.kl} must be more than 0")
    if cfg.kl is not None and cfg.out is None:
        raise UserError("out is missing: name the folder to make, --out DIR")
    if cfg.out is not None and Path(cfg.out).exists():
        raise UserError(f"out={cfg.out} exists: remove it or choose another folder")
    if cfg.each and not cfg.curve:
        raise UserError("each draws one curve per run: say --curve, too")
    for name in ("alphas", "at_kl"):
        if not all(map(math.isfinite, numbers(name, getattr(cfg, name), float))):
            raise UserError(f"{name}={getattr(cfg, name)!r} must be finite")
    for folder in cfg.runs:
        SavedRun.named("runs", folder)
    if cfg.curve:
        check_table_path(Path(cfg.csv))
    return cfg


class Line:
    """The policies theta_ref + alpha (theta_policy - theta_ref); theta_policy is the average over several runs."""

    def __init__(self, reference: GPT2WithValueHead, policy: GPT2WithValueHead, runs: Sequence[str]) -> None:
        """Read the runs' weights; `policy` is the model that moves (raises UserError where weights do not fit)."""
        self.policy = policy
        self.start = {name: weight.detach().float().clone() for name, weight in reference.lm.state_dict().items()}
        paths = [str(SavedRun(Path(run)).policy) for run in runs]
        ends: list[Weights] = [load_gpt2(path, "runs").state_dict() for path in paths]
        vocabularies = [load_tokenizer("runs", path).get_vocab() for path in paths]
        for path, end, vocabulary in zip(paths, ends, vocabularies, strict=True):
            if vocabulary != vocabularies[0]:
                raise UserError(f"runs: {path} has another tokenizer than {paths[0]}: name runs of one base")
            if {k: v.shape for k, v in end.items()} != {k: v.shape for k, v in self.start.items()}:
                raise UserError(f"runs: {path} is of another size than the base of {paths[0]}: name runs of one base")
        self.direction = {}
        for name, start in self.start.items():
            total = sum((end[name] for end in ends[1:]), ends[0][name])
            self.direction[name] = (total / len(ends)).to(start.device) - start

    @torch.no_grad()
    def move_to(self, alpha: float) -> None:
        """Give the policy the weights at alpha."""
        moved = {name: start + alpha * self.direction[name] for name, start in self.start.items()}
        self.policy.lm.load_state_dict(moved)


# --- one KL ---------------------------------------------------------------------------------------------------------


def write_at_kl(cfg: InterpolateConfig, line: Line, comparison: Comparison) -> None:
    """Find the alpha at which the policy is cfg.kl nats from base, and write that policy and where it came from."""
    assert cfg.kl is not None
    assert cfg.out is not None
    # 1. find it
    with progress_bar(title="looking for alpha", unit="point", leave=False) as bar:

        def measure(alpha: float) -> float:
            line.move_to(alpha)
            kl = float(kl_of_responses(comparison).mean())
            bar.set_postfix(alpha=f"{alpha:.3f}", kl=f"{kl:.2f}")
            bar.update()
            return kl

        alpha = find_alpha(measure, cfg.kl)
    # 2. measure it
    line.move_to(alpha)
    kl = kl_of_responses(comparison)
    low, high = bootstrap_ci(kl, bounds=(kl.min(), kl.max()))
    origin = {
        "runs": [str(Path(folder).resolve()) for folder in cfg.runs],
        "alpha": alpha,
        "kl_seq_exact": kl.mean(),
        "kl_ci": [low, high],
        "settings": asdict(cfg),
    }
    # 3. write it
    record = {**SavedRun(Path(cfg.runs[0])).record, "interpolated": origin}
    try:
        with new_folder(Path(cfg.out)) as folder:
            made = SavedRun(folder)
            line.policy.lm.save_pretrained(made.policy)
            comparison.models.tokenizer.save_pretrained(made.policy)
            write_atomic(made.config_json, json.dumps(record, indent=2) + "\n")
            write_card(folder, made.policy)
    except OSError as error:
        raise UserError(f"out: {cfg.out} cannot be written ({error.strerror or error}): name another folder") from None
    print(f"alpha {alpha:.3f}: {kl.mean():.2f} [{low:.2f}, {high:.2f}] nats from base on {len(kl)} held-out prompts")
    print(f"next: {eval_command(Path(cfg.out) / 'policy_lm', comparison.run.rm_name)}")


def kl_of_responses(comparison: Comparison) -> np.ndarray:
    """The exact KL (prompts,) of the policy's responses to base, in nats per response."""
    models = comparison.models
    batches = []
    for rows in comparison.batches:
        responses = comparison.respond(models.policy, rows)
        batches.append(token_kl(models.policy, models.reference, responses).sum(1).cpu().double())
    return torch.cat(batches).numpy()


def find_alpha(measure: Callable[[float], float], target: float) -> float:
    """The alpha at which measure(alpha) is target, by bisection (raises UserError where none up to FARTHEST is).

    KL grows with the square of a small step, so every other guess is alpha sqrt(target / KL).
    """
    low, high = 0.0, math.inf
    alpha = 1.0
    halve = True
    while True:
        kl = measure(alpha)
        if abs(kl - target) <= CLOSE * target or high - low < 1e-4:
            return alpha
        if kl < target:
            low = alpha
        else:
            high = alpha
        if low >= FARTHEST:
            raise UserError(
                f"kl={target} cannot be reached: alpha {low:g} is {kl:.2f} nats from base; train for longer"
            )
        guess = alpha * math.sqrt(target / kl) if 0 < kl < math.inf else math.inf
        halve = not halve or not low < guess <= high
        alpha = (low + high) / 2 if halve and high < math.inf else min(guess, FARTHEST)


# --- the curve ------------------------------------------------------------------------------------------------------


def write_curves(cfg: InterpolateConfig, lines: dict[str, Line], comparison: Comparison) -> None:
    """Compare with base at each alpha of each line; write the table and the picture, and print what they show."""
    draws: list[str] = []
    if cfg.frontier:
        for batch in progress_bar(comparison.batches, "best possible", "batch", leave=False):
            draws += comparison.base_draws(batch)
    rows: list[dict[str, Any]] = []
    points = list(itertools.product(lines, numbers("alphas", cfg.alphas, float)))
    with progress_bar(points, unit="point") as bar:
        for name, alpha in bar:
            lines[name].move_to(alpha)
            results = comparison.results()
            summary = comparison.summarise(results.assign(base_draws=draws) if draws else results)
            rows.append({"run": name, **row_of(alpha, summary)})
            start = f"{name}, " if len(lines) > 1 else ""
            figures = f"score {summary['policy']['score_mean']:+.3g} at {summary['kl_seq_exact']:.2f} nats"
            tqdm.write(f"{start}alpha {alpha:g}: {figures}")
            table = pd.DataFrame(rows)
            write_atomic(Path(cfg.csv), table.to_csv(index=False, float_format="%.5g", lineterminator="\n"))
    picture = Path(cfg.csv).with_suffix(".png")
    curve_picture(table, summary, picture)
    if cfg.frontier:
        print(shares_at(table, numbers("at_kl", cfg.at_kl, float)))
    print(f"written: {cfg.csv}, and to look at: {picture}")


def shares_at(table: pd.DataFrame, kls: Sequence[float]) -> str:
    """Each run's share of the best gain at some KLs, read off between the points of its curve, and the runs' mean."""
    curves = {str(name): points.sort_values("kl") for name, points in table.groupby("run", sort=False)}
    rows = {
        name: [float(np.interp(kl, curve.kl, curve.optimal_share, math.nan, math.nan)) for kl in kls]
        for name, curve in curves.items()
    }
    shares = pd.DataFrame(rows, [f"{kl:g} nat{'s' * (kl != 1)}" for kl in kls]).T
    if len(shares) > 1:
        shares.loc["mean"] = shares.mean()
    return (100 * shares).rename_axis("% of the best gain at").to_string(float_format="%.1f", na_rep="-")


def draw_shares(draw: str, picture: Path) -> None:
    """Draw the share of the best gain against KL from tables that --curve wrote (raises UserError)."""
    names = [whole_path("draw", name.strip(), "read") for name in draw.split(",")]
    tables = [read_table(Path(name), "run", "alpha", "kl", "optimal_share") for name in names]
    titles = [Path(name).name.removesuffix(".csv") for name in names]
    if len(set(titles)) < len(titles):  # files of one name in several folders
        titles = [name.removesuffix(".csv") for name in names]
    check_table_path(picture)
    shares_picture(dict(zip(titles, tables, strict=True)), picture)
    print(picture)


def row_of(alpha: float, summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of one point of the curve; length and perplexity are relative to base's."""
    ours, base = summary["policy"], summary["base"]
    return {
        "alpha": alpha,
        "n": summary["n"],
        **place_of(summary),
        "base_score": base["score_mean"],
        "win_rate": summary["win_rate"],
        "positive": ours.get("positive_rate"),
        "optimal_share": summary.get("optimal_share_rate"),
        "judge_positive": ours.get("judge_positive_rate"),
        "judge_gain": summary.get("judge_gain"),
        "length_ratio": ours["response_len"] / base["response_len"],
        "perplexity_ratio": ours["perplexity"] / base["perplexity"],
    }


if __name__ == "__main__":
    sys.exit(run(main))
