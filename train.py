"""Fine-tune GPT-2 by PPO towards a sentiment reward, anchored to frozen GPT-2: act, score, learn, report, keep.

    python train.py                  GPT-2 on IMDB
    python train.py --preset tiny    a small world made on the spot: no network, a few minutes
    python train.py --resume         go on with a run that was stopped, as if it had not been
    python train.py --help           every setting
    torchrun --nproc_per_node=8 train.py        the same run on eight GPUs

Owns the loop. The algorithm itself is in ppo.py, what a run leaves behind in tools/run_folder.py.
"""

from __future__ import annotations

import math
import resource
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from config import NEWEST, TrainConfig, UserError, run_cli, with_changes  # isort: skip  (before torch: see there)

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import PromptStream, keep_back, load_examples, load_prompts
from model import GPT2WithValueHead, Sequences, check_fit, generate, load_reference
from ppo import KLController, Rollout, build_optimizer, make_rollout, ppo_update
from reward import SentimentReward
from tools.audit import audit
from tools.make_models import resolve_name
from tools.processes import all_alike, first_then_others, hand_out, job, processes, together
from tools.run_folder import Onlooker, RunFolder, begun_by
from tools.signals import Abandoned, Stop, stop_signals
from tools.states import Snapshot
from utils import (
    enough_memory,
    is_first,
    keep_freed_memory,
    largest,
    load_tokenizer,
    quiet_libraries,
    require_hub,
    resolve_device,
    resolve_dtype,
    share_of,
    uniforms,
)  # fmt: skip

SHOWN = 4  # prompts per visit to samples.csv
PATIENCE = 8.0  # seconds: an update that takes longer can be abandoned, for which the weights before it are kept


def main(cfg: TrainConfig) -> Path:
    """Train, and return the run folder; wrong input raises UserError before anything is written."""
    quiet_libraries()
    with processes(cfg.device):
        with together():
            if begun_by(job(), Path(cfg.ckpt_dir)):  # and one of its processes died
                cfg = with_changes(cfg, resume=NEWEST)
            cfg = resolve(cfg)
            run = (RunFolder if is_first() else Onlooker)(cfg)
        if largest(run.is_finished(cfg)):
            return run.path
        with together():
            parts = first_then_others(lambda: load_parts(cfg))
            audit(parts.policy, parts.reference, parts.reward, parts.tokenizer, parts.prompts.batch(1), cfg, cfg.check)
        all_alike(cfg, parts.policy, parts.prompts.prompts)
        if not cfg.check:
            run_steps(cfg, parts, run)
        return run.path


def run_steps(cfg: TrainConfig, parts: Parts, run: RunFolder) -> None:
    """Hold the run folder, go on where it ends, take the steps that are left, and say where things are."""
    keep_freed_memory()
    optimizer = build_optimizer(parts.policy, cfg)
    kl = KLController(cfg.kl_coef, cfg.adaptive_kl_target)
    with ExitStack() as held:
        with together():
            held.enter_context(run.open())
            stop = held.enter_context(stop_signals())
            run.start(cfg, parts.policy, parts.tokenizer, optimizer, kl, len(parts.prompts.prompts))
        counters = hand_out(parts.policy, optimizer, {**run.counters(), "evaluated": run.evaluated})
        run.failed_steps, run.evaluated, kl.coef = (counters[x] for x in ("failed_steps", "evaluated", "kl_coef"))
        try:
            with enough_memory("batch_size or max_new_tokens"):
                last = train(cfg, parts, optimizer, kl, run, counters["step"] + 1, stop)
        except BrokenPipeError:
            raise
        except (OSError, SafetensorError) as error:
            run.leave_unwritten(error)
        largest(0.0)  # where all meet: when one process leaves, torchrun ends the others, and one may still be saving
        run.finish(cfg, last, stop.signal)


def train(
    cfg: TrainConfig, parts: Parts, optimizer: Optimizer, kl: KLController, run: RunFolder, first: int, stop: Stop
) -> int:
    """Take the steps first, first + 1, … and return the last one taken."""
    if cfg.eval_every and not run.evaluated:
        run.add_evaluation(first - 1, evaluate(parts, cfg))
    taken, update_took = first - 1, math.inf
    if taken >= cfg.total_steps:  # killed after the last state was written and before the policy was
        run.save(taken)
    steps = tqdm(range(first, cfg.total_steps + 1), "training", unit="step", dynamic_ncols=True,
                 initial=first - 1, total=cfg.total_steps)  # fmt: skip
    try:
        for step in steps:
            watch = Stopwatch(cfg.device)
            before = Snapshot(parts.policy, optimizer) if stop.alone and update_took > PATIENCE else None
            try:
                with stop.may_abandon():
                    # act
                    with together():
                        seqs = act(parts, cfg, step)
                        watch.lap("seconds_generate")
                        # score
                        scored = score(parts, cfg, seqs), kl.coef, running_scores(parts, cfg, seqs)
                    rollout = make_rollout(parts.policy, parts.reference, seqs, *scored).of_all()
                    watch.lap("seconds_score")
                with stop.may_abandon(before is not None):
                    # learn
                    update = ppo_update(parts.policy, optimizer, rollout, cfg, step)
                    update_took = watch.lap("seconds_update")
            except Abandoned:
                if before is not None:
                    before.restore()
                run.save(taken)
                break
            taken = step
            # report
            row = {"step": step, "episodes": step * cfg.batch_size, "kl_coef": kl.coef, **rollout.metrics(), **update}
            run.log({**row, **watch.metrics(rollout)})
            told = f"sentiment {row['sentiment_mean']:+.2f}, KL {row['kl_seq']:.2f}, beta {kl.coef:.3g}"
            steps.set_postfix_str(told, refresh=False)
            kl.update(row["kl_seq"])
            # keep
            done = step == cfg.total_steps
            if done or step % cfg.sample_every == 0:
                run.add_samples(step, partial(samples, parts, rollout, cfg, step))
            if cfg.eval_every and (done or step % cfg.eval_every == 0):
                run.add_evaluation(step, evaluate(parts, cfg))
            stopped = stop.agreed() or run.must_give_up()
            if done or stopped or step % cfg.save_every == 0:
                run.save(step)
            if stopped:
                break
    except UserError:  # a reward that failed: what was learnt is kept
        run.save(taken)
        raise
    finally:
        steps.close()
    return taken


# --- what is trained, and on what -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The models and the prompts of a run, on their device."""

    policy: GPT2WithValueHead
    reference: GPT2WithValueHead
    reward: SentimentReward
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptStream
    held_out: PromptStream  # one step of it is all of it


def resolve(cfg: TrainConfig) -> TrainConfig:
    """Settings with `auto` decided and paths made absolute; everything from the hub is known to be within reach."""
    device = resolve_device(cfg.device)
    names = {"policy_name": cfg.policy_name, "ref_name": cfg.ref_name or cfg.policy_name, "rm_name": cfg.rm_name,
             "dataset": cfg.dataset}  # fmt: skip
    for setting, name in names.items():
        if not name.startswith("tiny:"):
            require_hub(setting, name)
    paths = {setting: str(Path(name).resolve()) if Path(name).exists() else name for setting, name in names.items()}
    return with_changes(cfg, device=device, dtype=resolve_dtype(cfg.dtype, device), **paths)


def load_parts(cfg: TrainConfig) -> Parts:
    """Load everything that a run needs (raises UserError)."""
    policy_name, ref_name = resolve_name(cfg.policy_name), resolve_name(cfg.ref_name or cfg.policy_name)
    dtype = getattr(torch, cfg.dtype)
    tokenizer = load_tokenizer("policy_name", policy_name, cfg.policy_revision)
    policy = GPT2WithValueHead.from_pretrained(policy_name, dtype=dtype, revision=cfg.policy_revision).to(cfg.device)
    reference = load_reference(ref_name, dtype=dtype, revision=cfg.ref_revision).to(cfg.device)
    check_fit(policy, reference, tokenizer, cfg.max_prompt_len + cfg.max_new_tokens)
    reward = SentimentReward(
        resolve_name(cfg.rm_name), cfg.target_label, cfg.device, cfg.reward_batch_size, dtype, cfg.rm_revision
    )
    if cfg.reward_on_prompt:  # of what is too long for the reward, the prompt's beginning goes first
        reward.tokenizer.truncation_side = "left"
    texts, _ = load_examples(
        resolve_name(cfg.dataset, cfg.split), cfg.split, cfg.text_column, revision=cfg.dataset_revision
    )
    prompts = load_prompts(tokenizer, texts, cfg.min_prompt_len, cfg.max_prompt_len)
    kept, back = keep_back(prompts, cfg.eval_prompts if cfg.eval_every else 0, cfg.seed)
    streams = PromptStream(kept, cfg.batch_size, cfg.seed), PromptStream(back, len(back), cfg.seed)
    return Parts(policy, reference, reward, tokenizer, *streams)


def act(parts: Parts, cfg: TrainConfig, step: int) -> Sequences:
    """Let the policy answer this process's share of a step's prompts."""
    ids, mask = parts.prompts.batch(step)
    rows = share_of(cfg.batch_size)
    return answer(parts, cfg, ids[rows], mask[rows], uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)[rows])


def answer(
    parts: Parts, cfg: TrainConfig, ids: Tensor, mask: Tensor, noise: Tensor, model: GPT2WithValueHead | None = None
) -> Sequences:
    """Let the policy (or another model) answer prompts (B, P) with the random numbers (B, R)."""
    return generate(
        model or parts.policy, ids.to(cfg.device), mask.to(cfg.device), noise.to(cfg.device),
        eos_id=int(parts.tokenizer.eos_token_id), temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
    )  # fmt: skip


def evaluate(parts: Parts, cfg: TrainConfig) -> dict[str, float]:
    """How the policy does on the prompts kept back, always with the same random numbers: averages over all of them."""
    ids, mask = parts.held_out.batch(1)
    noise = uniforms(cfg.seed, 0, len(ids), cfg.max_new_tokens)
    rollouts = []
    for rows in np.array_split(np.arange(len(ids)), -(-len(ids) // cfg.batch_size)):
        own = rows[share_of(len(rows))]
        with together():
            seqs = answer(parts, cfg, ids[own], mask[own], noise[own])
            scores = score(parts, cfg, seqs)
        rollouts.append(make_rollout(parts.policy, parts.reference, seqs, scores, cfg.kl_coef).of_all())
    return Rollout.join(rollouts).metrics()


def samples(parts: Parts, rollout: Rollout, cfg: TrainConfig, step: int) -> list[dict[str, Any]]:
    """A few prompts of a step with the answers of policy and base, drawn with the same random numbers."""
    ids, mask = parts.prompts.batch(step)
    noise = uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
    base = answer(parts, cfg, ids[:SHOWN], mask[:SHOWN], noise[:SHOWN], parts.reference)
    columns = {
        "prompt": base.prompts(parts.tokenizer), "base": base.texts(parts.tokenizer),
        "policy": rollout.sequences.texts(parts.tokenizer), "base_score": score(parts, cfg, base).tolist(),
        "policy_score": rollout.scores.tolist(),
    }  # fmt: skip
    return [{"step": step, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=False)]


def score(parts: Parts, cfg: TrainConfig, seqs: Sequences) -> Tensor:
    """The reward's scores (B,) of the responses (raises UserError)."""
    return ask_reward(parts, cfg, seqs.texts(parts.tokenizer, cfg.reward_on_prompt))


def running_scores(parts: Parts, cfg: TrainConfig, seqs: Sequences) -> Tensor | None:
    """The scores (B, R) of each unfinished response after every reward_every tokens, NaN between; None where only the
    whole response is scored (raises UserError).
    """
    if not cfg.reward_every:
        return None
    lengths, width = seqs.response_mask.sum(1), seqs.response_mask.shape[1]
    texts: list[str] = []
    places: list[tuple[Tensor, int]] = []
    for seen in range(cfg.reward_every, width, cfg.reward_every):
        rows = (lengths > seen).nonzero().squeeze(1)
        texts += seqs.select(rows).first(seen).texts(parts.tokenizer, cfg.reward_on_prompt)
        places.append((rows, seen))
    running = torch.full(seqs.response_mask.shape, math.nan, device=lengths.device)
    found = ask_reward(parts, cfg, texts).split([len(rows) for rows, _ in places])
    for (rows, seen), scores in zip(places, found, strict=True):
        running[rows, seen - 1] = scores
    return running


def ask_reward(parts: Parts, cfg: TrainConfig, texts: list[str]) -> Tensor:
    """Scores (n,) of texts (raises UserError where the reward fails or returns something else)."""
    try:
        scores = parts.reward(texts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"rm_name={cfg.rm_name} failed on a batch ({type(error).__name__}: {error})") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != (len(texts),):
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"rm_name={cfg.rm_name} returned {found} instead of one real number per response")
    return scores


# --- clock --------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of each phase of a step, waiting for the GPU where there is one."""

    def __init__(self, device: str) -> None:
        self.cuda, self.laps = device == "cuda", dict[str, float]()
        self.last = self._now()

    def lap(self, name: str) -> float:
        """Note the time since the lap before, and return it."""
        now = self._now()
        self.laps[name], self.last = now - self.last, now
        return self.laps[name]

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """The laps, response tokens per second over all of them, and peak memory (CUDA's, else the process's)."""
        tokens = int(rollout.mask.sum())
        host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if self.cuda else host_peak
        return {**self.laps, "tokens_per_second": tokens / sum(self.laps.values()), "peak_memory_mb": peak / 2**20}

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    run_cli(TrainConfig, main)
