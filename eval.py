"""Compare a tuned policy with base GPT-2 on held-out prompts: sentiment, % positive, win-rate, KL, each with its error.

    python eval.py                              ckpts/policy_lm against the base it was trained from
    python eval.py --policy_path DIR            another run, or any GPT-2 folder

Owns the comparison, its statistics and its report. Both models answer the same prompts with the same random numbers,
so that differences are paired.
"""

import contextlib
import csv
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from config import EvalConfig, TrainConfig, UserError, run_cli, with_changes  # isort: skip  (before torch: see there)

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import is_file, load_examples, load_prompts, pad_left
from model import GPT2WithValueHead, Sequences, check_fit, generate, load_reference, score_responses
from reward import SentimentReward
from tools.make_models import resolve_name
from utils import (
    keep_freed_memory,
    load_tokenizer,
    quiet_libraries,
    resolve_device,
    resolve_dtype,
    uniforms,
    write_whole,
)  # fmt: skip

RESAMPLES = 2000  # of the prompts, for each interval
OF_RUN = {  # settings that eval.py takes from the run that made the policy, unless a flag says otherwise
    "ref_name", "rm_name", "target_label", "reward_on_prompt", "dataset", "text_column", "max_prompt_len",
    "min_prompt_len", "max_new_tokens", "temperature", "top_k", "top_p",
}  # fmt: skip
TABLE = {  # key in eval_summary.json -> its name in the table
    "sentiment_mean": "sentiment mean",
    "positive_rate": "positive responses",
    "response_len": "response length, tokens",
    "eos_rate": "responses that end themselves",
}
PAIRED = {
    "sentiment_gain": "sentiment gained",
    "win_rate": "win-rate (a tie is half)",
    "kl_seq": "KL to base, nats per response",
    "kl_seq_exact": "  the same, exact per token",
}


def main(cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate, print the table, write eval_results.csv and eval_summary.json; returns the summary."""
    quiet_libraries()
    keep_freed_memory()
    check_target(Path(cfg.out_csv))
    results = evaluate(cfg)
    summary = summarise(results, cfg)
    write(results, summary, Path(cfg.out_csv))
    print(table(summary))
    print(f"\nwritten: {cfg.out_csv} (every prompt and answer) and {summary_path(Path(cfg.out_csv))}")
    return summary


def settings_of_run(cfg: EvalConfig) -> TrainConfig:
    """The settings of the run that made the policy, else train.py's defaults, where no flag overrides them."""
    folder = Path(cfg.policy_path)
    if cfg.policy_path == EvalConfig.policy_path and not folder.exists():
        raise UserError(f"policy_path={cfg.policy_path} does not exist yet: run python train.py, or name a policy")
    path = folder.parent / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        of_run = "total_steps" in found  # and not the config.json of a model, say
        run = TrainConfig(**{f.name: found[f.name] for f in fields(TrainConfig) if of_run and f.name in found})
    except (ValueError, TypeError, OSError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}): mend it, or move the policy to a folder without it") from None
    flags = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in OF_RUN and getattr(cfg, f.name) is not None}
    device = resolve_device(cfg.device)
    return with_changes(
        run, **{"ref_name": run.policy_name if run.ref_name is None else run.ref_name, **flags},
        device=device, dtype=resolve_dtype(cfg.dtype, device),
    )  # fmt: skip


# --- the comparison -------------------------------------------------------------------------------------------------


def evaluate(cfg: EvalConfig) -> pd.DataFrame:
    """Let policy and base answer held-out prompts; one row per prompt with texts, scores, lengths and KL."""
    run = settings_of_run(cfg)
    dtype = getattr(torch, run.dtype)
    policy_name, ref_name = resolve_name(cfg.policy_path), resolve_name(str(run.ref_name))
    tokenizer = load_tokenizer("policy_path", policy_name)
    policy = GPT2WithValueHead.from_pretrained(policy_name, "policy_path", dtype).to(run.device)
    base = load_reference(ref_name, dtype=dtype).to(run.device)
    check_fit(policy, base, tokenizer, run.max_prompt_len + run.max_new_tokens)
    reward = SentimentReward(resolve_name(run.rm_name), run.target_label, run.device, dtype=dtype)
    prompts = held_out_prompts(cfg, run, tokenizer)
    noise = uniforms(cfg.seed, 0, len(prompts), run.max_new_tokens).to(run.device)

    parts = []
    for first in tqdm(range(0, len(prompts), cfg.batch_size), "evaluating", unit="batch", dynamic_ncols=True):
        rows = slice(first, first + cfg.batch_size)
        ids, mask = (x.to(run.device) for x in pad_left(prompts[rows]))
        answers = {
            name: generate(
                model, ids, mask, noise[rows], eos_id=int(tokenizer.eos_token_id),
                temperature=run.temperature, top_k=run.top_k, top_p=run.top_p,
            )
            for name, model in (("policy", policy), ("base", base))
        }  # fmt: skip
        parts.append(compare(answers, policy, base, reward, tokenizer, run.reward_on_prompt))
    return pd.concat(parts, ignore_index=True)


def held_out_prompts(cfg: EvalConfig, run: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """n_samples prompts of the evaluation split, in a seeded random order, none of whose reviews was trained on."""
    texts, _ = load_examples(resolve_name(run.dataset, cfg.split), cfg.split, run.text_column)
    texts = list(dict.fromkeys(texts))
    if is_file(run.dataset) or cfg.split == run.split:
        print(f"note: if {run.dataset} was trained on, these prompts are not held out")
    else:
        seen = set(load_examples(resolve_name(run.dataset, run.split), run.split, run.text_column)[0])
        texts = [text for text in texts if text not in seen]
    order = np.random.default_rng(cfg.seed).permutation(len(texts))
    prompts: list[list[int]] = []
    for chunk in np.array_split(order, max(1, len(order) // (2 * cfg.n_samples))):  # no more is tokenised than needed
        with contextlib.suppress(UserError):  # none in this chunk
            prompts += load_prompts(tokenizer, [texts[i] for i in chunk], run.min_prompt_len, run.max_prompt_len)
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
    """One row per prompt: both answers, their scores and lengths, and KL(policy || base) on the policy's answer."""
    ours = answers["policy"]
    logprobs, ref_logprobs, _, _, exact_kl = score_responses(policy, base, ours)
    columns: dict[str, Any] = {"prompt": ours.prompts(tokenizer)}
    for name, seqs in answers.items():
        columns[f"{name}_text"] = seqs.texts(tokenizer)
        columns[f"{name}_score"] = reward(seqs.texts(tokenizer, with_prompt)).tolist()
        columns[f"{name}_len"] = seqs.response_mask.sum(1).tolist()
        last = seqs.response_mask.sum(1, keepdim=True) - 1
        ended = seqs.responses.gather(1, last).squeeze(1) == tokenizer.eos_token_id
        columns[f"{name}_eos"] = ended.int().tolist()
    columns["kl_seq"] = (logprobs - ref_logprobs).sum(1).tolist()
    columns["kl_seq_exact"] = exact_kl.sum(1).tolist()
    return pd.DataFrame(columns)


# --- statistics -----------------------------------------------------------------------------------------------------


def bootstrap_ci(values: np.ndarray, seed: int = 0, level: float = 0.95) -> list[float]:
    """Percentile bootstrap interval [low, high] of the mean of values (n,), resampling prompts (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return [float(x) for x in np.quantile(means, [(1 - level) / 2, (1 + level) / 2])]


def summarise(results: pd.DataFrame, cfg: EvalConfig) -> dict[str, Any]:
    """Means over prompts with 95 % intervals, all recomputable from the results alone."""
    summary: dict[str, Any] = {"n": len(results), "seed": cfg.seed}
    for name in ("policy", "base"):
        score = results[f"{name}_score"]
        summary[name] = {
            **_estimate("sentiment_mean", "sentiment_ci", score),
            **_estimate("positive_rate", "positive_ci", score > 0),
            **_estimate("response_len", "response_len_ci", results[f"{name}_len"]),
            **_estimate("eos_rate", "eos_ci", results[f"{name}_eos"]),
        }
    gain = results["policy_score"] - results["base_score"]
    summary |= _estimate("sentiment_gain", "sentiment_gain_ci", gain)
    summary |= _estimate("win_rate", "win_rate_ci", (np.sign(gain) + 1) / 2)  # a tie is half a win
    summary |= _estimate("kl_seq", "kl_seq_ci", results["kl_seq"])
    summary |= _estimate("kl_seq_exact", "kl_seq_exact_ci", results["kl_seq_exact"])
    summary["settings"] = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    return summary


def _estimate(name: str, ci_name: str, values: "pd.Series[Any]") -> dict[str, Any]:
    numbers = values.to_numpy(dtype=float)
    return {name: float(numbers.mean()), ci_name: bootstrap_ci(numbers)}


# --- the report -----------------------------------------------------------------------------------------------------


def table(summary: dict[str, Any]) -> str:
    """The summary as a table of fixed-width columns, policy beside base."""
    lines = [f"{summary['n']} prompts, 95 % intervals in brackets", "", f"{'':32}{'policy':>26}{'base':>26}"]
    intervals = {"sentiment_mean": "sentiment_ci", "positive_rate": "positive_ci", "eos_rate": "eos_ci"}
    for key, title in TABLE.items():
        shown = [_shown(key, summary[m][key], summary[m][intervals.get(key, f"{key}_ci")]) for m in ("policy", "base")]
        lines.append(f"{title:32}{shown[0]:>26}{shown[1]:>26}")
    for key, title in PAIRED.items():
        lines.append(f"{title:32}{_shown(key, summary[key], summary[f'{key}_ci']):>26}")
    return "\n".join(lines)


def _shown(key: str, value: float, ci: list[float]) -> str:
    scale, form = (100, "{:.1f}") if key.endswith("rate") else (1, "{:+.3f}" if "sentiment" in key else "{:.2f}")
    mean, low, high = (form.format(scale * x) for x in (value, *ci))
    return f"{mean}{' %' if scale == 100 else ''} [{low}, {high}]"


def summary_path(out_csv: Path) -> Path:
    """Where the summary goes: eval_summary.json beside the CSV file."""
    return out_csv.with_name("eval_summary.json")


def check_target(out_csv: Path) -> None:
    """Refuse a file that cannot be written, before the work (raises UserError)."""
    try:
        if out_csv.is_dir() or not out_csv.name or out_csv == summary_path(out_csv):
            raise UserError(f"out_csv={out_csv} is not a name for a CSV file: choose another")
        out_csv.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out_csv.parent, os.W_OK):
            raise UserError(f"out_csv={out_csv} is in a folder that cannot be written: choose another file")
    except OSError as error:
        raise UserError(f"out_csv={out_csv} cannot be written ({error.strerror}): choose another file") from None


def write(results: pd.DataFrame, summary: dict[str, Any], out_csv: Path) -> None:
    """Write both files whole or not at all (raises UserError where the folder cannot be written)."""
    try:
        write_whole(out_csv, results.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC))
        write_whole(summary_path(out_csv), json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"out_csv={out_csv} cannot be written ({error.strerror}): choose another file") from None


if __name__ == "__main__":
    run_cli(EvalConfig, main)
