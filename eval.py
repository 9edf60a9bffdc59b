"""Compare a tuned policy with base GPT-2 on held-out prompts: is it better, how surely, and at what cost?

    python eval.py                              ckpts/policy_lm against the base it was trained from
    python eval.py --policy_path DIR            another run, or any GPT-2 folder
    python eval.py --top_k 50 --top_p 0.9       both models under another decoding
    python eval.py --frontier 64                and how far that is from the best possible at its KL

Owns the comparison; its statistics and its table are in tools/summary.py. Both models answer the same prompts with the
same random numbers, so that differences are paired; every number follows from eval_results.csv alone.
"""

import contextlib
import csv
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from config import EvalConfig, TrainConfig, UserError, is_run, run_cli, saved_settings, with_changes  # isort: skip  (before torch: see there)

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import is_file, label_names, load_examples, load_prompts, pad_left
from model import GPT2WithValueHead, Sequences, check_fit, generate, load_reference, score_responses
from reward import SentimentReward, full_label
from tools.judge import FittedJudge
from tools.make_models import resolve_name
from tools.processes import first_then_others, gather_to_first, processes, together
from tools.report import write_report
from tools.summary import summarise, table, table_rows
from utils import (
    is_first,
    keep_freed_memory,
    load_tokenizer,
    quiet_libraries,
    rank,
    resolve_device,
    resolve_dtype,
    spreadsheet_safe,
    uniforms,
    world_size,
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
    with processes(cfg.device):
        with together():
            check_target(out_csv)
            run = settings_of_run(cfg)
        results = evaluate(cfg, run)
        if not is_first():
            return {}
        summary = summarise(results)
        settings = {**asdict(cfg), **{name: getattr(run, name) for name in sorted(OF_RUN)}}
        summary |= {"seed": cfg.seed, "settings": settings}
        write(results, summary, out_csv)
        print(table(summary))
        page = beside(out_csv, "report.html")
        print(f"\nwritten: {out_csv}, {beside(out_csv, 'summary.json')}, and to look at: {page}")
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
    return next((p for p in parents[:2] if is_run(p)), None)


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What an evaluation needs: models on their device, prompts with what their authors wrote next, perhaps a judge."""

    seed: int
    run: TrainConfig
    policy: GPT2WithValueHead
    base: GPT2WithValueHead
    reward: SentimentReward
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    judge: Judge | None

    def answer(self, model: GPT2WithValueHead, rows: slice, draw: int) -> Sequences:
        """Let a model answer some of the prompts; the random numbers of a prompt depend on seed and draw alone."""
        run, device = self.run, self.run.device
        ids, mask = (x.to(device) for x in pad_left([ids[: run.max_prompt_len] for ids in self.prompts[rows]]))
        noise = uniforms(self.seed, draw, len(self.prompts), run.max_new_tokens)[rows].to(device)
        return generate(
            model, ids, mask, noise, eos_id=int(self.tokenizer.eos_token_id),
            temperature=run.temperature, top_k=run.top_k, top_p=run.top_p,
        )  # fmt: skip


def load_parts(cfg: EvalConfig, run: TrainConfig) -> Parts:
    """Load it all (raises UserError)."""
    dtype = getattr(torch, run.dtype)
    policy_name, ref_name = resolve_name(cfg.policy_path), resolve_name(str(run.ref_name))
    tokenizer = load_tokenizer("policy_path", policy_name)
    policy = GPT2WithValueHead.from_pretrained(policy_name, "policy_path", dtype).to(run.device)
    base = load_reference(ref_name, dtype=dtype, revision=run.ref_revision).to(run.device)
    check_fit(policy, base, tokenizer, run.max_prompt_len + run.max_new_tokens)
    reward = SentimentReward(
        resolve_name(run.rm_name), run.target_label, run.device, dtype=dtype, revision=run.rm_revision
    )
    if run.reward_on_prompt:
        reward.tokenizer.truncation_side = "left"
    judge = second_judge(cfg, run) if is_first() else None
    return Parts(cfg.seed, run, policy, base, reward, tokenizer, held_out_prompts(cfg, run, tokenizer), judge)


def evaluate(cfg: EvalConfig, run: TrainConfig | None = None) -> pd.DataFrame:
    """Let policy and base answer held-out prompts; one row per prompt with texts, scores, lengths, KL and so on.

    Where there are several processes each takes some batches, and only the first has the rows.
    """
    settings = run or settings_of_run(cfg)
    with together("batch_size or max_new_tokens"):
        parts = first_then_others(lambda: load_parts(cfg, settings))
    keep_freed_memory()
    batches = [slice(first, first + cfg.batch_size) for first in range(0, len(parts.prompts), cfg.batch_size)]
    own = batches[rank() :: world_size()]
    with together("batch_size or max_new_tokens"):
        with tqdm(own, "evaluating", unit="batch", dynamic_ncols=True) as bar:  # whose line an error must not share
            tables = [compare(parts, rows) for rows in bar]
        if cfg.frontier:
            with tqdm(own, "frontier", unit="batch", dynamic_ncols=True) as bar:
                for table, rows in zip(tables, bar, strict=True):
                    table["base_draws"] = base_draws(parts, rows, cfg.frontier)
    tables = gather_to_first(tables)
    if not is_first():
        return pd.DataFrame()
    results = pd.concat(tables).sort_index()
    for names, culprit in (
        (["kl_seq", "policy_nll_base", "base_nll_base"], f"policy_path={cfg.policy_path}"),
        (["policy_log_odds", "base_log_odds"], f"rm_name={settings.rm_name}"),
    ):
        if not np.isfinite(results[names].to_numpy()).all():
            raise UserError(f"{culprit} computes numbers that are not finite: try --dtype float32")
    for name in ("prompt", "policy_text", "base_text"):
        results[name] = results[name].map(spreadsheet_safe)
    if parts.judge is not None:
        for name in ("policy", "base"):
            results[f"{name}_judge"] = parts.judge(results[f"{name}_text"].tolist())
    return results


def base_draws(parts: Parts, rows: slice, draws: int) -> list[str]:
    """The scores of several answers of the base to each of some prompts, as text."""
    texts = (parts.answer(parts.base, rows, 1 + draw).texts(parts.tokenizer, parts.run.reward_on_prompt)
             for draw in range(draws))  # fmt: skip
    scores = torch.stack([parts.reward(some).cpu() for some in texts], 1)
    return [" ".join(f"{x:.4f}" for x in row) for row in scores.tolist()]


def second_judge(cfg: EvalConfig, run: TrainConfig) -> Judge | None:
    """The judge that training never saw: fitted on the data set's labels, or a classifier; None where neither."""
    if cfg.judge == "none":
        return None
    if cfg.judge != "labels":
        model = SentimentReward(
            resolve_name(cfg.judge), run.target_label, run.device, dtype=getattr(torch, run.dtype), setting="judge"
        )
        return lambda texts: model(texts).cpu().numpy()
    try:
        name = resolve_name(run.dataset, run.split)
        texts, labels = load_examples(name, run.split, run.text_column, cfg.label_column, run.dataset_revision)
    except UserError:
        if cfg.label_column != EvalConfig.label_column:
            raise
        texts, labels = [], []
    names = label_names(labels or [])
    known = [(text, full_label(name)) for text, name in zip(texts, names, strict=True) if name is not None]
    target = [label == full_label(run.target_label) for _, label in known]
    if not 1 < sum(target) < len(target) - 1:
        there = ", ".join(sorted({label for _, label in known})[:5]) or "none"
        print(
            f"note: column {cfg.label_column!r} of {run.dataset} does not tell what is {run.target_label} from what is "
            f"not (its labels: {there}), so there is no second judge; see --judge"
        )
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
    if len(prompts) < 2:
        raise UserError(
            f"fewer than 2 reviews of split={cfg.split} of {run.dataset} have min_prompt_len={run.min_prompt_len} "
            "tokens and were not trained on: lower it, or change --dataset"
        )
    if len(prompts) < cfg.n_samples:
        print(f"note: only {len(prompts)} prompts are long enough; n_samples={cfg.n_samples} was asked for")
    return prompts[: cfg.n_samples]


def compare(parts: Parts, rows: slice) -> pd.DataFrame:
    """One row per prompt: both answers, scores, lengths, how likely base finds them, and KL(policy || base)."""
    policy, base, tokenizer = parts.policy, parts.base, parts.tokenizer
    ours = parts.answer(policy, rows, 0)
    logprobs, ref_logprobs, _, _, exact_kl = score_responses(policy, base, ours)
    columns: dict[str, Any] = {"prompt": ours.prompts(tokenizer)}
    for name, seqs in {"policy": ours, "base": parts.answer(base, rows, 0)}.items():
        log_odds = parts.reward.log_odds(seqs.texts(tokenizer, parts.run.reward_on_prompt))
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
    human = human_continuations(
        parts.prompts[rows], parts.run.max_prompt_len, parts.run.max_new_tokens, parts.run.device
    )
    return pd.DataFrame(columns | compare_on_human(human, policy, base), index=np.arange(len(parts.prompts))[rows])


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


# --- what is written ------------------------------------------------------------------------------------------------


def beside(out_csv: Path, ending: str) -> Path:
    """Where a file that goes with the results lies: eval_summary.json and eval_report.html with eval_results.csv."""
    return out_csv.with_name(f"{out_csv.stem.removesuffix('_results')}_{ending}")


def check_target(out_csv: Path) -> None:
    """Refuse a file that cannot be written, before the work (raises UserError)."""
    try:
        if out_csv.is_dir() or not out_csv.name:
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
