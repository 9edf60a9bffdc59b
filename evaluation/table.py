"""The evaluation in words and figures: the verdict on one line, the table."""

from typing import Any

import numpy as np

from reward import score_title

PERCENT, SIGNED, PLAIN, LONG = "{:.1f}", "{:+.3f}", "{:.2f}", "{:.3f}"
TABLE = {  # key in eval_summary.json -> its title in the table, and its format; {…} are filled in from the summary
    "score_mean": ("{title} mean{range}", SIGNED),
    "positive_rate": ("{label} responses, %", PERCENT),
    "log_odds": ("log-odds of {label}", PLAIN),
    "judge_mean": ("second judge, -1 to 1", SIGNED),
    "judge_positive_rate": ("second judge: {judge_label}, %", PERCENT),
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
    "score_gain": ("{title} gain", SIGNED),
    "win_rate": ("win-rate, % (a tie is half)", PERCENT),
    "judge_gain": ("gain, second judge", SIGNED),
    "judge_gain_expected": ("  expected at such scores", SIGNED),
    "judge_gap_rate": ("gain in positives not confirmed, %", PERCENT),
    "response_len_expected": ("length expected at such scores", PLAIN),
    "kl_seq": ("KL to base, nats per response", PLAIN),
    "kl_seq_exact": ("  the same, exact per token", PLAIN),
    "kl_token": ("KL to base, nats per token", LONG),
    "kl_token_exact": ("  the same, exact", LONG),
    "optimal_share_rate": ("% of the best gain at this KL", PERCENT),
}
SAME_THING = 0.2  # judge_slope: with less, the second judge measures something else than the reward
FEW = 30  # prompts: with fewer, intervals are narrower than they should be
ANY_UNIT = "{:+.4g}"  # of scores that are not a label's probability
INTERVALS = {"score_mean": "score_ci", "positive_rate": "positive_ci", "eos_rate": "eos_ci"}


def verdict(summary: dict[str, Any]) -> str:
    """The whole comparison in words, on one line."""
    ours, base = summary["policy"], summary["base"]
    low, high = summary["score_gain_ci"]
    kind = "more" if low > 0 else "less" if high < 0 else "about as"
    words = [
        f"The policy {_does_better(summary, kind)} base: {_against(summary)}, win-rate {summary['win_rate']:.0%}, "
        f"at {summary['kl_seq_exact']:.1f} nats from base."
    ]
    if "optimal_share_rate" in summary:
        kl, best = (np.array(summary["optimal_curve"][name]) for name in ("kl", "score_mean"))
        # where the curve is flat it needs no more draws
        flat = kl[best > best.max() - 0.005 * summary["score_unit"]].min()
        certain = min(summary["kl_seq_exact"], flat) <= summary["kl_certain"]
        doubt = "" if certain else " (more draws would be needed to be certain)"
        words.append(f"It has {summary['optimal_share_rate']:.0%} of the gain shown possible at that KL{doubt}.")
    losses = [
        f"{what} ({form.format(ours[key])} against {form.format(base[key])})"
        for key, sign, what, form in (
            ("distinct_2", -1, "less varied", LONG),
            ("repetition_rate", 1, "more repetitive", "{:.1%}"),
            ("human_perplexity", 1, "more surprised by human text", PLAIN),
        )
        if {key} <= ours.keys() & base.keys() and sign * (ours[key] - base[key]) > 0.1 * abs(base[key]) + 0.005
    ]
    if abs(ours["response_len"] - base["response_len"]) > 0.15 * base["response_len"]:
        longer = "longer" if ours["response_len"] > base["response_len"] else "shorter"
        lengths = f"{ours['response_len']:.0f} against {base['response_len']:.0f} tokens"
        natural = summary.get("response_len_expected", base["response_len"])
        if abs(ours["response_len"] - natural) < abs(ours["response_len"] - base["response_len"]):
            lengths += f"; {natural:.0f} expected at such scores"
        losses.append(f"{longer} ({lengths})")
    words.append(f"It is {', '.join(losses)}." if losses else "Variety, repetition and length are about the same.")
    if summary["n"] < FEW:
        words.append(f"With only {summary['n']} prompts this is uncertain.")
    if summary.get("gamed"):
        words.append("WARNING: a second judge does not confirm the gain; the reward may have been gamed.")
    elif "judge_gain" in summary and kind == "more" and (summary["label"] or summary["judge_slope"] > SAME_THING):
        confirms = "confirms" if summary["judge_gain_ci"][0] > 0 else "cannot confirm"
        words.append(f"A second judge {confirms} it ({summary['judge_gain']:+.2f}).")
    return " ".join(words)


def _does_better(summary: dict[str, Any], kind: str) -> str:
    than = "as" if kind == "about as" else "than"
    if score_title(summary["label"]) == "sentiment":
        return f"writes {kind} {summary['label']}ly {than}"
    how = {"more": "higher", "less": "lower", "about as": "about as high"}[kind]
    return f"scores {how} {than}"


def _against(summary: dict[str, Any]) -> str:
    ours, base = summary["policy"], summary["base"]
    if summary["label"] is None:
        return f"{ours['score_mean']:.4g} against {base['score_mean']:.4g} on average"
    return f"{ours['positive_rate']:.0%} against {base['positive_rate']:.0%} {summary['label']}"


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Title, policy and base of each row of the table; paired figures are in the policy column."""
    ours, base = summary["policy"], summary["base"]
    label = summary["label"]
    blanks = {
        "title": score_title(label),
        "range": "" if label is None else ", -1 to 1",
        "label": label,
        "judge_label": summary["judge_label"],
    }
    forms = {"score_mean": ANY_UNIT, "score_gain": ANY_UNIT} if label is None else {}

    def rows(names: dict[str, tuple[str, str]], *known: dict[str, Any]) -> list[tuple[str, str, str]]:
        return [
            (key, title.format(**blanks), forms.get(key, form))
            for key, (title, form) in names.items()
            if all(key in estimates for estimates in known)
        ]

    both, paired = rows(TABLE, ours, base), rows(PAIRED, summary)
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
