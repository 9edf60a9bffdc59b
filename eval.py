"""Compare a tuned policy with base GPT-2 on held-out prompts: is it better, how surely, and at what cost?

    python eval.py                              ckpts/policy_lm against the base it was trained from
    python eval.py --policy_path DIR            another run, or any GPT-2 folder
    python eval.py --top_k 50 --top_p 0.9       both models under another decoding
    python eval.py --frontier 64                and how far that is from the best possible at its KL

This is the comparison; its statistics, table and report are in evaluation/. Both models answer the same prompts with
the same random numbers, so that differences are paired. Every number follows from eval_results.csv alone.
"""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from config import PRESETS, EvalConfig, TrainConfig, UserError, python_reward

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from data import cut, first_tokens, load_examples, load_labelled, pad_left
from evaluation.judge import FittedJudge
from evaluation.report import write_report
from evaluation.summary import summarise
from evaluation.table import table, table_rows
from model import GPT2WithValueHead, Sequences, evaluate_both
from ppo import Models
from pretrain.tiny_world import resolve_name
from reward import SentimentReward, full_label
from runtime import cli
from runtime.cli import parse_config
from runtime.device import keep_freed_memory, resolve_device, resolve_dtype
from runtime.distributed import (
    gather_to_main,
    is_main_process,
    main_process_first,
    process_group,
    raise_on_all_ranks,
    rank,
    world_size,
)
from runtime.files import spreadsheet_safe, write_atomic
from runtime.fingerprints import model_sha256, saved_weights_sha256, texts_sha256
from runtime.hub import quiet_libraries
from runtime.saved_run import SavedRun, policy_folder
from runtime.tables import has_splits, split_names
from runtime.terminal import progress_bar
from training.card import add_results
from training.parts import load_models
from training.run_folder import reward_sha256, saved_fingerprints
from utils import uniforms

RUN_SETTINGS = {  # taken from the run that made the policy, unless a flag says otherwise
    "ref_name",
    "rm_name",
    "target_label",
    "reward_on_prompt",
    "dataset",
    "dataset_config",
    "text_column",
    "max_prompt_len",
    "min_prompt_len",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
}
RESULTS = "eval_results.csv"


class Judge(NamedTuple):
    """A second judge: texts -> scores (n,), and a fingerprint of what it is made of."""

    score: Callable[[list[str]], np.ndarray]
    sha256: str


def main(cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate, print the table, write results, summary, report and model card; returns the summary."""
    quiet_libraries()
    cfg = replace(cfg, policy_path=policy_folder(cfg.policy_path))
    out_csv = results_path(cfg)
    with process_group(cfg.device):
        with raise_on_all_ranks():
            check_target(out_csv)
            earlier = earlier_summary(out_csv)
            check_earlier_results(cfg, out_csv, earlier)
            run_cfg = settings_of_run(cfg)
            cfg = replace(cfg, split=evaluation_split(cfg, run_cfg))
        results, label = evaluate(cfg, run_cfg)
        if not is_main_process():
            return {}
        settings = {**asdict(cfg), **{name: getattr(run_cfg, name) for name in sorted(RUN_SETTINGS)}}
        summary = summarise(results, label, run_cfg.target_label) | {"seed": cfg.seed, "settings": settings}
        summary["policy_sha256"] = saved_weights_sha256(Path(cfg.policy_path))
        summary["judge_sha256"] = results.attrs.get("judge_sha256")
        if earlier.get("judge_sha256") and summary["judge_sha256"] not in (None, earlier["judge_sha256"]):
            print("note: the second judge, or what it was fitted on, is not that of the results which are replaced")
        write(results, summary, out_csv)
        print(table(summary))
        page = beside(out_csv, "report.html")
        print(f"\nwritten: {out_csv}, {beside(out_csv, 'summary.json')}, and to look at: {page}")
        home, policy = find_run(cfg.policy_path), Path(cfg.policy_path)
        if home is not None and policy.is_dir():
            add_results(home, policy, summary, table_rows(summary))
        return summary


def settings_of_run(cfg: EvalConfig, with_reward: bool = True) -> TrainConfig:
    """The settings of the run that made the policy, or train.py's defaults, with the flags given in their place.

    Raises UserError, also where the run names Python code as its reward and no flag does, unless no reward is needed.
    """
    folder = Path(cfg.policy_path)
    if cfg.policy_path == EvalConfig.policy_path and not folder.exists():
        raise UserError(f"policy_path={cfg.policy_path} does not exist yet: run python train.py, or name a policy")
    home = find_run(cfg.policy_path)
    try:
        run = TrainConfig(**SavedRun(home).settings) if home else PRESETS[TrainConfig][cfg.preset]
    except UserError as error:
        raise UserError(f"{home}/config.json is damaged ({error}): fix it, or move the policy elsewhere") from None
    if home is None and not cfg.policy_path.startswith("tiny:"):
        defaults = "train.py's defaults" if cfg.preset == "default" else f"the settings of --preset {cfg.preset}"
        print(f"note: {cfg.policy_path} is not part of a run, so {defaults} apply where no flag is given")
    if with_reward and home and python_reward(run.rm_name) and cfg.rm_name is None:
        raise UserError(SavedRun(home).refuse_code())
    flags = {
        f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in RUN_SETTINGS and getattr(cfg, f.name) is not None
    }
    for name, revision in (("rm_name", "rm_revision"), ("dataset", "dataset_revision"), ("dataset", "dataset_config")):
        if name in flags and flags[name] != getattr(run, name):
            flags.setdefault(revision, None)  # it is that of another
    device = resolve_device(cfg.device)
    return replace(
        run,
        **{"ref_name": run.policy_name if run.ref_name is None else run.ref_name, **flags},
        device=device,
        dtype=resolve_dtype(cfg.dtype, device),
    )


def find_run(policy_path: str) -> Path | None:
    """The folder of the run that made a policy, be it policy_lm or best/policy_lm; None if it is in no run."""
    parents = Path(policy_folder(policy_path)).absolute().parents
    home = next((p for p in parents[:2] if SavedRun(p).exists), None)
    return home.relative_to(Path.cwd()) if home is not None and home.is_relative_to(Path.cwd()) else home


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What an evaluation needs: the models on their device, and prompts followed by what their authors wrote."""

    seed: int
    run: TrainConfig
    models: Models
    prompts: list[list[int]]

    def respond(self, model: GPT2WithValueHead, rows: slice, draw: int) -> Sequences:
        """Sample responses to some of the prompts; a prompt's random numbers depend on seed and draw alone."""
        prompts = pad_left([self.prompt(ids) for ids in self.prompts[rows]])
        noise = uniforms(self.seed, draw, len(self.prompts), self.run.max_new_tokens)[rows]
        return self.models.respond(model, prompts, noise, self.run)

    def prompt(self, ids: list[int]) -> list[int]:
        """The part of a review that is the prompt."""
        return cut(self.models.tokenizer, ids, self.run.max_prompt_len)

    def base_scores(self, rows: slice, draws: int) -> list[str]:
        """The scores of several base responses to each of some prompts, as text."""
        models = self.models
        scores = torch.stack(
            [models.score(self.respond(models.reference, rows, 1 + draw), self.run).cpu() for draw in range(draws)], 1
        )
        form = ".4f" if models.reward.label is not None else ".6g"
        return [" ".join(f"{x:{form}}" for x in row) for row in scores.tolist()]


def evaluate(cfg: EvalConfig, run_cfg: TrainConfig | None = None) -> tuple[pd.DataFrame, str | None]:
    """Let policy and base answer held-out prompts; one row per prompt with texts, scores, lengths, KL and so on.

    Also returns the label whose probability the scores are, None where they are any numbers. Each rank takes some of
    the batches; only the main process returns rows.
    """
    settings = run_cfg or settings_of_run(cfg)
    to_lower = "batch_size or max_new_tokens"
    with raise_on_all_ranks(to_lower):
        models = main_process_first(lambda: load_models(settings, cfg.policy_path))
        note_changed_inputs(models, settings, find_run(cfg.policy_path))
        comparison = Comparison(cfg.seed, settings, models, held_out_prompts(cfg, settings, models.tokenizer))
        judge = second_judge(cfg, settings) if is_main_process() else None
    keep_freed_memory()
    batches = [slice(first, first + cfg.batch_size) for first in range(0, len(comparison.prompts), cfg.batch_size)]
    own = batches[rank() :: world_size()]
    with raise_on_all_ranks(to_lower):
        with progress_bar(own, "evaluating", "batch") as bar:  # closed before an error is printed
            tables = [compare(comparison, rows) for rows in bar]
        if cfg.frontier:
            with progress_bar(own, "frontier", "batch") as bar:
                for rows_table, rows in zip(tables, bar, strict=True):
                    rows_table["base_draws"] = comparison.base_scores(rows, cfg.frontier)
    tables = gather_to_main(tables)
    label = models.reward.label
    if not is_main_process():
        return pd.DataFrame(), label
    results = pd.concat(tables).sort_index()
    for names, culprit in (
        (["kl_seq", "policy_nll_base", "base_nll_base"], f"policy_path={cfg.policy_path}"),
        (
            [f"{name}_{'score' if label is None else 'log_odds'}" for name in ("policy", "base")],
            f"rm_name={settings.rm_name}",
        ),
    ):
        if not np.isfinite(results[names].to_numpy()).all():
            raise UserError(f"{culprit} computes numbers that are not finite: try --dtype float32")
    for name in ("prompt", "policy_text", "base_text"):
        results[name] = results[name].map(spreadsheet_safe)
    add_judge(results, judge)
    return results, label


def add_judge(results: pd.DataFrame, judge: Judge | None) -> None:
    """Add the second judge's scores of both models' responses, if there is a judge."""
    if judge is not None:
        for name in ("policy", "base"):
            results[f"{name}_judge"] = judge.score(results[f"{name}_text"].tolist())
        results.attrs["judge_sha256"] = judge.sha256


def note_changed_inputs(models: Models, run: TrainConfig, home: Path | None) -> None:
    """Say so where reward or base are not those of the run that made the policy."""
    if home is None:
        return
    saved = json.loads((home / "config.json").read_text(encoding="utf-8"))
    before = saved_fingerprints(saved)
    now = {"rm_name": reward_sha256(models.reward), "ref_name": model_sha256(models.reference.lm)}
    for name, what in (("rm_name", "reward"), ("ref_name", "base")):
        changed = before[name] != now[name] if before.get(name) else saved[name] not in (None, getattr(run, name))
        if changed:
            value = getattr(run, name)
            print(f"note: {value} is not the {what}, or not the version of it, that this policy was trained with")


def second_judge(cfg: EvalConfig, run: TrainConfig) -> Judge | None:
    """A judge that training never saw: fitted on the data set's labels, or a classifier; None without either."""
    if cfg.judge == "none":
        return None
    if cfg.judge != "labels":
        model = SentimentReward(
            resolve_name(cfg.judge),
            run.target_label,
            device=run.device,
            dtype=getattr(torch, run.dtype),
            setting="judge",
        )
        return Judge(lambda texts: model(texts).cpu().numpy(), reward_sha256(model))
    try:
        name = resolve_name(run.dataset, run.split)
        texts, names = load_labelled(
            name,
            run.split,
            run.text_column,
            cfg.label_column,
            cfg.label_names,
            run.dataset_revision,
            run.dataset_config,
        )
    except UserError as error:
        if cfg.label_column != EvalConfig.label_column or cfg.label_names is not None:
            raise
        print(f"note: there is no second judge (see --judge): {error}")
        return None
    known = [(text, full_label(name)) for text, name in zip(texts, names, strict=True) if name is not None]
    target = [label == full_label(run.target_label) for _, label in known]
    if not 1 < sum(target) < len(target) - 1:
        there = ", ".join(sorted({label for _, label in known})[:5]) or "none"
        print(
            f"note: column {cfg.label_column!r} of {run.dataset} does not separate {run.target_label} from other texts "
            f"(its labels: {there}), so there is no second judge; see --label_column, --label_names and --judge"
        )
        return None
    judge = FittedJudge([text for text, _ in known], target)
    print(f"second judge: naive Bayes on the labels of {run.dataset}, right on {judge.accuracy:.0%} of held-out pieces")
    return Judge(judge.score, texts_sha256([f"{label} {text}" for text, label in known]))


def evaluation_split(cfg: EvalConfig, run: TrainConfig) -> str:
    """The split that prompts are taken from: the one named, else test, else one that there is."""
    if cfg.split is not None or run.dataset.startswith("tiny:"):
        return cfg.split or "test"
    names = split_names(run.dataset, run.dataset_revision, run.dataset_config)
    if not names or "test" in names:
        return "test"
    split = "validation" if "validation" in names else run.split
    print(f"note: {run.dataset} has no split test, so prompts are taken from its split {split}")
    return split


def note_changed_texts(texts: Sequence[str], run: TrainConfig, home: Path | None) -> None:
    """Say so where the texts of the run's data set are not those that the policy was trained on."""
    saved = json.loads((home / "config.json").read_text(encoding="utf-8")) if home else {}
    before = saved_fingerprints(saved).get("dataset")
    same_setting = before and (saved["dataset"], saved["text_column"]) == (run.dataset, run.text_column)
    if same_setting and before != texts_sha256(texts):
        print(
            f"note: {run.dataset} has changed since this policy was trained on it: prompts may not be held out, and "
            "the labels of the second judge may be others"
        )


def held_out_prompts(cfg: EvalConfig, run: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """n_samples prompts of the evaluation split in a seeded random order, from reviews that were not trained on.

    Each is followed by what its author wrote next, up to max_new_tokens.
    """
    longest = run.max_prompt_len + run.max_new_tokens
    split = evaluation_split(cfg, run)
    read = partial(load_examples, text_column=run.text_column, revision=run.dataset_revision, config=run.dataset_config)
    texts = read(resolve_name(run.dataset, split), split)[0]
    trained_on = texts
    if not has_splits(run.dataset) or split == run.split:
        print(f"note: if {run.dataset} was trained on, these prompts are not held out")
    else:
        trained_on = read(resolve_name(run.dataset, run.split), run.split)[0]
        seen = set(trained_on)
        texts = [text for text in texts if text not in seen]
    note_changed_texts(trained_on, run, find_run(cfg.policy_path))
    texts = list(dict.fromkeys(texts))
    order = np.random.default_rng(cfg.seed).permutation(len(texts))
    prompts: list[list[int]] = []
    for chunk in np.array_split(order, max(1, len(order) // (2 * cfg.n_samples))):  # tokenise no more than needed
        with contextlib.suppress(UserError):  # none in this chunk
            reviews = first_tokens(tokenizer, [texts[i] for i in chunk], run.min_prompt_len, longest)
            prompts += [ids for ids in reviews if cut(tokenizer, ids, run.max_prompt_len)]
        if len(prompts) >= cfg.n_samples:
            break
    if len(prompts) < 2:
        raise UserError(
            f"fewer than 2 reviews of split={split} of {run.dataset} have min_prompt_len={run.min_prompt_len} "
            "tokens and were not trained on: lower it, or change --split or --dataset"
        )
    if len(prompts) < cfg.n_samples:
        print(f"note: only {len(prompts)} prompts are long enough; n_samples={cfg.n_samples} was asked for")
    return prompts[: cfg.n_samples]


def compare(comparison: Comparison, rows: slice, known: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per prompt: both responses, scores, lengths, base's log-likelihood of them, and KL(policy || base).

    known is the same comparison with another policy, if there is one: base answers alike, and need not do so again.
    """
    models, run_cfg = comparison.models, comparison.run
    policy, base, tokenizer = models.policy, models.reference, models.tokenizer
    ours = comparison.respond(policy, rows, 0)
    logprobs, ref_logprobs, _, _, exact_kl = evaluate_both(policy, base, ours)
    columns: dict[str, Any] = {"prompt": ours.prompt_texts(tokenizer)}
    columns |= answer_columns(comparison, "policy", ours)
    if known is None:
        columns |= answer_columns(comparison, "base", comparison.respond(base, rows, 0))
    else:
        columns |= known.filter(regex="^base_").to_dict("list")
    columns["kl_seq"] = (logprobs - ref_logprobs).sum(1).tolist()
    columns["kl_seq_exact"] = exact_kl.sum(1).tolist()
    columns["policy_tokens"] = [
        json.dumps([[tokenizer.decode([token]), round(kl, 3)] for token, kl in zip(row, kls, strict=False)])
        for row, kls in zip(_real(ours.responses, ours), _real(exact_kl, ours), strict=True)
    ]
    reviews = comparison.prompts[rows]
    prompts = [comparison.prompt(ids) for ids in reviews]
    human = human_continuations(reviews, prompts, run_cfg.max_new_tokens, run_cfg.device)
    index = np.arange(len(comparison.prompts))[rows]
    return pd.DataFrame(columns | compare_on_human(human, policy, base), index=index)


def answer_columns(comparison: Comparison, name: str, seqs: Sequences) -> dict[str, list[Any]]:
    """A model's responses with their scores, lengths, whether they ended, and base's log-likelihood of them."""
    models, lengths = comparison.models, seqs.response_mask.sum(1)
    ended = seqs.responses.gather(1, lengths[:, None] - 1).squeeze(1) == models.tokenizer.eos_token_id
    return {
        f"{name}_text": seqs.texts(models.tokenizer),
        **score_columns(comparison, name, seqs),
        f"{name}_len": lengths.tolist(),
        f"{name}_eos": ended.int().tolist(),
        f"{name}_nll_base": (-_plain_logprobs(models.reference, seqs).sum(1)).tolist(),
    }


def score_columns(comparison: Comparison, name: str, seqs: Sequences) -> dict[str, list[float]]:
    """The scores of a model's responses and, where they are those of a label, its log-odds."""
    models, run_cfg = comparison.models, comparison.run
    if not isinstance(models.reward, SentimentReward):
        return {f"{name}_score": models.score(seqs, run_cfg).tolist()}
    log_odds = models.reward.log_odds(seqs.texts(models.tokenizer, run_cfg.reward_on_prompt))
    return {f"{name}_score": (log_odds / 2).tanh().tolist(), f"{name}_log_odds": log_odds.tolist()}


def _real(x: torch.Tensor, seqs: Sequences) -> list[list[Any]]:
    return [row[keep].tolist() for row, keep in zip(x.cpu(), seqs.response_mask.cpu(), strict=True)]


@torch.no_grad()
def _plain_logprobs(model: GPT2WithValueHead, seqs: Sequences) -> torch.Tensor:
    """Log-probabilities (B, R) under the model itself, without temperature, top-k and top-p."""
    return model.evaluate_responses(replace(seqs, temperature=1.0, support=None), with_entropy=False)[0]


def human_continuations(
    reviews: list[list[int]], prompts: list[list[int]], new_tokens: int, device: str
) -> Sequences | None:
    """What the authors wrote, in the form of sampled responses; None where all reviews end with the prompt."""
    ids, mask = (x.to(device) for x in pad_left(prompts))
    written = [review[len(prompt) : len(prompt) + new_tokens] for review, prompt in zip(reviews, prompts, strict=True)]
    if not any(written):
        return None
    backwards, real = (x.flip(1).to(device) for x in pad_left([row[::-1] for row in written]))
    return Sequences(
        torch.cat([ids, backwards], 1), torch.cat([mask, real], 1), real, torch.zeros(real.shape, device=device)
    )


def compare_on_human(
    human: Sequences | None, policy: GPT2WithValueHead, base: GPT2WithValueHead
) -> dict[str, list[float]]:
    """Negative log-likelihood of what the authors wrote under both models, in nats, and its length in tokens."""
    if human is None:
        return {}
    nll = {
        f"human_nll_{name}": (-_plain_logprobs(model, human).sum(1)).tolist()
        for name, model in (("policy", policy), ("base", base))
    }
    return {"human_len": human.response_mask.sum(1).tolist(), **nll}


# --- what is written ------------------------------------------------------------------------------------------------


def beside(out_csv: Path, ending: str) -> Path:
    """The path of a file that belongs to the results: eval_summary.json and eval_report.html for eval_results.csv."""
    return out_csv.with_name(f"{out_csv.stem.removesuffix('_results')}_{ending}")


def results_path(cfg: EvalConfig) -> Path:
    """Where the results go: to out_csv, else into the run folder of the policy, else here.

    A run's best/ is another policy than its policy_lm: it has best_eval_results.csv.
    """
    if cfg.out_csv is not None:
        return Path(cfg.out_csv)
    home = find_run(cfg.policy_path)
    if home is None:
        return Path(RESULTS)
    place = Path(cfg.policy_path).absolute().parent
    return home / (RESULTS if place == home.absolute() else f"{place.name}_{RESULTS}")


def earlier_summary(out_csv: Path) -> dict[str, Any]:
    """The summary of the evaluation that is to be replaced; empty where there is none."""
    try:
        summary = json.loads(beside(out_csv, "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) and isinstance(summary.get("settings"), dict) else {}


def check_earlier_results(cfg: EvalConfig, out_csv: Path, earlier: dict[str, Any]) -> None:
    """Say what is replaced; refuse to replace another policy's results unless out_csv asks for it (UserError)."""
    if not out_csv.exists():
        return
    policy = earlier.get("settings", {}).get("policy_path", "an unknown policy")
    if cfg.out_csv is None and find_run(cfg.policy_path) is None and policy != cfg.policy_path:
        raise UserError(f"{out_csv} has the results of {policy}: name another file with --out_csv, or remove it")
    print(f"note: the results of {policy} in {out_csv} will be replaced")


def check_target(out_csv: Path) -> None:
    """Refuse a file that cannot be written, before any work (raises UserError)."""
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
        write_atomic(out_csv, results.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"))
        write_atomic(beside(out_csv, "summary.json"), json.dumps(summary, indent=2) + "\n")
        home = find_run(summary["settings"]["policy_path"])
        write_report(results, summary, table_rows(summary), home, beside(out_csv, "report.html"))
    except OSError as error:
        raise UserError(f"out_csv={out_csv} cannot be written ({error.strerror}): choose another file") from None


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(parse_config(EvalConfig))))
