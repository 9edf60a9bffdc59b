"""The scale of a reward: mean and deviation of the scores of the base's own responses, measured before the first step.

beta, step size and clip range then mean the same for every reward, whatever its unit.
"""

from dataclasses import replace

from config import TrainConfig

import torch

from reward import ScoreScale
from runtime.distributed import gather_rows, raise_on_all_ranks, rank_slice
from runtime.terminal import progress_bar
from training.parts import Parts
from utils import uniforms

PROMPTS = 256  # enough to know a deviation to within 5 %


def with_score_scale(parts: Parts, cfg: TrainConfig, saved: ScoreScale | None) -> Parts:
    """The parts with the scale in which scores are paid: that of a checkpoint, else measured (raises UserError).

    Scores that are a label's probability or have normalised parts stay as they are, unless standardize_scores says
    otherwise.
    """
    standardize = cfg.standardize_scores
    if standardize is None:
        standardize = parts.models.reward.label is None and not cfg.normalize_parts
    if not standardize:
        return parts
    scale = saved or measure(parts, cfg)
    return replace(parts, models=replace(parts.models, score_scale=scale))


@torch.no_grad()
def measure(parts: Parts, cfg: TrainConfig) -> ScoreScale:
    """Mean and standard deviation of the scores of the reference's responses to the first prompts of the run.

    Every rank responds to its share, and all get the same scale (raises UserError on all if the reward fails on one).
    """
    models = parts.models
    batches = []
    steps = range(1, 1 + -(-PROMPTS // cfg.batch_size))
    noise = uniforms(cfg.seed, 0, len(steps) * cfg.batch_size, cfg.max_new_tokens).split(cfg.batch_size)
    bar = progress_bar(steps, "measuring the scores of the base", "batch", leave=False)
    for step, batch_noise in zip(bar, noise, strict=True):
        prompts = parts.prompts.batch(step)
        rows = rank_slice(len(prompts))
        own = prompts.select(rows)
        with raise_on_all_ranks():
            seqs = models.respond(models.reference, own, batch_noise[rows], cfg)
            scores = models.score(seqs, own.columns, cfg).total
        batches.append(gather_rows(scores, len(prompts)).cpu().double())
    scores = torch.cat(batches)
    mean = scores.mean().item()
    std = scores.std(unbiased=False).item()
    if std <= 1e-6 * max(1.0, abs(mean)):
        print(
            f"note: all {len(scores)} responses of the base score {mean:.4g}; PPO learns from differences, so it may "
            "learn nothing"
        )
        std = 1.0
    return ScoreScale(mean, std)
