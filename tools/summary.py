"""What an evaluation says: every estimate with its interval, the verdict in plain words, the table.

All of it follows from eval_results.csv alone; rates are shares between 0 and 1, KL is in nats.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from tools.frontier import best_of_n_kl, frontier, tilted
from tools.measures import (
    bootstrap_ci,
    distinct,
    distinct_responses,
    equally_long,
    jackknife_ci,
    repeated_trigrams,
    resampled,
    wilson_ci,
)

PERCENT, SIGNED, PLAIN, LONG = "{:.1f}", "{:+.3f}", "{:.2f}", "{:.3f}"
TABLE = {  # key in eval_summary.json -> its name in the table, and how it is written
    "sentiment_mean": ("sentiment mean, -1 to 1", SIGNED),
    "positive_rate": ("positive responses, %", PERCENT),
    "log_odds": ("log-odds of positive", PLAIN),
    "judge_mean": ("second judge, -1 to 1", SIGNED),
    "judge_positive_rate": ("second judge: positive, %", PERCENT),
    "perplexity": ("perplexity under base", PLAIN),
    "human_perplexity": ("perplexity on human text", PLAIN),
    "distinct_1": ("distinct words, equal lengths", LONG),
    "distinct_2": ("distinct pairs, equal lengths", LONG),
    "distinct_3": ("distinct triples, equal lengths", LONG),
    "distinct_rate": ("distinct responses, %", PERCENT),
    "repetition_rate": ("repeated triples, %", PERCENT),
    "response_len": ("response length, tokens", PLAIN),
    "eos_rate": ("responses that end themselves, %", PERCENT),
}
PAIRED = {
    "sentiment_gain": ("sentiment gained", SIGNED),
    "win_rate": ("win-rate, % (a tie is half)", PERCENT),
    "judge_gain": ("gained, says the second judge", SIGNED),
    "judge_gain_expected": ("  as base's answers lead to expect", SIGNED),
    "judge_gap_rate": ("gain in positives it does not see, %", PERCENT),
    "response_len_expected": ("length that base leads to expect", PLAIN),
    "kl_seq": ("KL to base, nats per response", PLAIN),
    "kl_seq_exact": ("  the same, exact per token", PLAIN),
    "kl_token": ("KL to base, nats per token", LONG),
    "kl_token_exact": ("  the same, exact", LONG),
    "optimal_share_rate": ("% of the best gain at this KL", PERCENT),
}
NAMES = ("policy", "base")
FEW = 30  # prompts: with fewer, intervals are narrower than they should be
INTERVALS = {"sentiment_mean": "sentiment_ci", "positive_rate": "positive_ci", "eos_rate": "eos_ci"}


def summarise(results: pd.DataFrame) -> dict[str, Any]:
    """Estimates with 95 % intervals, all of them from the results alone; rates are shares between 0 and 1."""
    column = {name: results[name].to_numpy(dtype=float) for name in results.select_dtypes("number")}
    summary: dict[str, Any] = {"n": len(results)}
    even = dict(zip(NAMES, equally_long(*(results[f"{name}_text"].tolist() for name in NAMES)), strict=True))
    for name in NAMES:
        texts, length = results[f"{name}_text"].tolist(), column[f"{name}_len"]
        repeated, triples = np.array([repeated_trigrams(text) for text in texts], dtype=float).T
        summary[name] = {
            **_estimate("sentiment_mean", column[f"{name}_score"]),
            **_share("positive_rate", column[f"{name}_score"] > 0),
            **_estimate("log_odds", column[f"{name}_log_odds"]),
            **_estimate("response_len", length),
            **_share("eos_rate", column[f"{name}_eos"] > 0),
            **_estimate("repetition_rate", repeated, triples),
            **_exponential("perplexity", column[f"{name}_nll_base"], length),
            **_of_all("distinct_rate", distinct_responses, texts),
            "commonest": max(Counter(texts).values()),
        }
        for n in (1, 2, 3):
            summary[name] |= _of_all(f"distinct_{n}", partial(distinct, n=n), even[name])
        if "human_len" in column:
            written = np.nan_to_num(column["human_len"])
            summary[name] |= _exponential("human_perplexity", np.nan_to_num(column[f"human_nll_{name}"]), written)
        if f"{name}_judge" in column:
            summary[name] |= _estimate("judge_mean", column[f"{name}_judge"])
            summary[name] |= _share("judge_positive_rate", column[f"{name}_judge"] > 0)
    gain = column["policy_score"] - column["base_score"]
    summary |= _estimate("sentiment_gain", gain)
    wins = (np.sign(gain) + 1) / 2  # a tie is half a win
    summary |= (_share if gain.all() else _estimate)("win_rate", wins)
    for key in ("kl_seq", "kl_seq_exact"):
        summary |= _estimate(key, column[key])
        summary |= _estimate(key.replace("seq", "token"), column[key], column["policy_len"])
    summary |= _expected(column)
    if "policy_judge" in column:
        summary |= _judge_summary(column)
    if "base_draws" in results:
        summary |= _frontier_summary(results)
    return summary | {"verdict": verdict(summary)}


def _estimate(key: str, values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
    """A mean, or a ratio of sums, with its interval (none where the weights are all 0)."""
    values = np.asarray(values, dtype=float)
    if weights is not None and not weights.any():
        return {}
    mean = values.sum() / (len(values) if weights is None else weights.sum())
    return {key: float(mean), INTERVALS.get(key, f"{key}_ci"): bootstrap_ci(values, weights)}


def _share(key: str, successes: np.ndarray) -> dict[str, Any]:
    return {key: float(np.mean(successes)), INTERVALS.get(key, f"{key}_ci"): wilson_ci(successes)}


def _exponential(key: str, values: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    return {name: np.exp(value).tolist() for name, value in _estimate(key, values, weights).items()}


def _of_all(key: str, measure: Callable[[list[str]], float], texts: list[str]) -> dict[str, Any]:
    value = measure(texts)
    return {} if np.isnan(value) else {key: value, f"{key}_ci": jackknife_ci(measure, texts)}


def _judge_summary(column: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the second judge makes of the gain, and whether the reward was gamed: the judge sees less than half of what
    it should, given how much more often it finds those base responses positive which the reward does.
    """
    positive = {name: column[name] > 0 for name in ("policy_score", "base_score", "policy_judge", "base_judge")}
    more = positive["policy_score"].astype(float) - positive["base_score"]
    more_by_judge = positive["policy_judge"].astype(float) - positive["base_judge"]
    liked, others = positive["base_judge"][positive["base_score"]], positive["base_judge"][~positive["base_score"]]
    slope = float(liked.mean() - others.mean()) if len(liked) and len(others) else 0.0
    expected = slope * more.mean()
    return {
        **_estimate("judge_gain", column["policy_judge"] - column["base_judge"]),
        **_estimate("judge_gap_rate", more - more_by_judge),
        "judge_slope": slope,
        "gamed": bool(slope > 0.2 and more.mean() > 0.05 and bootstrap_ci(more_by_judge)[1] < expected / 2),
    }


def _expected(column: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a mean score like the policy's brings along by itself: base's answers, weighted until theirs is as high."""
    ours, base = column["policy_score"], column["base_score"]
    if np.ptp(base) < 1e-6:
        return {}
    times = np.vstack([np.ones(len(base)), resampled(len(base), 0)])
    shares = times / times.sum(1, keepdims=True)
    weights = tilted(base, shares @ ours, times)
    seen = {"response_len_expected": weights @ column["base_len"]}
    if "base_judge" in column:
        seen["judge_gain_expected"] = (weights - shares) @ column["base_judge"]
    return {name: value for key, (first, *rest) in seen.items() for name, value in
            ((key, float(first)), (f"{key}_ci", np.quantile(rest, [0.025, 0.975]).tolist()))}  # fmt: skip


def _frontier_summary(results: pd.DataFrame) -> dict[str, Any]:
    """Best-of-n, the optimal curve, and the policy's share of the gain that is possible at its KL."""
    scores = np.array([row.split() for row in results["base_draws"]], dtype=float)
    best = frontier(scores)
    ours, kl = results["policy_score"].to_numpy(), results["kl_seq_exact"].to_numpy()
    sizes = [2**i for i in range(best.best_of.shape[1])]
    grid = np.unique([*best.kl.mean(0), *map(best_of_n_kl, sizes)])
    found: dict[str, Any] = {
        "best_of_n": [
            {"n": n, "kl": best_of_n_kl(n), "sentiment_mean": float(mean)}
            for n, mean in zip(sizes, best.best_of.mean(0), strict=True)
        ],
        "optimal_curve": {"kl": grid.tolist(), "sentiment_mean": best.optimal_reward(grid).tolist()},
        "kl_certain": float(best.kl.mean(0)[best.certain].max(initial=0.0)),
        "base_draws_mean": float(best.best_of[:, 0].mean()),
    }  # fmt: skip

    def gains(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = times / times.sum(1, keepdims=True)
        base = weights @ best.best_of[:, 0]
        return weights @ ours - base, best.optimal_reward(weights @ kl, times) - base

    gain, possible = gains(np.ones((1, len(ours))))
    if possible[0] > 0.02:  # next to the base there is no gain to have a share of
        resampled_gain, resampled_possible = gains(resampled(len(ours), 0)[:400])
        low, high = np.quantile(resampled_gain / resampled_possible, [0.025, 0.975])
        found["optimal_share_rate"] = float(gain[0] / possible[0])
        found["optimal_share_rate_ci"] = [float(low), float(high)]
    return found


# --- the table ------------------------------------------------------------------------------------------------------


def verdict(summary: dict[str, Any]) -> str:
    """The whole comparison in plain words, on one line."""
    ours, base = summary["policy"], summary["base"]
    low, high = summary["sentiment_gain_ci"]
    kind = "more" if low > 0 else "less" if high < 0 else "about as"
    than = "as" if kind == "about as" else "than"
    words = [
        f"The policy writes {kind} {'positively ' + than} base: {ours['positive_rate']:.0%} against "
        f"{base['positive_rate']:.0%} positive, win-rate {summary['win_rate']:.0%}, "
        f"at {summary['kl_seq_exact']:.1f} nats from base."
    ]  # fmt: skip
    if "optimal_share_rate" in summary:
        kl, best = (np.array(summary["optimal_curve"][name]) for name in ("kl", "sentiment_mean"))
        flat = kl[best > best.max() - 0.005].min()  # from there on there is no more to be had, and no doubt about it
        certain = min(summary["kl_seq_exact"], flat) <= summary["kl_certain"]
        doubt = "" if certain else " (more draws would be needed to be certain)"
        words.append(f"It has {summary['optimal_share_rate']:.0%} of the gain shown possible at that KL{doubt}.")
    losses = [
        f"{what} ({form.format(ours[key])} against {form.format(base[key])})"
        for key, sign, what, form in (
            ("distinct_2", -1, "less varied", LONG), ("repetition_rate", 1, "more repetitive", "{:.1%}"),
            ("human_perplexity", 1, "more surprised by human text", PLAIN),
        )
        if {key} <= ours.keys() & base.keys() and sign * (ours[key] - base[key]) > 0.1 * abs(base[key]) + 0.005
    ]  # fmt: skip
    if abs(ours["response_len"] - base["response_len"]) > 0.15 * base["response_len"]:
        longer = "longer" if ours["response_len"] > base["response_len"] else "shorter"
        lengths = f"{ours['response_len']:.0f} against {base['response_len']:.0f} tokens"
        natural = summary.get("response_len_expected", base["response_len"])
        if abs(ours["response_len"] - natural) < abs(ours["response_len"] - base["response_len"]):
            lengths += f"; {natural:.0f} would go with such scores"
        losses.append(f"{longer} ({lengths})")
    words.append(f"It is {', '.join(losses)}." if losses else "Variety, repetition and length are about as before.")
    if summary["n"] < FEW:
        words.append(f"With only {summary['n']} prompts none of this is certain.")
    if summary.get("gamed"):
        words.append("WARNING: a second judge does not confirm the gain; the reward may have been gamed.")
    elif "judge_gain" in summary and kind == "more":
        confirms = "confirms" if summary["judge_gain_ci"][0] > 0 else "cannot confirm"
        words.append(f"A second judge {confirms} it ({summary['judge_gain']:+.2f}).")
    return " ".join(words)


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Title, policy and base of each row of the table; what compares both stands under policy."""
    ours, base = summary["policy"], summary["base"]
    both = [(key, *row) for key, row in TABLE.items() if key in ours and key in base]
    paired = [(key, *row) for key, row in PAIRED.items() if key in summary]
    return [
        *((title, _shown(key, form, ours), _shown(key, form, base)) for key, title, form in both),
        *((title, _shown(key, form, summary), "") for key, title, form in paired),
    ]


def table(summary: dict[str, Any]) -> str:
    """The summary as a table of fixed-width columns, policy beside base, and the verdict."""
    lines = [f"{summary['n']} prompts, 95 % intervals in brackets", ""]
    lines += [f"{title:34}{ours:>30}{base:>30}" for title, ours, base in [("", "policy", "base"), *table_rows(summary)]]
    return "\n".join([*map(str.rstrip, lines), "", summary["verdict"]])


def _shown(key: str, form: str, estimates: dict[str, Any]) -> str:
    scale = 100 if form == PERCENT else 1
    mean, low, high = (form.format(scale * x) for x in (estimates[key], *estimates[INTERVALS.get(key, f"{key}_ci")]))
    return f"{mean} [{low}, {high}]"
