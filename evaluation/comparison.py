"""The paired comparison: policy and base respond to the same prompts with the same random numbers; a row per prompt."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from config import EvalConfig, TrainConfig, UserError

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data import PromptBatch, pad_left
from evaluation.judge import Judge, second_judge
from evaluation.prompts import Review, held_out_reviews
from evaluation.summary import summarise
from model import GPT2WithValueHead, Sequences, evaluate_both
from ppo import Models
from reward import PART, SentimentReward
from runtime.distributed import gather_to_main, is_main_process, raise_on_all_ranks, rank, world_size
from runtime.files import spreadsheet_safe
from runtime.fingerprints import model_sha256
from runtime.saved_run import SavedRun
from runtime.tables import Columns as Cells
from runtime.terminal import progress_bar
from training.run_record import reward_sha256
from utils import uniforms

TO_LOWER = "batch_size or max_new_tokens"  # where memory does not suffice
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Comparison:
    """What an evaluation needs: settings, the models on their device, held-out reviews, and the second judge, if any.

    base_columns keeps what does not depend on the policy, by batch: another policy is compared with the same responses.
    """

    cfg: EvalConfig
    run: TrainConfig
    models: Models
    reviews: list[Review]
    judge: Judge | None
    base_columns: dict[int, Columns] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: EvalConfig, run: TrainConfig, models: Models) -> "Comparison":
        """Read the reviews, and fit or load the judge, which the main process alone needs."""
        reviews = held_out_reviews(cfg, run, models.tokenizer, models.reward)
        return cls(cfg, run, models, reviews, second_judge(cfg, run) if is_main_process() else None)

    @property
    def batches(self) -> list[slice]:
        """The rows of each batch."""
        size = self.cfg.batch_size
        return [slice(first, first + size) for first in range(0, len(self.reviews), size)]

    def respond(self, model: GPT2WithValueHead, rows: slice, draw: int = 0) -> Sequences:
        """Sample responses to some of the prompts; a prompt's random numbers depend on seed and draw alone."""
        prompts = PromptBatch(*pad_left([review.prompt for review in self.reviews[rows]]))
        noise = uniforms(self.cfg.seed, draw, len(self.reviews), self.run.max_new_tokens)[rows]
        return self.models.respond(model, prompts, noise, self.run)

    def cells(self, rows: slice) -> Cells:
        """The columns of the data set that the reward is given, for some of the prompts."""
        some = [review.cells for review in self.reviews[rows]]
        return {name: [cells[name] for cells in some] for name in some[0]}

    def results(self) -> pd.DataFrame:
        """The whole table, computed by this process alone, with the second judge's scores."""
        return self.judged(pd.concat([self.compare(rows) for rows in self.batches]))

    def judged(self, results: pd.DataFrame) -> pd.DataFrame:
        """The table with the second judge's scores of both models' responses, if there is a judge."""
        if self.judge is None:
            return results
        scores = {f"{name}_judge": self.judge.score(results[f"{name}_text"].tolist()) for name in ("policy", "base")}
        return results.assign(**scores)

    def summarise(self, results: pd.DataFrame) -> dict[str, Any]:
        """All estimates that follow from the table."""
        return summarise(results, self.models.reward.label, self.run.target_label)

    # --- columns ----------------------------------------------------------------------------------------------------

    def compare(self, rows: slice) -> pd.DataFrame:
        """A row per prompt: both responses, their scores, lengths and likelihood under base, and KL(policy || base)."""
        models = self.models
        ours = self.respond(models.policy, rows)
        both = evaluate_both(models.policy, models.reference, ours)
        if rows.start not in self.base_columns:
            self.base_columns[rows.start] = self.response_columns("base", self.respond(models.reference, rows), rows)
        columns = {
            "prompt": ours.prompt_texts(models.tokenizer),
            **self.response_columns("policy", ours, rows),
            **self.base_columns[rows.start],
            "kl_seq": (both.logprobs - both.ref_logprobs).sum(1).tolist(),
            "kl_seq_exact": both.exact_kl.sum(1).tolist(),
            "policy_tokens": self.token_column(ours, both.exact_kl),
            **self.human_columns(rows),
        }
        return pd.DataFrame(columns, index=np.arange(len(self.reviews))[rows])

    def response_columns(self, name: str, seqs: Sequences, rows: slice) -> Columns:
        """A model's responses with their scores, lengths, whether they ended, and base's log-likelihood of them."""
        tokenizer = self.models.tokenizer
        lengths = seqs.response_mask.sum(1)
        last_tokens = seqs.responses.gather(1, lengths[:, None] - 1).squeeze(1)
        return {
            f"{name}_text": seqs.texts(tokenizer),
            **self.score_columns(name, seqs, rows),
            f"{name}_len": lengths.tolist(),
            f"{name}_eos": (last_tokens == tokenizer.eos_token_id).int().tolist(),
            f"{name}_nll_base": plain_nll(self.models.reference, seqs),
        }

    def score_columns(self, name: str, seqs: Sequences, rows: slice) -> Columns:
        """The scores of a model's responses with their parts and, where they are those of a label, its log-odds."""
        reward = self.models.reward
        if not isinstance(reward, SentimentReward):
            scores = self.models.score(seqs, self.cells(rows), self.run)
            parts = {f"{name}_{PART}{part}": one.total.tolist() for part, one in scores.parts.items()}
            return {f"{name}_score": scores.total.tolist(), **parts}
        log_odds = reward.log_odds(seqs.texts(self.models.tokenizer, self.run.reward_on_prompt))
        return {f"{name}_score": (log_odds / 2).tanh().tolist(), f"{name}_log_odds": log_odds.tolist()}

    def token_column(self, seqs: Sequences, exact_kl: Tensor) -> list[str]:
        """Each response's tokens as text with their KL, in JSON."""
        tokenizer = self.models.tokenizer
        column = []
        for tokens, kls in zip(seqs.token_lists[1], real_rows(exact_kl, seqs), strict=True):
            pairs = zip(tokens, kls, strict=True)
            column.append(json.dumps([[tokenizer.decode([token]), round(kl, 3)] for token, kl in pairs]))
        return column

    def human_columns(self, rows: slice) -> Columns:
        """The length in tokens of what the authors wrote, and its negative log-likelihood under both models."""
        human = human_responses(self.reviews[rows], self.run.device)
        if human is None:
            return {}
        return {
            "human_len": human.response_mask.sum(1).tolist(),
            "human_nll_policy": plain_nll(self.models.policy, human),
            "human_nll_base": plain_nll(self.models.reference, human),
        }

    def base_draws(self, rows: slice) -> list[str]:
        """The scores of cfg.frontier base responses to each of some prompts, as text."""
        scores = []
        for draw in range(self.cfg.frontier):
            responses = self.respond(self.models.reference, rows, 1 + draw)
            scores.append(self.models.score(responses, self.cells(rows), self.run).total.cpu())
        form = ".4f" if self.models.reward.label is not None else ".6g"
        return [" ".join(f"{score:{form}}" for score in row) for row in torch.stack(scores, 1).tolist()]


def token_kl(policy: GPT2WithValueHead, base: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    """KL(policy || base) at each response token (B, R) over the whole vocabulary, in nats, 0 outside the mask."""
    return evaluate_both(policy, base, seqs).exact_kl


def real_rows(x: Tensor, seqs: Sequences) -> list[list[Any]]:
    """The values (B, R) at real response tokens, a list for each response."""
    return [row[:length].tolist() for row, length in zip(x.cpu(), seqs.lengths.tolist(), strict=True)]


@torch.no_grad()
def plain_nll(model: GPT2WithValueHead, seqs: Sequences) -> list[float]:
    """Negative log-likelihood (B,) under the model itself, without temperature, top-k and top-p."""
    plain = replace(seqs, temperature=1.0, support=None)
    return (-model.evaluate_responses(plain, with_entropy=False)[0].sum(1)).tolist()


def human_responses(reviews: list[Review], device: str) -> Sequences | None:
    """What the authors wrote, in the form of sampled responses; None where all reviews end with the prompt."""
    if not any(review.written for review in reviews):
        return None
    ids, mask = pad_left([review.prompt for review in reviews])
    backwards, real_backwards = pad_left([review.written[::-1] for review in reviews])
    written, real = backwards.flip(1), real_backwards.flip(1)
    tokens, attention_mask = torch.cat([ids, written], 1), torch.cat([mask, real], 1)
    no_logprobs = torch.zeros(real.shape, device=device)
    return Sequences.of(tokens.to(device), attention_mask.to(device), real.to(device), no_logprobs)


# --- the whole table ------------------------------------------------------------------------------------------------


def evaluate(comparison: Comparison) -> pd.DataFrame:
    """The table of eval_results.csv, its batches shared among all processes; empty on all but the main one."""
    own = comparison.batches[rank() :: world_size()]
    with raise_on_all_ranks(TO_LOWER):
        with progress_bar(own, "evaluating", "batch") as bar:  # closed before an error is printed
            tables = [comparison.compare(rows) for rows in bar]
        if comparison.cfg.frontier:
            with progress_bar(own, "frontier", "batch") as bar:
                for table, rows in zip(tables, bar, strict=True):
                    table["base_draws"] = comparison.base_draws(rows)
    tables = gather_to_main(tables)
    if not is_main_process():
        return pd.DataFrame()
    results = pd.concat(tables).sort_index()
    check_finite(results, comparison)
    for name in ("prompt", "policy_text", "base_text"):
        results[name] = results[name].map(spreadsheet_safe)
    return comparison.judged(results)


def check_finite(results: pd.DataFrame, comparison: Comparison) -> None:
    """Refuse numbers of the models or of the reward that are none (raises UserError)."""
    scored = "score" if comparison.models.reward.label is None else "log_odds"
    columns = {
        f"policy_path={comparison.cfg.policy_path}": ["kl_seq", "policy_nll_base", "base_nll_base"],
        f"rm_name={comparison.run.rm_name}": [f"policy_{scored}", f"base_{scored}"],
    }
    for culprit, names in columns.items():
        if not np.isfinite(results[names].to_numpy()).all():
            raise UserError(f"{culprit} computes numbers that are not finite: try --dtype float32")


def note_changed_models(models: Models, run: TrainConfig, home: SavedRun | None) -> None:
    """Say so where reward or base are not those of the run that made the policy."""
    if home is None:
        return
    now = {"rm_name": reward_sha256(models.reward), "ref_name": model_sha256(models.reference.lm)}
    for setting, what in (("rm_name", "reward"), ("ref_name", "base")):
        name, before = getattr(run, setting), home.fingerprints.get(setting)
        same = before == now[setting] if before else home.record[setting] in (None, name)
        if not same:
            print(f"note: {name} is not the {what}, or not the version of it, that this policy was trained with")
