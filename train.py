"""Fine-tune GPT-2 by PPO towards a reward, anchored to frozen GPT-2: act, score, learn, report, keep.

    python train.py                  GPT-2 on IMDB
    python train.py --preset tiny    a small world made on the spot: no network, a few minutes
    python train.py --resume         go on with a run that was stopped, as if it had not been
    python train.py --help           every setting
    torchrun --nproc_per_node=8 train.py        the same run on eight GPUs

This is the loop. The algorithm is in ppo.py; what a run leaves behind and how it stops is in training/.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from config import TrainConfig

import torch

from ppo import Rollout, collect_rollout, ppo_update
from runtime.cli import parse_config, run
from runtime.distributed import call_on_main, main_process_first, process_group, raise_on_all_ranks, torchrun_job
from runtime.hub import quiet_libraries
from runtime.saved_run import NEWEST
from training.earlier_run import inspect_run_folder, was_started_by
from training.memory import fit_micro_batches
from training.parts import Parts, load_parts, resolve
from training.ranks import check_same_on_all_ranks
from training.score_scale import with_score_scale
from training.self_check import self_check
from training.session import Session, open_session
from utils import uniforms

SAMPLES = 4  # prompts per entry in samples.csv


def main(cfg: TrainConfig) -> Path:
    """Train, or with --check only check the facts; returns the run folder.

    Raises UserError: on wrong input before anything is written, and where a reward fails, after saving.
    """
    quiet_libraries()
    with process_group(cfg.device):
        # this very call of torchrun started the run, a process died, and torchrun has replaced it: go on
        if was_started_by(torchrun_job(), Path(cfg.ckpt_dir)):
            cfg = replace(cfg, resume=NEWEST)
        with raise_on_all_ranks():
            cfg = resolve(cfg)
        earlier = call_on_main(lambda: inspect_run_folder(cfg))
        if earlier.finished:
            return Path(cfg.ckpt_dir)
        with raise_on_all_ranks():
            parts = main_process_first(lambda: load_parts(cfg))
            self_check(parts.models, parts.prompts.batch(1), cfg)
        check_same_on_all_ranks(cfg, parts.models.policy, parts.prompts.prompts, parts.models.reward)
        if not cfg.check:
            parts = with_score_scale(parts, cfg, earlier.score_scale)
            cfg = fit_micro_batches(parts.models, cfg)
            with open_session(cfg, parts, earlier) as session:
                train(cfg, parts, session)
    return Path(cfg.ckpt_dir)


def train(cfg: TrainConfig, parts: Parts, session: Session) -> None:
    """Take the steps that are left."""
    policy = parts.models.policy
    if cfg.eval_every and not session.evaluated:  # a new run: the policy as it is before its first step
        session.add_evaluation(partial(evaluate_held_out, parts, cfg, session.kl_controller.coef))

    for step in session.steps():
        # act and score
        noise = uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
        rollout = collect_rollout(parts.models, parts.prompts.batch(step), noise, cfg, session.kl_controller.coef)
        # learn
        update = ppo_update(policy, session.optimizer, rollout, cfg, step, session.scaler)
        # report, and steer beta
        session.report(step, rollout, update)
        # keep
        if session.is_due(cfg.sample_every):  # sampled in the main process only
            session.add_samples(partial(sample_rows, parts, rollout, cfg, step))
        if session.is_due(cfg.eval_every):
            session.add_evaluation(partial(evaluate_held_out, parts, cfg, session.kl_controller.coef))
        if session.is_due(cfg.save_every):
            session.save()


def evaluate_held_out(parts: Parts, cfg: TrainConfig, kl_coef: float) -> dict[str, float]:
    """Averages over the held-out prompts, always with the same random numbers; kl_coef is that of the next step."""
    prompts = parts.held_out.batch(1)  # all of them
    noise = uniforms(cfg.seed, 0, len(prompts), cfg.max_new_tokens)
    whole = replace(cfg, reward_every=0, kl_in_loss=False)  # averages need no partial scores and no loss
    rollouts = []
    for numbers in torch.arange(len(prompts)).tensor_split(math.ceil(len(prompts) / cfg.batch_size)):
        rows = slice(int(numbers[0]), int(numbers[-1]) + 1)
        rollouts.append(collect_rollout(parts.models, prompts.select(rows), noise[rows], whole, kl_coef))
    return Rollout.cat(rollouts).metrics()


def sample_rows(parts: Parts, rollout: Rollout, cfg: TrainConfig, step: int) -> list[dict[str, Any]]:
    """A few prompts of a step with the responses of policy and base, sampled with the same random numbers."""
    models = parts.models
    tokenizer = models.tokenizer
    prompts = parts.prompts.batch(step).select(slice(SAMPLES))
    noise = uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
    base = models.respond(models.reference, prompts, noise[:SAMPLES], cfg)
    table = {
        "prompt": base.prompt_texts(tokenizer),
        "base": base.texts(tokenizer),
        "policy": rollout.sequences.texts(tokenizer)[:SAMPLES],
        "base_score": models.score(base, prompts.columns, cfg).total.tolist(),
        "policy_score": rollout.scores[:SAMPLES].tolist(),
    }
    rows = zip(*table.values(), strict=True)
    return [{"step": step, **dict(zip(table, row, strict=True))} for row in rows]


if __name__ == "__main__":
    sys.exit(run(lambda: main(parse_config(TrainConfig))))
