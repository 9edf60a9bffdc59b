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

from config import EvalConfig, UserError, is_run, opt, whole_path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

import eval as evaluation_script
from eval import Comparison
from evaluation.curves import curve_picture, shares_picture
from evaluation.intervals import bootstrap_ci
from evaluation.summary import summarise
from model import GPT2WithValueHead, evaluate_both
from pretrain.models import quiet_saving
from runtime.cli import numbers, parse_flags, run
from runtime.device import keep_freed_memory
from runtime.files import check_table_path, new_folder, read_table, write_atomic
from runtime.hub import load_gpt2, load_tokenizer, quiet_libraries
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
    curve: bool = opt(False, "Compare with base at every alpha of --alphas.", "The curve of score against KL")
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
    draw: str | None = opt(
        None, "Only draw these tables, made with --frontier, a panel each; the picture is named after --csv."
    )
    seed: int = opt(
        4321, "Seed of the prompts and of the sampling, another one than that of eval.py.", "Where and how it runs"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = opt("auto", "auto takes cuda, else mps (Apple), else cpu.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "Precision of matrix products.")


def main(argv: Sequence[str] | None = None) -> None:
    """Find the policy at one KL, or compare with base along the whole curve (raises UserError)."""
    cfg = read_settings(argv)
    if cfg.draw is not None:
        draw_shares(
            [whole_path("draw", name.strip(), "read") for name in cfg.draw.split(",")],
            Path(cfg.csv.removesuffix(".csv") + ".png"),
        )
        return
    quiet_libraries()
    path = Path(cfg.runs[0]) / "policy_lm"
    evaluation = EvalConfig(
        policy_path=str(path),
        rm_name=cfg.rm_name,
        judge=cfg.judge,
        n_samples=cfg.n_samples,
        frontier=cfg.frontier,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        device=cfg.device,
        dtype=cfg.dtype,
    )
    run_cfg = evaluation_script.settings_of_run(evaluation)
    models = load_models(run_cfg, str(path))
    groups = [[folder] for folder in cfg.runs] if cfg.each else [cfg.runs]
    lines = {
        " + ".join(names): Line(models.reference, models.policy, [Path(name) / "policy_lm" for name in names])
        for names in groups
    }
    prompts = evaluation_script.held_out_prompts(evaluation, run_cfg, models.tokenizer)
    comparison = Comparison(cfg.seed, run_cfg, models, prompts)
    keep_freed_memory()
    if cfg.kl is not None:
        write_at_kl(cfg, next(iter(lines.values())), comparison)
    if cfg.curve:
        write_curves(cfg, evaluation, lines, comparison)


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
        if not is_run(Path(folder)):
            raise UserError(f"runs: {folder} is not the folder of a run: name one that train.py made")
    if cfg.curve:
        check_table_path(Path(cfg.csv))
    return cfg


class Line:
    """The policies theta_ref + alpha (theta_policy - theta_ref); theta_policy is the average over several runs."""

    def __init__(self, reference: GPT2WithValueHead, policy: GPT2WithValueHead, paths: Sequence[Path]) -> None:
        """Read the runs' weights; `policy` is the model that moves (raises UserError where weights do not fit)."""
        self.policy, self.start = policy, _weights(reference)
        ends = [_weights_of(path) for path in paths]
        vocabularies = [load_tokenizer("runs", str(path)).get_vocab() for path in paths]
        for path, vocabulary in zip(paths, vocabularies, strict=True):
            if vocabulary != vocabularies[0]:
                raise UserError(f"runs: {path} has another tokenizer than {paths[0]}: name runs of one base")
        for path, end in zip(paths, ends, strict=True):
            if {k: v.shape for k, v in end.items()} != {k: v.shape for k, v in self.start.items()}:
                raise UserError(f"runs: {path} is of another size than the base of {paths[0]}: name runs of one base")
        self.direction = {
            name: (sum(end[name] for end in ends) / len(ends)).to(start.device) - start  # type: ignore[union-attr]
            for name, start in self.start.items()
        }

    @torch.no_grad()
    def move_to(self, alpha: float) -> None:
        """Give the policy the weights at alpha."""
        moved = {name: start + alpha * self.direction[name] for name, start in self.start.items()}
        self.policy.lm.load_state_dict(moved)


def _weights(model: GPT2WithValueHead) -> Weights:
    return {name: weight.detach().float().clone() for name, weight in model.lm.state_dict().items()}


def _weights_of(path: Path) -> Weights:
    return load_gpt2(str(path), "runs").state_dict()


# --- one KL ---------------------------------------------------------------------------------------------------------


def write_at_kl(cfg: InterpolateConfig, line: Line, comparison: Comparison) -> None:
    """Find the alpha at which the policy is cfg.kl nats from base, and write that policy and where it came from."""
    assert cfg.kl is not None
    assert cfg.out is not None
    batches = batches_of(cfg, comparison)
    with progress_bar(title="looking for alpha", unit="point", leave=False) as bar:

        def measure(alpha: float) -> float:
            line.move_to(alpha)
            kl = float(exact_kl(comparison, batches).mean())
            bar.set_postfix(alpha=f"{alpha:.3f}", kl=f"{kl:.2f}")
            bar.update()
            return kl

        alpha = find_alpha(measure, cfg.kl)
    line.move_to(alpha)
    kl = exact_kl(comparison, batches)
    low, high = bootstrap_ci(kl, bounds=(kl.min(), kl.max()))
    home = json.loads((Path(cfg.runs[0]) / "config.json").read_text(encoding="utf-8"))
    about = {
        "runs": [str(Path(folder).resolve()) for folder in cfg.runs],
        "alpha": alpha,
        "kl_seq_exact": kl.mean(),
        "kl_ci": [low, high],
        "settings": asdict(cfg),
    }
    try:
        with quiet_saving(), new_folder(Path(cfg.out)) as folder:
            line.policy.lm.save_pretrained(folder / "policy_lm")
            comparison.models.tokenizer.save_pretrained(folder / "policy_lm")
            write_atomic(folder / "config.json", json.dumps({**home, "interpolated": about}, indent=2) + "\n")
            write_card(folder, folder / "policy_lm")
    except OSError as error:
        raise UserError(f"out: {cfg.out} cannot be written ({error.strerror or error}): name another folder") from None
    print(f"alpha {alpha:.3f}: {kl.mean():.2f} [{low:.2f}, {high:.2f}] nats from base on {len(kl)} held-out prompts")
    print(f"next: {eval_command(Path(cfg.out) / 'policy_lm', comparison.run.rm_name)}")


def batches_of(cfg: InterpolateConfig, comparison: Comparison) -> list[slice]:
    """The prompts in batches."""
    return [slice(i, i + cfg.batch_size) for i in range(0, len(comparison.prompts), cfg.batch_size)]


def exact_kl(comparison: Comparison, batches: Sequence[slice]) -> np.ndarray:
    """The exact KL (prompts,) of the policy's responses to base, in nats per response."""
    models = comparison.models
    found = []
    for rows in batches:
        seqs = comparison.respond(models.policy, rows, 0)
        found.append(evaluate_both(models.policy, models.reference, seqs)[4].sum(1).cpu().double())
    return torch.cat(found).numpy()


def find_alpha(measure: Callable[[float], float], target: float) -> float:
    """The alpha at which measure(alpha) is target, by bisection (raises UserError where none up to FARTHEST is).

    KL grows with the square of a small step, so every other guess is alpha sqrt(target / KL).
    """
    low, high, alpha, halve = 0.0, math.inf, 1.0, True
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


def write_curves(
    cfg: InterpolateConfig, evaluation: EvalConfig, lines: dict[str, Line], comparison: Comparison
) -> None:
    """Compare with base at each alpha of each line; write the table and the picture, and print what they show."""
    judge = evaluation_script.second_judge(evaluation, comparison.run)
    batches, draws = batches_of(cfg, comparison), pd.Series(dtype=object)
    if cfg.frontier:
        bar = progress_bar(batches, "best possible", "batch", leave=False)
        draws = pd.Series([text for rows in bar for text in comparison.base_scores(rows, cfg.frontier)])
    rows: list[dict[str, Any]] = []
    known: list[pd.DataFrame | None] = [None] * len(batches)  # base's answers, which all points share
    points = list(itertools.product(lines, numbers("alphas", cfg.alphas, float)))
    with progress_bar(points, unit="point") as bar:
        for name, alpha in bar:
            lines[name].move_to(alpha)
            known = [evaluation_script.compare(comparison, *pair) for pair in zip(batches, known, strict=True)]
            results = pd.concat(known)
            evaluation_script.add_judge(results, judge)
            if cfg.frontier:
                results["base_draws"] = draws
            summary = summarise(results, comparison.models.reward.label, comparison.run.target_label)
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


def draw_shares(names: Sequence[str], picture: Path) -> None:
    """Draw the share of the best gain against KL from tables that --curve wrote (raises UserError)."""
    tables = {
        name.removesuffix(".csv"): read_table(Path(name), "run", "alpha", "kl", "optimal_share") for name in names
    }
    if len({Path(name).name for name in tables}) == len(tables):
        tables = {Path(name).name: table for name, table in tables.items()}
    check_table_path(picture)
    shares_picture(tables, picture)
    print(picture)


def row_of(alpha: float, summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of one point of the curve; length and perplexity are relative to base's."""
    ours, base = summary["policy"], summary["base"]
    row: dict[str, Any] = {"alpha": alpha, "n": summary["n"], "kl": summary["kl_seq_exact"]}
    row["kl_low"], row["kl_high"] = summary["kl_seq_exact_ci"]
    row["score"] = ours["score_mean"]
    row["score_low"], row["score_high"] = ours["score_ci"]
    row |= {"base_score": base["score_mean"], "win_rate": summary["win_rate"]}
    row |= {"positive": ours.get("positive_rate"), "optimal_share": summary.get("optimal_share_rate")}
    row |= {"judge_positive": ours.get("judge_positive_rate"), "judge_gain": summary.get("judge_gain")}
    row |= {
        f"{short}_ratio": ours[name] / base[name]
        for short, name in (("length", "response_len"), ("perplexity", "perplexity"))
    }
    return row


if __name__ == "__main__":
    sys.exit(run(main))
