"""What an evaluation shows: every estimate with its 95 % interval, computed from eval_results.csv alone.

Rates are shares between 0 and 1, KL is in nats. A word is what white space separates.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from evaluation.frontier import Frontier, best_of_n_kl, exponential_tilt, frontier
from evaluation.intervals import (
    CENTRAL,
    RESAMPLES,
    allow_for_unseen,
    bootstrap_ci,
    jackknife_ci,
    resample_counts,
    wilson_ci,
)
from evaluation.table import INTERVALS, SAME_THING, verdict
from reward import full_label, score_title

NAMES = ("policy", "base")
Estimates = dict[str, Any]  # a figure by its name, and its interval
Columns = dict[str, np.ndarray]  # the numbers of the table, each (n,)
Bounds = tuple[float, float]  # the least and the largest that a number can be
LABEL_SCORES: Bounds = (-1.0, 1.0)  # of 2 P(label) - 1, the reward's or the second judge's
RATES: Bounds = (0.0, 1.0)


def summarise(results: pd.DataFrame, label: str | None, judge_label: str = "positive") -> dict[str, Any]:
    """All estimates with 95 % intervals, from the results alone.

    label is the one whose probability the scores are, None where they are any numbers; judge_label is the second
    judge's. score_unit is 1 for a label and the deviation of base's scores elsewhere.
    """
    # 1. in which units
    column = {name: results[name].to_numpy(dtype=float) for name in results.select_dtypes("number")}
    unit = 1.0 if label is not None else float(column["base_score"].std()) or 1.0
    score_bounds = LABEL_SCORES if label is not None else bounds_of_both("score", column)
    summary: dict[str, Any] = {
        "n": len(results),
        "label": label,
        "judge_label": full_label(judge_label),
        "score_unit": unit,
    }
    # 2. each model alone
    texts = {name: results[f"{name}_text"].tolist() for name in NAMES}
    parts = [key.removeprefix("policy_") for key in column if key.startswith("policy_reward_")]
    equal_lengths = dict(zip(NAMES, equally_long(texts["policy"], texts["base"]), strict=True))
    for name in NAMES:
        summary[name] = mean("score_mean", column[f"{name}_score"], score_bounds)
        for part in parts:
            summary[name] |= mean(part, column[f"{name}_{part}"], bounds_of_both(part, column))
        if label is not None:
            summary[name] |= share("positive_rate", column[f"{name}_score"] > 0)
            summary[name] |= mean("log_odds", column[f"{name}_log_odds"], bounds_of_both("log_odds", column))
        summary[name] |= model_estimates(name, column, texts[name], equal_lengths[name])
        if score_title(label) == "sentiment":  # the names that others read
            summary[name] |= {f"sentiment_{key}": summary[name][f"score_{key}"] for key in ("mean", "ci")}
        if "policy_judge" in column:
            summary[name] |= mean("judge_mean", column[f"{name}_judge"], LABEL_SCORES)
            summary[name] |= share("judge_positive_rate", column[f"{name}_judge"] > 0)
    # 3. one against the other
    gain = column["policy_score"] - column["base_score"]
    wins = (np.sign(gain) + 1) / 2  # a tie is half a win
    summary |= mean("score_gain", gain, bounds_of_difference(score_bounds))
    summary |= share("win_rate", wins) if gain.all() else mean("win_rate", wins, RATES)
    for suffix in ("", "_exact"):
        kl = column[f"kl_seq{suffix}"]
        summary |= mean(f"kl_seq{suffix}", kl)
        summary |= ratio(f"kl_token{suffix}", kl, column["policy_len"])
    summary |= expected_estimates(column, unit)
    if "policy_judge" in column:
        summary |= judge_estimates(column, label is not None)
    if "base_draws" in results:
        draws = np.array([row.split() for row in results["base_draws"]], dtype=float) / unit
        summary |= frontier_estimates(draws, column, unit, score_bounds)
    return summary | {"verdict": verdict(summary)}


# --- each model -----------------------------------------------------------------------------------------------------


def model_estimates(name: str, column: Columns, texts: list[str], equal_lengths: list[str]) -> Estimates:
    """Length, repetition, perplexities, and diversity; equal_lengths are the texts as long as those of the other."""
    length = column[f"{name}_len"]
    repeated, triples = np.array([repeated_trigrams(text) for text in texts], dtype=float).T
    estimates = {
        **mean("response_len", length, bounds_of_both("len", column)),
        **share("eos_rate", column[f"{name}_eos"] > 0),
        **ratio("repetition_rate", repeated, triples, RATES),
        **exponential(ratio("perplexity", column[f"{name}_nll_base"], length)),
        **of_all_texts("distinct_rate", distinct_responses, texts),
        "commonest": max(Counter(texts).values()),
    }
    for n in (1, 2, 3):
        estimates |= of_all_texts(f"distinct_{n}", partial(distinct, n=n), equal_lengths)
    if "human_len" in column:
        nll, length = (np.nan_to_num(column[key]) for key in (f"human_nll_{name}", "human_len"))
        estimates |= exponential(ratio("human_perplexity", nll, length))
    return estimates


def equally_long(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut both responses to each prompt to the length of the shorter one: in longer texts fewer words are new."""
    ours_cut, theirs_cut = [], []
    for our_words, their_words in zip(map(str.split, ours), map(str.split, theirs), strict=True):
        shorter = min(len(our_words), len(their_words))
        ours_cut.append(" ".join(our_words[:shorter]))
        theirs_cut.append(" ".join(their_words[:shorter]))
    return ours_cut, theirs_cut


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of a set of texts (Li et al. 2016); NaN where there are none."""
    counts = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(counts) / counts.total() if counts else float("nan")


def repeated_trigrams(text: str) -> tuple[int, int]:
    """How many trigrams of a text occur earlier in it, and how many it has."""
    grams = ngrams(text, 3)
    return len(grams) - len(set(grams)), len(grams)


def distinct_responses(texts: Sequence[str]) -> float:
    """Share of texts that are the first of their kind."""
    return len(set(texts)) / len(texts)


# --- both -----------------------------------------------------------------------------------------------------------


def expected_estimates(column: Columns, unit: float) -> Estimates:
    """Averages over base's responses, weighted until their mean score is the policy's: what such scores entail."""
    ours = column["policy_score"] / unit
    base = column["base_score"] / unit
    n = len(base)
    if np.ptp(base) < 1e-6:
        return {}
    counts = prompt_counts(RESAMPLES, n)
    shares = counts / counts.sum(1, keepdims=True)
    weights = exponential_tilt(base, shares @ ours, counts)
    lengths = weights @ column["base_len"]
    expected = resampled("response_len_expected", lengths, n, bounds_of_both("len", column))
    if "base_judge" in column:
        judge = column["base_judge"]
        gain = (weights - shares) @ judge
        expected |= resampled("judge_gain_expected", gain, n, bounds_of_difference(bounds_seen(judge)))
    return expected


def judge_estimates(column: Columns, has_label: bool) -> Estimates:
    """The gain according to the second judge, and whether the reward was gamed.

    Scores above 0 are positive, or above base's mean where the reward has no label. judge_slope says how much more
    often the judge calls base responses positive where the reward does. The reward counts as gamed if the judge
    confirms less than half of what that slope predicts.
    """
    # 1. how many more are positive, for the reward and for the judge
    middle = 0.0 if has_label else float(column["base_score"].mean())
    base_positive = column["base_score"] > middle
    base_judged = column["base_judge"] > 0
    more = (column["policy_score"] > middle).astype(float) - base_positive
    more_by_judge = (column["policy_judge"] > 0).astype(float) - base_judged
    # 2. how many more the judge should see
    liked = base_judged[base_positive]
    others = base_judged[~base_positive]
    slope = float(liked.mean() - others.mean()) if len(liked) and len(others) else 0.0
    expected = slope * more.mean()
    rise = bounds_of_difference(RATES)
    most_by_judge = bootstrap_ci(more_by_judge, bounds=rise)[1]
    gamed = slope > SAME_THING and more.mean() > 0.05 and most_by_judge < expected / 2
    # 3. the figures
    judge_gain = column["policy_judge"] - column["base_judge"]
    estimates = mean("judge_gain", judge_gain, bounds_of_difference(LABEL_SCORES))
    if has_label:
        estimates |= mean("judge_gap_rate", more - more_by_judge, bounds_of_difference(rise))
    return {**estimates, "judge_slope": slope, "gamed": bool(gamed)}


def frontier_estimates(draws: np.ndarray, column: Columns, unit: float, score_bounds: Bounds) -> Estimates:
    """Best-of-n, the optimal curve, and the policy's share of the gain that is possible at its KL.

    draws (n, N) are the scores of N responses of base to each prompt, in units of `unit`.
    """
    best = frontier(draws)
    sizes = [2**i for i in range(best.best_of.shape[1])]
    grid = np.unique([*best.kl.mean(0), *map(best_of_n_kl, sizes)])
    estimates: Estimates = {
        "best_of_n": [
            {"n": n, "kl": best_of_n_kl(n), "score_mean": unit * float(score)}
            for n, score in zip(sizes, best.best_of.mean(0), strict=True)
        ],
        "optimal_curve": {"kl": grid.tolist(), "score_mean": (unit * best.optimal_reward(grid)).tolist()},
        "kl_certain": float(best.kl.mean(0)[best.certain].max(initial=0.0)),
        "base_draws_mean": unit * float(best.best_of[:, 0].mean()),
    }
    return estimates | share_of_best_gain(best, column, unit, score_bounds)


def share_of_best_gain(best: Frontier, column: Columns, unit: float, score_bounds: Bounds) -> Estimates:
    """The policy's gain over the mean of base's draws, over the best gain at its KL; nothing near the base."""
    ours = column["policy_score"] / unit
    n = len(ours)
    counts = prompt_counts(400, n)
    weights = counts / counts.sum(1, keepdims=True)
    base = weights @ best.best_of[:, 0]
    gain = weights @ ours - base
    possible = best.optimal_reward(weights @ column["kl_seq_exact"], counts) - base
    if possible[0] <= 0.02:  # there is no gain to take a share of
        return {}
    base_mean = best.best_of[:, 0].mean()
    low, high = (float((bound / unit - base_mean) / possible[0]) for bound in score_bounds)
    return resampled("optimal_share_rate", gain / possible, n, (low, high))


# --- one estimate ---------------------------------------------------------------------------------------------------


def estimate(key: str, value: float, interval: list[float]) -> Estimates:
    """A figure and its interval under their names in eval_summary.json."""
    return {key: float(value), INTERVALS.get(key, f"{key}_ci"): interval}


def mean(key: str, values: np.ndarray, bounds: Bounds | None = None) -> Estimates:
    """The mean of values (n,); bounds are those of a value, by default those seen."""
    interval = bootstrap_ci(values, bounds=bounds or bounds_seen(values))
    return estimate(key, values.sum() / len(values), interval)


def ratio(key: str, values: np.ndarray, weights: np.ndarray, bounds: Bounds | None = None) -> Estimates:
    """sum(values) / sum(weights), both (n,); bounds are those of a value / weight. Nothing if all weights are 0."""
    if not weights.any():
        return {}
    seen = bounds_seen(values[weights > 0] / weights[weights > 0])
    return estimate(key, values.sum() / weights.sum(), bootstrap_ci(values, weights, bounds=bounds or seen))


def share(key: str, successes: np.ndarray) -> Estimates:
    """The share of yes among yes-or-no outcomes (n,)."""
    return estimate(key, np.mean(successes), wilson_ci(successes))


def exponential(estimates: Estimates) -> Estimates:
    """exp of a figure and of its interval."""
    return {name: np.exp(value).tolist() for name, value in estimates.items()}


def of_all_texts(key: str, measure: Callable[[list[str]], float], texts: list[str]) -> Estimates:
    """A measure of all texts together; nothing where it is NaN."""
    value = measure(texts)
    return {} if np.isnan(value) else estimate(key, value, jackknife_ci(measure, texts))


def resampled(key: str, values: np.ndarray, n: int, bounds: Bounds) -> Estimates:
    """A figure computed by hand: values are that of all n prompts, then those of their resamples."""
    interval = np.quantile(values[1:], CENTRAL).tolist()
    return estimate(key, values[0], allow_for_unseen(interval, float(values[0]), n, bounds))


def prompt_counts(resamples: int, n: int) -> np.ndarray:
    """How often each of n prompts is counted: once each in the first row, then as in the resamples."""
    return np.vstack([np.ones(n), resample_counts(n, 0)[:resamples]])


def bounds_seen(values: np.ndarray) -> Bounds:
    """The least and the largest of some values."""
    return float(values.min()), float(values.max())


def bounds_of_both(name: str, column: Columns) -> Bounds:
    """The least and the largest number that policy and base have: bounds of what has none by nature."""
    return bounds_seen(np.concatenate([column[f"{model}_{name}"] for model in NAMES]))


def bounds_of_difference(bounds: Bounds) -> Bounds:
    """Bounds of the difference of two numbers within these bounds."""
    low, high = bounds
    return low - high, high - low
