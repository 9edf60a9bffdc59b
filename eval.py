"""Compare a tuned policy with base GPT-2 on held-out prompts: is it better, how surely, and at what cost?

    python eval.py                              ckpts/policy_lm against the base it was trained from
    python eval.py --policy_path DIR            another run, or any GPT-2 folder
    python eval.py --top_k 50 --top_p 0.9       both models under another decoding
    python eval.py --frontier 64                and how far that is from the best possible at its KL

Owns the comparison, its statistics and its table. Both models answer the same prompts with the same random numbers,
so that differences are paired; every number follows from eval_results.csv alone.
"""

import contextlib
import csv
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from config import EvalConfig, TrainConfig, UserError, run_cli, saved_settings, with_changes  # isort: skip  (before torch: see there)

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import is_file, load_examples, load_prompts, pad_left
from model import GPT2WithValueHead, Sequences, check_fit, generate, load_reference, score_responses
from reward import SentimentReward, full_label
from tools.frontier import best_of_n, best_of_n_kl, frontier
from tools.judge import FittedJudge
from tools.make_models import resolve_name
from tools.measures import bootstrap_ci, distinct, distinct_responses, jackknife_ci, repeated_trigrams, resampled
from tools.report import write_report
from utils import (
    keep_freed_memory,
    load_tokenizer,
    quiet_libraries,
    resolve_device,
    resolve_dtype,
    spreadsheet_safe,
    uniforms,
    write_whole,
)  # fmt: skip

OF_RUN = {  # settings that eval.py takes from the run that made the policy, unless a flag says otherwise
    "ref_name", "rm_name", "target_label", "reward_on_prompt", "dataset", "text_column", "max_prompt_len",
    "min_prompt_len", "max_new_tokens", "temperature", "top_k", "top_p",
}  # fmt: skip
Judge = Callable[[list[str]], np.ndarray]


def main(cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate, print the table, write results, summary and report; returns the summary."""
    quiet_libraries()
    out_csv = Path(cfg.out_csv)
    check_target(out_csv)
    results = evaluate(cfg)
    summary = summarise(results)
    summary |= {"seed": cfg.seed, "settings": {f.name: getattr(cfg, f.name) for f in fields(cfg)}}
    write(results, summary, out_csv)
    print(table(summary))
    print(f"\nwritten: {out_csv}, {beside(out_csv, 'summary.json')}, and to look at: {beside(out_csv, 'report.html')}")
    return summary


def settings_of_run(cfg: EvalConfig) -> TrainConfig:
    """The settings of the run that made the policy, else train.py's defaults, where no flag overrides them."""
    folder = Path(cfg.policy_path)
    if cfg.policy_path == EvalConfig.policy_path and not folder.exists():
        raise UserError(f"policy_path={cfg.policy_path} does not exist yet: run python train.py, or name a policy")
    home = run_folder(cfg.policy_path)
    try:
        run = TrainConfig(**saved_settings(home / "config.json")) if home else TrainConfig()
    except UserError as error:
        raise UserError(f"{home}/config.json is damaged ({error}): mend it, or move the policy elsewhere") from None
    if home is None and not cfg.policy_path.startswith("tiny:"):
        print(f"note: {cfg.policy_path} lies in no run, so what no flag says is as train.py's defaults")
    flags = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in OF_RUN and getattr(cfg, f.name) is not None}
    for name, revision in (("rm_name", "rm_revision"), ("dataset", "dataset_revision")):
        if name in flags and flags[name] != getattr(run, name):
            flags[revision] = None  # it belonged to another
    device = resolve_device(cfg.device)
    return with_changes(
        run, **{"ref_name": run.policy_name if run.ref_name is None else run.ref_name, **flags},
        device=device, dtype=resolve_dtype(cfg.dtype, device),
    )  # fmt: skip


def run_folder(policy_path: str) -> Path | None:
    """The folder of the run that made a policy, whether it is its policy_lm or that of best/; None if it is in none."""
    parents = Path(policy_path).absolute().parents
    return next((p for p in parents[:2] if is_of_run(p / "config.json")), None)


def is_of_run(path: Path) -> bool:
    """Whether there is a run's config.json, whole or damaged, and not that of a model."""
    try:
        return path.is_file() and "total_steps" in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


# --- the comparison -------------------------------------------------------------------------------------------------


def evaluate(cfg: EvalConfig) -> pd.DataFrame:
    """Let policy and base answer held-out prompts; one row per prompt with texts, scores, lengths, KL and so on."""
    run = settings_of_run(cfg)
    dtype = getattr(torch, run.dtype)
    policy_name, ref_name = resolve_name(cfg.policy_path), resolve_name(str(run.ref_name))
    tokenizer = load_tokenizer("policy_path", policy_name)
    policy = GPT2WithValueHead.from_pretrained(policy_name, "policy_path", dtype).to(run.device)
    revision = run.policy_revision if run.ref_name == run.policy_name else None
    base = load_reference(ref_name, dtype=dtype, revision=revision).to(run.device)
    check_fit(policy, base, tokenizer, run.max_prompt_len + run.max_new_tokens)
    reward = SentimentReward(
        resolve_name(run.rm_name), run.target_label, run.device, dtype=dtype, revision=run.rm_revision
    )
    judge = second_judge(cfg, run)
    prompts = held_out_prompts(cfg, run, tokenizer)
    keep_freed_memory()

    def answer(model: GPT2WithValueHead, rows: slice, draw: int) -> Sequences:
        ids, mask = (x.to(run.device) for x in pad_left([ids[: run.max_prompt_len] for ids in prompts[rows]]))
        noise = uniforms(cfg.seed, draw, len(prompts), run.max_new_tokens)[rows].to(run.device)
        return generate(
            model, ids, mask, noise, eos_id=int(tokenizer.eos_token_id),
            temperature=run.temperature, top_k=run.top_k, top_p=run.top_p,
        )  # fmt: skip

    batches = [slice(first, first + cfg.batch_size) for first in range(0, len(prompts), cfg.batch_size)]
    parts = []
    for rows in tqdm(batches, "evaluating", unit="batch", dynamic_ncols=True):
        answers = {"policy": answer(policy, rows, 0), "base": answer(base, rows, 0)}
        part = compare(answers, policy, base, reward, tokenizer, run.reward_on_prompt)
        human = human_continuations(prompts[rows], run.max_prompt_len, run.max_new_tokens, run.device)
        parts.append(part.assign(**compare_on_human(human, policy, base)))
    results = pd.concat(parts, ignore_index=True)
    for name in ("prompt", "policy_text", "base_text"):
        results[name] = results[name].map(spreadsheet_safe)
    if judge is not None:
        for name in ("policy", "base"):
            results[f"{name}_judge"] = judge(results[f"{name}_text"].tolist())
    if cfg.frontier:
        scores = np.zeros((len(prompts), cfg.frontier))
        draws = [(rows, draw) for rows in batches for draw in range(cfg.frontier)]
        for rows, draw in tqdm(draws, "frontier", unit="batch", dynamic_ncols=True):
            texts = answer(base, rows, 1 + draw).texts(tokenizer, run.reward_on_prompt)
            scores[rows, draw] = reward(texts).cpu()
        results["base_draws"] = [" ".join(f"{x:.4f}" for x in row) for row in scores]
    return results


def second_judge(cfg: EvalConfig, run: TrainConfig) -> Judge | None:
    """The judge that training never saw: fitted on the data set's labels, or a classifier; None where neither."""
    if cfg.judge == "none":
        return None
    if cfg.judge != "labels":
        model = SentimentReward(resolve_name(cfg.judge), run.target_label, run.device, dtype=getattr(torch, run.dtype))
        return lambda texts: model(texts).cpu().numpy()
    try:
        name = resolve_name(run.dataset, run.split)
        texts, labels = load_examples(name, run.split, run.text_column, cfg.label_column, run.dataset_revision)
    except UserError:
        if cfg.label_column != EvalConfig.label_column:
            raise
        texts, labels = [], []
    known = [
        (text, full_label(str(label))) for text, label in zip(texts, labels or [], strict=True) if label is not None
    ]
    target = [label == full_label(run.target_label) for _, label in known]
    if not 1 < sum(target) < len(target) - 1:
        print(f"note: {run.dataset} has no labels in column {cfg.label_column!r} to fit a second judge on; see --judge")
        return None
    judge = FittedJudge([text for text, _ in known], target)
    print(
        f"second judge: naive Bayes on the labels of {run.dataset}, right on {judge.accuracy:.0%} of pieces kept back"
    )
    return judge.score


def held_out_prompts(cfg: EvalConfig, run: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """n_samples prompts of the evaluation split, in a seeded random order, none of whose reviews was trained on.

    Each is followed by what its author wrote next, max_new_tokens at most.
    """
    longest = run.max_prompt_len + run.max_new_tokens
    texts, _ = load_examples(
        resolve_name(run.dataset, cfg.split), cfg.split, run.text_column, revision=run.dataset_revision
    )
    texts = list(dict.fromkeys(texts))
    if is_file(run.dataset) or cfg.split == run.split:
        print(f"note: if {run.dataset} was trained on, these prompts are not held out")
    else:
        name = resolve_name(run.dataset, run.split)
        seen = set(load_examples(name, run.split, run.text_column, revision=run.dataset_revision)[0])
        texts = [text for text in texts if text not in seen]
    order = np.random.default_rng(cfg.seed).permutation(len(texts))
    prompts: list[list[int]] = []
    for chunk in np.array_split(order, max(1, len(order) // (2 * cfg.n_samples))):  # no more is tokenised than needed
        with contextlib.suppress(UserError):  # none in this chunk
            prompts += load_prompts(tokenizer, [texts[i] for i in chunk], run.min_prompt_len, longest)
        if len(prompts) >= cfg.n_samples:
            break
    if not prompts:
        raise UserError(
            f"no review of split={cfg.split} of {run.dataset} has min_prompt_len={run.min_prompt_len} tokens and was "
            "not trained on: lower it, or change --dataset"
        )
    if len(prompts) < cfg.n_samples:
        print(f"note: only {len(prompts)} prompts are long enough; n_samples={cfg.n_samples} was asked for")
    return prompts[: cfg.n_samples]


def compare(
    answers: dict[str, Sequences], policy: GPT2WithValueHead, base: GPT2WithValueHead, reward: SentimentReward,
    tokenizer: PreTrainedTokenizerBase, with_prompt: bool,
) -> pd.DataFrame:  # fmt: skip
    """One row per prompt: both answers, scores, lengths, how likely base finds them, and KL(policy || base)."""
    ours = answers["policy"]
    logprobs, ref_logprobs, _, _, exact_kl = score_responses(policy, base, ours)
    columns: dict[str, Any] = {"prompt": ours.prompts(tokenizer)}
    for name, seqs in answers.items():
        log_odds = reward.log_odds(seqs.texts(tokenizer, with_prompt))
        columns[f"{name}_text"] = seqs.texts(tokenizer)
        columns[f"{name}_score"] = (log_odds / 2).tanh().tolist()
        columns[f"{name}_log_odds"] = log_odds.tolist()
        columns[f"{name}_len"] = seqs.response_mask.sum(1).tolist()
        last = seqs.response_mask.sum(1, keepdim=True) - 1
        ended = seqs.responses.gather(1, last).squeeze(1) == tokenizer.eos_token_id
        columns[f"{name}_eos"] = ended.int().tolist()
        columns[f"{name}_nll_base"] = (-_plain_logprobs(base, seqs).sum(1)).tolist()
    columns["kl_seq"] = (logprobs - ref_logprobs).sum(1).tolist()
    columns["kl_seq_exact"] = exact_kl.sum(1).tolist()
    columns["policy_tokens"] = [
        json.dumps([[tokenizer.decode([token]), round(kl, 3)] for token, kl in zip(row, kls, strict=False)])
        for row, kls in zip(_real(ours.responses, ours), _real(exact_kl, ours), strict=True)
    ]
    return pd.DataFrame(columns)


def _real(x: torch.Tensor, seqs: Sequences) -> list[list[Any]]:
    return [row[keep].tolist() for row, keep in zip(x.cpu(), seqs.response_mask.cpu(), strict=True)]


@torch.no_grad()
def _plain_logprobs(model: GPT2WithValueHead, seqs: Sequences) -> torch.Tensor:
    """Log-probabilities (B, R) under the model itself, whatever the decoding was."""
    return model.evaluate_responses(replace(seqs, temperature=1.0, support=None), with_entropy=False)[0]


def human_continuations(rows: list[list[int]], prompt_len: int, new_tokens: int, device: str) -> Sequences | None:
    """What the authors wrote, as if it had been sampled; None where all reviews end with the prompt."""
    ids, mask = (x.to(device) for x in pad_left([row[:prompt_len] for row in rows]))
    written = [row[prompt_len : prompt_len + new_tokens] for row in rows]
    if not any(written):
        return None
    backwards, real = (x.flip(1).to(device) for x in pad_left([row[::-1] for row in written]))
    return Sequences(
        torch.cat([ids, backwards], 1), torch.cat([mask, real], 1), real, torch.zeros(real.shape, device=device)
    )


def compare_on_human(
    human: Sequences | None, policy: GPT2WithValueHead, base: GPT2WithValueHead
) -> dict[str, list[float]]:
    """How surprised both models are, in nats, by what the authors wrote, and how long that is."""
    if human is None:
        return {}
    nll = {f"human_nll_{name}": (-_plain_logprobs(model, human).sum(1)).tolist()
           for name, model in (("policy", policy), ("base", base))}  # fmt: skip
    return {"human_len": human.response_mask.sum(1).tolist(), **nll}


# --- statistics -----------------------------------------------------------------------------------------------------

PERCENT, SIGNED, PLAIN, LONG = "{:.1f}", "{:+.3f}", "{:.2f}", "{:.3f}"
TABLE = {  # key in eval_summary.json -> its name in the table, and how it is written
    "sentiment_mean": ("sentiment mean, -1 to 1", SIGNED),
    "positive_rate": ("positive responses, %", PERCENT),
    "log_odds": ("log-odds of positive", PLAIN),
    "judge_mean": ("second judge, -1 to 1", SIGNED),
    "judge_positive_rate": ("second judge: positive, %", PERCENT),
    "perplexity": ("perplexity under base", PLAIN),
    "human_perplexity": ("perplexity on human text", PLAIN),
    "distinct_1": ("distinct words", LONG),
    "distinct_2": ("distinct pairs", LONG),
    "distinct_3": ("distinct triples", LONG),
    "distinct_rate": ("distinct responses, %", PERCENT),
    "repetition_rate": ("repeated triples, %", PERCENT),
    "response_len": ("response length, tokens", PLAIN),
    "eos_rate": ("responses that end themselves, %", PERCENT),
}
PAIRED = {
    "sentiment_gain": ("sentiment gained", SIGNED),
    "win_rate": ("win-rate, % (a tie is half)", PERCENT),
    "judge_gain": ("gained, says the second judge", SIGNED),
    "judge_gap_rate": ("gain in positives it does not see, %", PERCENT),
    "kl_seq": ("KL to base, nats per response", PLAIN),
    "kl_seq_exact": ("  the same, exact per token", PLAIN),
    "kl_token": ("KL to base, nats per token", LONG),
    "kl_token_exact": ("  the same, exact", LONG),
    "optimal_share_rate": ("% of the best gain at this KL", PERCENT),
}
INTERVALS = {"sentiment_mean": "sentiment_ci", "positive_rate": "positive_ci", "eos_rate": "eos_ci"}


def summarise(results: pd.DataFrame) -> dict[str, Any]:
    """Estimates with 95 % intervals, all of them from the results alone; rates are shares between 0 and 1."""
    column = {name: results[name].to_numpy(dtype=float) for name in results.select_dtypes("number")}
    summary: dict[str, Any] = {"n": len(results)}
    for name in ("policy", "base"):
        texts, length = results[f"{name}_text"].tolist(), column[f"{name}_len"]
        repeated, triples = np.array([repeated_trigrams(text) for text in texts], dtype=float).T
        summary[name] = {
            **_estimate("sentiment_mean", column[f"{name}_score"]),
            **_estimate("positive_rate", column[f"{name}_score"] > 0),
            **_estimate("log_odds", column[f"{name}_log_odds"]),
            **_estimate("response_len", length),
            **_estimate("eos_rate", column[f"{name}_eos"]),
            **_estimate("repetition_rate", repeated, triples),
            **_exponential("perplexity", column[f"{name}_nll_base"], length),
            **_of_all("distinct_rate", distinct_responses, texts),
        }
        for n in (1, 2, 3):
            summary[name] |= _of_all(f"distinct_{n}", lambda some, n=n: distinct(some, n), texts)  # type: ignore[misc]
        if "human_len" in column:
            written = np.nan_to_num(column["human_len"])
            summary[name] |= _exponential("human_perplexity", np.nan_to_num(column[f"human_nll_{name}"]), written)
        if f"{name}_judge" in column:
            summary[name] |= _estimate("judge_mean", column[f"{name}_judge"])
            summary[name] |= _estimate("judge_positive_rate", column[f"{name}_judge"] > 0)
    gain = column["policy_score"] - column["base_score"]
    summary |= _estimate("sentiment_gain", gain)
    summary |= _estimate("win_rate", (np.sign(gain) + 1) / 2)  # a tie is half a win
    for key in ("kl_seq", "kl_seq_exact"):
        summary |= _estimate(key, column[key])
        summary |= _estimate(key.replace("seq", "token"), column[key], column["policy_len"])
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


def _exponential(key: str, values: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    return {name: np.exp(value).tolist() for name, value in _estimate(key, values, weights).items()}


def _of_all(key: str, measure: Callable[[list[str]], float], texts: list[str]) -> dict[str, Any]:
    return {key: measure(texts), f"{key}_ci": jackknife_ci(measure, texts)}


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


def _frontier_summary(results: pd.DataFrame) -> dict[str, Any]:
    """Best-of-n, the optimal curve, and the policy's share of the gain that is possible at its KL."""
    scores = np.array([row.split() for row in results["base_draws"]], dtype=float)
    best = frontier(scores)
    ours, kl = results["policy_score"].to_numpy(), results["kl_seq_exact"].to_numpy()
    sizes = [2**k for k in range(scores.shape[1].bit_length())]
    found: dict[str, Any] = {
        "best_of_n": [
            {"n": n, "kl": best_of_n_kl(n), "sentiment_mean": float(best_of_n(scores, n).mean())} for n in sizes
        ],
        "optimal_curve": {"kl": best.kl.mean(0).tolist(), "sentiment_mean": best.reward.mean(0).tolist()},
        "kl_certain": float(best.kl.mean(0)[best.certain].max(initial=0.0)),
        "base_draws_mean": float(best.base.mean()),
    }  # fmt: skip

    def gains(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = times / times.sum(1, keepdims=True)
        base = weights @ best.base
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
        ends = max(summary["optimal_curve"]["kl"])  # beyond its end the curve is flat: the best response always
        certain = min(summary["kl_seq_exact"], ends) <= summary["kl_certain"]
        doubt = "" if certain else " (more draws would be needed to be certain)"
        words.append(f"It has {summary['optimal_share_rate']:.0%} of the gain shown possible at that KL{doubt}.")
    losses = [
        f"{what} ({form.format(ours[key])} against {form.format(base[key])})"
        for key, sign, what, form in (
            ("distinct_2", -1, "less varied", LONG), ("repetition_rate", 1, "more repetitive", "{:.1%}"),
            ("human_perplexity", 1, "more surprised by human text", PLAIN),
        )
        if key in ours and key in base and sign * (ours[key] - base[key]) > 0.1 * abs(base[key]) + 0.005
    ]  # fmt: skip
    if abs(ours["response_len"] - base["response_len"]) > 0.15 * base["response_len"]:
        longer = "longer" if ours["response_len"] > base["response_len"] else "shorter"
        losses.append(f"{longer} ({ours['response_len']:.0f} against {base['response_len']:.0f} tokens)")
    words.append(f"It is {', '.join(losses)}." if losses else "Variety, repetition and length are about as before.")
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


def beside(out_csv: Path, ending: str) -> Path:
    """Where a file that goes with the results lies: eval_summary.json and eval_report.html."""
    return out_csv.with_name(f"eval_{ending}")


def check_target(out_csv: Path) -> None:
    """Refuse a file that cannot be written, before the work (raises UserError)."""
    try:
        if (
            out_csv.is_dir()
            or not out_csv.name
            or out_csv in (beside(out_csv, "summary.json"), beside(out_csv, "report.html"))
        ):
            raise UserError(f"out_csv={out_csv} is not a name for a CSV file: choose another")
        out_csv.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out_csv.parent, os.W_OK):
            raise UserError(f"out_csv={out_csv} is in a folder that cannot be written: choose another file")
    except OSError as error:
        raise UserError(f"out_csv={out_csv} cannot be written ({error.strerror}): choose another file") from None


def write(results: pd.DataFrame, summary: dict[str, Any], out_csv: Path) -> None:
    """Write all three files, each whole or not at all (raises UserError where the folder cannot be written)."""
    try:
        write_whole(out_csv, results.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC))
        write_whole(beside(out_csv, "summary.json"), json.dumps(summary, indent=2) + "\n")
        home = run_folder(summary["settings"]["policy_path"])
        write_report(results, summary, table_rows(summary), home, beside(out_csv, "report.html"))
    except OSError as error:
        raise UserError(f"out_csv={out_csv} cannot be written ({error.strerror}): choose another file") from None


if __name__ == "__main__":
    run_cli(EvalConfig, main)
