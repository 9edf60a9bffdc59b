"""What an evaluation shows: every estimate with its 95 % interval, computed from eval_results.csv alone.

Rates are shares between 0 and 1, KL is in nats.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from evaluation.diversity import distinct, distinct_responses, equally_long, repeated_trigrams
from evaluation.frontier import best_of_n_kl, exponential_tilt, frontier
from evaluation.intervals import CENTRAL, allow_for_unseen, bootstrap_ci, jackknife_ci, resample_counts, wilson_ci
from evaluation.table import INTERVALS, SAME_THING, verdict
from reward import full_label, score_title

NAMES = ("policy", "base")
Bounds = tuple[float, float]  # the least and the largest that a number can be
LABEL_SCORES: Bounds = (-1.0, 1.0)  # of 2 P(label) - 1, the reward's or the second judge's
RATES: Bounds = (0.0, 1.0)


def summarise(results: pd.DataFrame, label: str | None, judge_label: str = "positive") -> dict[str, Any]:
    """All estimates with 95 % intervals, from the results alone; rates are shares between 0 and 1.

    label is the one whose probability the scores are, None where they are any numbers; judge_label is the second
    judge's. score_unit is 1 for a label and the deviation of base's scores elsewhere.
    """
    column = {name: results[name].to_numpy(dtype=float) for name in results.select_dtypes("number")}
    unit = 1.0 if label is not None else float(column["base_score"].std()) or 1.0
    summary: dict[str, Any] = {
        "n": len(results),
        "label": label,
        "judge_label": full_label(judge_label),
        "score_unit": unit,
    }
    score_bounds = LABEL_SCORES if label is not None else _both("score", column)
    even = dict(zip(NAMES, equally_long(*(results[f"{name}_text"].tolist() for name in NAMES)), strict=True))
    for name in NAMES:
        texts, length = results[f"{name}_text"].tolist(), column[f"{name}_len"]
        repeated, triples = np.array([repeated_trigrams(text) for text in texts], dtype=float).T
        summary[name] = {
            **_estimate("score_mean", column[f"{name}_score"], score_bounds),
            **(_label_estimates(name, column) if label is not None else {}),
            **_estimate("response_len", length, _both("len", column)),
            **_share("eos_rate", column[f"{name}_eos"] > 0),
            **_estimate("repetition_rate", repeated, RATES, triples),
            **_exponential("perplexity", column[f"{name}_nll_base"], length),
            **_of_all("distinct_rate", distinct_responses, texts),
            "commonest": max(Counter(texts).values()),
        }
        for n in (1, 2, 3):
            summary[name] |= _of_all(f"distinct_{n}", partial(distinct, n=n), even[name])
        if "human_len" in column:
            written = np.nan_to_num(column["human_len"])
            summary[name] |= _exponential("human_perplexity", np.nan_to_num(column[f"human_nll_{name}"]), written)
        if score_title(label) == "sentiment":  # the names that others read
            summary[name] |= {f"sentiment_{key}": summary[name][f"score_{key}"] for key in ("mean", "ci")}
        if f"{name}_judge" in column:
            summary[name] |= _estimate("judge_mean", column[f"{name}_judge"], LABEL_SCORES)
            summary[name] |= _share("judge_positive_rate", column[f"{name}_judge"] > 0)
    gain = column["policy_score"] - column["base_score"]
    summary |= _estimate("score_gain", gain, _of_difference(score_bounds))
    wins = (np.sign(gain) + 1) / 2  # a tie is half a win
    summary |= _share("win_rate", wins) if gain.all() else _estimate("win_rate", wins, RATES)
    for key in ("kl_seq", "kl_seq_exact"):
        summary |= _estimate(key, column[key])
        summary |= _estimate(key.replace("seq", "token"), column[key], weights=column["policy_len"])
    summary |= _expected(column, unit)
    if "policy_judge" in column:
        summary |= _judge_summary(column, label is not None)
    if "base_draws" in results:
        summary |= _frontier_summary(results, unit, score_bounds)
    return summary | {"verdict": verdict(summary)}


def _label_estimates(name: str, column: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is only defined where scores are 2 P(label) - 1: how often the label is likelier than not, its log-odds."""
    share = _share("positive_rate", column[f"{name}_score"] > 0)
    return share | _estimate("log_odds", column[f"{name}_log_odds"], _both("log_odds", column))


def _both(name: str, column: dict[str, np.ndarray]) -> Bounds:
    """The least and the largest number that policy and base have: bounds of what has none by nature."""
    return _seen(np.concatenate([column[f"{model}_{name}"] for model in NAMES]))


def _seen(values: np.ndarray) -> Bounds:
    return float(values.min()), float(values.max())


def _of_difference(bounds: Bounds) -> Bounds:
    """Bounds of the difference of two numbers within these bounds."""
    low, high = bounds
    return low - high, high - low


def _estimate(
    key: str, values: np.ndarray, bounds: Bounds | None = None, weights: np.ndarray | None = None
) -> dict[str, Any]:
    """A mean, or a ratio of sums, with its interval (none where the weights are all 0).

    bounds are those of a value, or of a value / weight; without them, those seen.
    """
    values = np.asarray(values, dtype=float)
    if weights is not None and not weights.any():
        return {}
    mean = values.sum() / (len(values) if weights is None else weights.sum())
    if bounds is None:
        bounds = _seen(values if weights is None else values[weights > 0] / weights[weights > 0])
    return {key: float(mean), INTERVALS.get(key, f"{key}_ci"): bootstrap_ci(values, weights, bounds=bounds)}


def _share(key: str, successes: np.ndarray) -> dict[str, Any]:
    return {key: float(np.mean(successes)), INTERVALS.get(key, f"{key}_ci"): wilson_ci(successes)}


def _exponential(key: str, values: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    return {name: np.exp(value).tolist() for name, value in _estimate(key, values, weights=weights).items()}


def _of_all(key: str, measure: Callable[[list[str]], float], texts: list[str]) -> dict[str, Any]:
    value = measure(texts)
    return {} if np.isnan(value) else {key: value, f"{key}_ci": jackknife_ci(measure, texts)}


def _judge_summary(column: dict[str, np.ndarray], has_label: bool) -> dict[str, Any]:
    """The gain according to the second judge, and whether the reward was gamed.

    Scores above 0 are positive, or above base's mean where the reward has no label. judge_slope says how much more
    often the judge calls base responses positive where the reward does. The reward counts as gamed if the judge
    confirms less than half of what that slope predicts.
    """
    middle = 0.0 if has_label else float(column["base_score"].mean())
    middles = {"policy_score": middle, "base_score": middle, "policy_judge": 0.0, "base_judge": 0.0}
    positive = {name: column[name] > least for name, least in middles.items()}
    more = positive["policy_score"].astype(float) - positive["base_score"]
    more_by_judge = positive["policy_judge"].astype(float) - positive["base_judge"]
    liked, others = positive["base_judge"][positive["base_score"]], positive["base_judge"][~positive["base_score"]]
    slope = float(liked.mean() - others.mean()) if len(liked) and len(others) else 0.0
    expected = slope * more.mean()
    rise = _of_difference(RATES)
    most_by_judge = bootstrap_ci(more_by_judge, bounds=rise)[1]
    return {
        **_estimate("judge_gain", column["policy_judge"] - column["base_judge"], _of_difference(LABEL_SCORES)),
        **(_estimate("judge_gap_rate", more - more_by_judge, _of_difference(rise)) if has_label else {}),
        "judge_slope": slope,
        "gamed": bool(slope > SAME_THING and more.mean() > 0.05 and most_by_judge < expected / 2),
    }


def _expected(column: dict[str, np.ndarray], unit: float) -> dict[str, Any]:
    """Averages over base's answers, weighted until their mean score is the policy's: what such scores entail."""
    ours, base = column["policy_score"] / unit, column["base_score"] / unit
    if np.ptp(base) < 1e-6:
        return {}
    counts = np.vstack([np.ones(len(base)), resample_counts(len(base), 0)])
    shares = counts / counts.sum(1, keepdims=True)
    weights = exponential_tilt(base, shares @ ours, counts)
    expected = _with_interval("response_len_expected", weights @ column["base_len"], len(base), _both("len", column))
    if "base_judge" in column:
        gain = (weights - shares) @ column["base_judge"]
        expected |= _with_interval("judge_gain_expected", gain, len(base), _of_difference(_seen(column["base_judge"])))
    return expected


def _with_interval(key: str, found: np.ndarray, n: int, bounds: Bounds) -> dict[str, Any]:
    """A number with its interval, from that of all n prompts and those of their resamples."""
    value, resamples = float(found[0]), found[1:]
    return {key: value, f"{key}_ci": allow_for_unseen(np.quantile(resamples, CENTRAL).tolist(), value, n, bounds)}


def _frontier_summary(results: pd.DataFrame, unit: float, score_bounds: Bounds) -> dict[str, Any]:
    """Best-of-n, the optimal curve, and the policy's share of the gain that is possible at its KL."""
    scores = np.array([row.split() for row in results["base_draws"]], dtype=float) / unit
    best = frontier(scores)
    ours, kl = results["policy_score"].to_numpy() / unit, results["kl_seq_exact"].to_numpy()
    sizes = [2**i for i in range(best.best_of.shape[1])]
    grid = np.unique([*best.kl.mean(0), *map(best_of_n_kl, sizes)])
    found: dict[str, Any] = {
        "best_of_n": [
            {"n": n, "kl": best_of_n_kl(n), "score_mean": unit * float(mean)}
            for n, mean in zip(sizes, best.best_of.mean(0), strict=True)
        ],
        "optimal_curve": {"kl": grid.tolist(), "score_mean": (unit * best.optimal_reward(grid)).tolist()},
        "kl_certain": float(best.kl.mean(0)[best.certain].max(initial=0.0)),
        "base_draws_mean": unit * float(best.best_of[:, 0].mean()),
    }

    def gains(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = counts / counts.sum(1, keepdims=True)
        base = weights @ best.best_of[:, 0]
        return weights @ ours - base, best.optimal_reward(weights @ kl, counts) - base

    # all prompts, then resamples of them
    gain, possible = gains(np.vstack([np.ones(len(ours)), resample_counts(len(ours), 0)[:400]]))
    if possible[0] > 0.02:  # near the base there is no gain to take a share of
        base = best.best_of[:, 0].mean()
        low, high = (float((bound / unit - base) / possible[0]) for bound in score_bounds)
        found |= _with_interval("optimal_share_rate", gain / possible, len(ours), (low, high))
    return found
