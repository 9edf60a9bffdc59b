"""The evaluation in words and figures: the verdict on one line, the table."""

import textwrap
from typing import Any, NamedTuple

import numpy as np

from reward import PART, score_title

PERCENT, SIGNED, PLAIN, LONG = "{:.1f}", "{:+.3f}", "{:.2f}", "{:.3f}"
# Group -> key in eval_summary.json -> title of the row, in which {…} are filled in from the summary, and format.
# A title stands alone, and leaves room for its figures on a line of 80 columns
GROUPS = {
    "Score": {
        "score_mean": ("mean {title}{range}", SIGNED),
        "positive_rate": ("{label} responses, %", PERCENT),
        "log_odds": ("log-odds of {label}", PLAIN),
        "score_gain": ("{title} gain over base", SIGNED),
        "win_rate": ("win-rate, % (a tie is half)", PERCENT),
        "optimal_share_rate": ("% of the best gain at this KL", PERCENT),
    },
    "Second judge": {
        "judge_mean": ("second judge: mean, -1 to 1", SIGNED),
        "judge_positive_rate": ("second judge: {judge_label}, %", PERCENT),
        "judge_gain": ("second judge: gain over base", SIGNED),
        "judge_gain_expected": ("second judge: gain expected", SIGNED),
        "judge_gap_rate": ("second judge: gain not confirmed, %", PERCENT),
    },
    "Text": {
        "perplexity": ("perplexity of responses under base", PLAIN),
        "human_perplexity": ("perplexity of human text", PLAIN),
        "distinct_1": ("distinct words, equal length", LONG),
        "distinct_2": ("distinct word pairs, equal length", LONG),
        "distinct_3": ("distinct word triples, equal length", LONG),
        "distinct_rate": ("distinct responses, %", PERCENT),
        "repetition_rate": ("repeated word triples, %", PERCENT),
        "response_len": ("response length, tokens", PLAIN),
        "response_len_expected": ("response length expected, tokens", PLAIN),
        "eos_rate": ("responses that end with EOS, %", PERCENT),
    },
    "KL": {
        "kl_seq": ("KL to base, nats per response", PLAIN),
        "kl_seq_exact": ("exact KL to base, nats per response", PLAIN),
        "kl_token": ("KL to base, nats per token", LONG),
        "kl_token_exact": ("exact KL to base, nats per token", LONG),
    },
}
SAME_THING = 0.2  # judge_slope: with less, the second judge measures something else than the reward
FEW = 30  # prompts: with fewer, intervals are narrower than they should be
ANY_UNIT = "{:+.4g}"  # of scores that are not a label's probability
LOSSES = (  # of a text: key, the sign of a change for the worse, its name and format
    ("distinct_2", -1, "less varied", LONG),
    ("repetition_rate", 1, "more repetitive", "{:.1%}"),
    ("human_perplexity", 1, "more surprised by human text", PLAIN),
)
NO_CHANGE = "Variety, repetition and length are about the same."
INTERVALS = {"score_mean": "score_ci", "positive_rate": "positive_ci", "eos_rate": "eos_ci"}


def verdict(summary: dict[str, Any]) -> str:
    """The whole comparison in words, on one line."""
    ours, base, label = summary["policy"], summary["base"], summary["label"]
    # 1. is it better?
    low, high = summary["score_gain_ci"]
    kind = "more" if low > 0 else "less" if high < 0 else "about as"
    if score_title(label) == "sentiment":
        does = f"writes {kind} {label}ly {'as' if kind == 'about as' else 'than'}"
    else:
        does = {"more": "scores higher than", "less": "scores lower than", "about as": "scores about as high as"}[kind]
    if label is None:
        figures = f"{ours['score_mean']:.4g} against {base['score_mean']:.4g} on average"
    else:
        figures = f"{ours['positive_rate']:.0%} against {base['positive_rate']:.0%} {label}"
    win_rate, kl = summary["win_rate"], summary["kl_seq_exact"]
    sentences = [f"The policy {does} base: {figures}, win-rate {win_rate:.0%}, at {kl:.1f} nats from base."]
    # 2. how far is it from the best possible?
    if "optimal_share_rate" in summary:
        sentences.append(of_the_best_gain(summary))
    # 3. what is lost?
    changes = [*losses(ours, base), *change_of_length(summary)]
    sentences.append(f"It is {', '.join(changes)}." if changes else NO_CHANGE)
    # 4. how sure is it?
    if summary["n"] < FEW:
        sentences.append(f"With only {summary['n']} prompts this is uncertain.")
    if summary.get("gamed"):
        sentences.append("WARNING: a second judge does not confirm the gain; the reward may have been gamed.")
    elif "judge_gain" in summary and kind == "more" and (label or summary["judge_slope"] > SAME_THING):
        confirms = "confirms" if summary["judge_gain_ci"][0] > 0 else "cannot confirm"
        sentences.append(f"A second judge {confirms} it ({summary['judge_gain']:+.2f}).")
    return " ".join(sentences)


def of_the_best_gain(summary: dict[str, Any]) -> str:
    """The share of the gain that is possible, and whether there were enough draws to know it."""
    kl, best = (np.array(summary["optimal_curve"][name]) for name in ("kl", "score_mean"))
    flat = kl[best > best.max() - 0.005 * summary["score_unit"]].min()  # from there on it needs no more draws
    certain = min(summary["kl_seq_exact"], flat) <= summary["kl_certain"]
    doubt = "" if certain else " (more draws would be needed to be certain)"
    return f"It has {summary['optimal_share_rate']:.0%} of the gain shown possible at that KL{doubt}."


def losses(ours: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """What is clearly worse than in base."""
    worse = []
    for key, sign, what, form in LOSSES:
        if key in ours and key in base and sign * (ours[key] - base[key]) > 0.1 * abs(base[key]) + 0.005:
            worse.append(f"{what} ({form.format(ours[key])} against {form.format(base[key])})")
    return worse


def change_of_length(summary: dict[str, Any]) -> list[str]:
    """Whether responses are clearly longer or shorter, and whether such scores explain a part of it."""
    ours, base = (summary[model]["response_len"] for model in ("policy", "base"))
    if abs(ours - base) <= 0.15 * base:
        return []
    lengths = f"{ours:.0f} against {base:.0f} tokens"
    natural = summary.get("response_len_expected", base)
    if abs(ours - natural) < abs(ours - base):
        lengths += f"; {natural:.0f} expected at such scores"
    return [f"{'longer' if ours > base else 'shorter'} ({lengths})"]


# --- the table ------------------------------------------------------------------------------------------------------

POLICY_ENDS, BASE_ENDS = 56, 80  # columns of a terminal


class Row(NamedTuple):
    """A row of the table; figures that compare the two models are in the policy's column."""

    title: str
    policy: str
    base: str


def table_groups(summary: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows of the table under the titles of their groups, of the figures that the summary has."""
    ours, base, label = summary["policy"], summary["base"], summary["label"]
    blanks = {
        "title": score_title(label),
        "range": "" if label is None else ", -1 to 1",
        "label": label,
        "judge_label": summary["judge_label"],
    }
    of_parts = {key: (f"mean of its part {key.removeprefix(PART)}", ANY_UNIT) for key in ours if is_part(key)}
    groups = {}
    for group, figures in GROUPS.items():
        if group == "Score":
            figures = {"score_mean": figures["score_mean"], **of_parts, **figures}
        rows = []
        for key, (title, form) in figures.items():
            if key in ours and key in base:
                rows.append(Row(title.format(**blanks), shown(key, form, ours, label), shown(key, form, base, label)))
            elif key in summary:
                rows.append(Row(title.format(**blanks), shown(key, form, summary, label), ""))
        if rows:
            groups[group] = rows
    return groups


def is_part(key: str) -> bool:
    """Whether a figure of a model is the mean of a part of its score."""
    return key.startswith(PART) and not key.endswith("_ci")


def shown(key: str, form: str, estimates: dict[str, Any], label: str | None) -> str:
    """A figure with its interval in brackets."""
    if label is None and key in ("score_mean", "score_gain"):
        form = ANY_UNIT
    scale = 100 if form == PERCENT else 1
    interval = estimates[INTERVALS.get(key, f"{key}_ci")]
    value, low, high = (form.format(scale * x) for x in (estimates[key], *interval))
    return f"{value} [{low}, {high}]"


def table(summary: dict[str, Any]) -> str:
    """The summary as a table for a terminal of 80 columns, group by group, and the verdict."""
    lines = [f"{summary['n']} prompts, 95 % intervals in brackets"]
    for group, rows in table_groups(summary).items():
        base = "base" if any(row.base for row in rows) else ""
        lines.append("")
        for row in (Row(group, "policy", base), *rows):
            lines += aligned(row)
    return "\n".join([*lines, "", *textwrap.wrap(summary["verdict"], BASE_ENDS, break_on_hyphens=False)])


def aligned(row: Row) -> list[str]:
    """A row with its figures at the right end of their columns; one that finds no room there begins another line."""
    lines = [row.title]
    for figure, end in ((row.policy, POLICY_ENDS), (row.base, BASE_ENDS)):
        if not figure:
            continue
        if len(lines[-1]) + 1 + len(figure) > end:
            lines.append("")
        lines[-1] += figure.rjust(end - len(lines[-1]))
    return lines
