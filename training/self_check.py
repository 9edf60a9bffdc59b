"""The self-check: before training starts, facts that PPO relies on are checked on the real models in a second or two.

Each check computes one number in two ways. Training does not start where one fails, because it would optimise the
wrong thing without a sign of it. Most published bugs of PPO on language models break one of these facts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from config import TrainConfig, UserError

import torch
import torch.nn.functional as F
from torch import Tensor

from data import PromptBatch, select_cells
from model import GPT2WithValueHead, Sequences, decode, evaluate_both, sample_responses
from ppo import Models
from reward import Classifier, Context, Reward, parts_of, score_responses
from utils import expected_scores, shape_rewards, uniforms

# nats; a misplaced token or position costs whole nats
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
SAME = 1e-3  # nats in any precision, where the same is computed twice
Finding = tuple[bool, str]


@torch.no_grad()
def self_check(models: Models, prompts: PromptBatch, cfg: TrainConfig) -> None:
    """Check every fact on a few prompts; with cfg.check each is printed.

    Raises UserError naming the first fact that does not hold.
    """
    # padding in every row, so that its bugs show
    ids = F.pad(prompts.ids[:4], (3, 0))
    mask = F.pad(prompts.mask[:4], (3, 0))
    noise = uniforms(cfg.seed, 0, len(ids), min(cfg.max_new_tokens, 16))

    def sample(eos_id: int) -> Sequences:
        return sample_responses(
            models.policy,
            ids,
            mask,
            noise,
            eos_id=eos_id,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        )

    seqs = sample(int(models.tokenizer.eos_token_id))
    stopper = int(seqs.responses[0, int(seqs.response_mask[0].sum()) // 2])  # as EOS it ends a row half-way
    stopped = sample(stopper)
    failed: list[str] = []
    checks = [
        *_checks(models, seqs, prompts, cfg),
        ("EOS is the last action, and trained", lambda: _eos(stopped, stopper)),
    ]
    for fact, check in checks:
        holds, seen = check()
        if cfg.check:
            print(f"{'ok    ' if holds else 'FAILED'}  {fact}: {seen}")
        if not holds:
            failed.append(f"{fact} ({seen})")
    if failed:
        raise UserError(
            f"self-check failed, training would go wrong: {failed[0]}; add --check to see every fact"
            + ("" if cfg.dtype == "float32" else f"; if {cfg.dtype} is too coarse, --dtype float32 passes")
        )
    if not cfg.check:
        print(f"self-check: {len(checks)} facts hold")


def _checks(
    models: Models, seqs: Sequences, prompts: PromptBatch, cfg: TrainConfig
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    policy, reference, reward = models.policy, models.reference, models.reward
    mask, rounding = seqs.response_mask, TOLERANCE[policy.dtype]
    colder = max(1.0, 1 / cfg.temperature)  # logits are divided by it, and so are their errors
    tolerance, same = rounding * colder, SAME * colder
    evaluation = evaluate_both(policy, reference, seqs)
    logprobs = evaluation.logprobs
    values = evaluation.values

    def gap(a: Tensor, b: Tensor, allowed: float = tolerance) -> Finding:
        difference = float(torch.where(mask, (a - b).abs(), 0).max())
        return difference <= allowed, f"largest difference {difference:.1e}"

    yield (
        "a token's log-probability is the library's own cross-entropy",
        lambda: gap(logprobs, _library_logprobs(policy, seqs)),
    )
    yield "the distribution sampled from is the one scored", lambda: gap(logprobs, seqs.logprobs)
    yield "padding changes nothing", lambda: gap(logprobs, policy.evaluate_responses(_unpadded(seqs))[0])
    yield "the ratio is 1 before the first update", lambda: gap(logprobs, policy.evaluate_responses(seqs)[0], same)
    again = partial(evaluate_both, policy, reference, seqs)
    yield "two forward passes agree (no dropout)", lambda: gap(logprobs, again().logprobs, same)
    yield "the score lands on the last real token", _reward_place
    yield "the critic starts at zero", lambda: (not values.any(), f"largest value {values.abs().max():.1e}")
    yield "the reference and the reward are frozen", lambda: _frozen(reference, reward)
    for part in parts_of(reward):
        if isinstance(part, Classifier):
            part.check_longest()
    if reward.label is None:
        yield (
            "the reward gives every response a number, the empty one too",
            lambda: _scores(models, prompts, rounding, cfg),
        )
    else:
        yield f"the reward scores {cfg.target_label!r} within -1 and 1", lambda: _label_scores(reward, rounding, cfg)


def _library_logprobs(policy: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    """Row by row without padding, from the library's own loss: a path that shares no code with ours."""
    out = torch.zeros_like(seqs.logprobs)
    for row in range(len(out)):
        ids = seqs.tokens[row, seqs.attention_mask[row]][None]
        logits = policy.lm(input_ids=ids).logits[0]
        n = int(seqs.response_mask[row].sum())
        kept = None if seqs.support is None else seqs.support[row, :n]
        logits = logits[-n - 1 : -1] / seqs.temperature
        logits = logits if kept is None else logits.masked_fill(~kept, -torch.inf)
        out[row, :n] = -F.cross_entropy(logits, ids[0, -n:], reduction="none")
    return out


def _unpadded(seqs: Sequences) -> Sequences:
    """The same sequences without the columns on the left that are padding in every row."""
    cut = int(seqs.attention_mask.any(0).int().argmax())
    return replace(seqs, tokens=seqs.tokens[:, cut:], attention_mask=seqs.attention_mask[:, cut:])


def _eos(seqs: Sequences, eos_id: int) -> Finding:
    """Every response is real up to and including the first EOS, or to its full width, and not beyond."""
    rows = zip(seqs.responses.tolist(), seqs.response_mask.tolist(), strict=True)
    lengths = [(row.index(eos_id) + 1 if eos_id in row else len(row), real) for row, real in rows]
    ended = sum(n < len(real) for n, real in lengths)
    return all(real == [i < n for i in range(len(real))] for n, real in lengths), f"{ended} responses end early"


def _reward_place() -> Finding:
    """By hand: responses of 1, 2 and 3 tokens with scores 1, 2 and 3; and what is expected of 12 others beforehand."""
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    scores = torch.tensor([1.0, 2.0, 3.0])
    rewards = shape_rewards(scores, torch.zeros(3, 3), mask, kl_coef=1.0)
    placed = torch.equal(rewards, torch.diag(scores))
    scores = torch.linspace(-1, 1, 12)
    partial_scores = torch.full((12, 3), torch.nan)
    partial_scores[:, 0] = scores / 2
    expected = expected_scores(scores, partial_scores, torch.ones(12, 3, dtype=torch.bool))
    placed &= torch.allclose(expected[:, 0], (scores.sum() - scores) / 11, atol=1e-5)
    return placed and bool((expected[:, 1].diff() > 0).all()), "and partial scores predict it"


def _frozen(reference: GPT2WithValueHead, reward: Reward) -> Finding:
    models = [reference, *(part.model for part in parts_of(reward) if isinstance(part, Classifier))]
    free = sum(p.requires_grad for model in models for p in model.parameters())
    return not free, f"{free} of their weights would be trained"


PRAISE, BLAME = " I loved it, a wonderful film.", " I hated it, a terrible film."


def _scores(models: Models, prompts: PromptBatch, tolerance: float, cfg: TrainConfig) -> Finding:
    """Scores of made-up responses, with their tokens, to the first prompts, with their columns."""
    reward, tokenizer = models.reward, models.tokenizer
    texts = [PRAISE, BLAME, ""]
    rows = [i % len(prompts) for i in range(len(texts))]
    before = decode(tokenizer, [prompts.ids[i][prompts.mask[i]].tolist() for i in rows])
    tokens = [[*tokenizer(text, add_special_tokens=False)["input_ids"], int(tokenizer.eos_token_id)] for text in texts]
    context = Context(tokens, select_cells(prompts.columns, rows))
    scores = score_responses(reward, texts, before, cfg.rm_name, context).total
    shown = ", ".join(f"{score:.4g}" for score in scores.tolist())
    if not scores.isfinite().all():
        return False, f"praise, blame and nothing score {shown}"
    if not isinstance(reward, Classifier):  # a Python function may compare the responses of a batch
        return True, f"praise, blame and nothing score {shown}"
    moved = _moved_by_others(reward, tolerance * max(1.0, float(scores.abs().max())), cfg)
    return not moved, moved or f"praise, blame and nothing score {shown}"


def _label_scores(reward: Reward, tolerance: float, cfg: TrainConfig) -> Finding:
    scores = score_responses(reward, [PRAISE.strip(), BLAME.strip(), ""], [""] * 3, cfg.rm_name).total
    if not bool((scores.abs() <= 1).all()):  # NaN, too, is not within
        return False, f"praise {scores[0]:+.2f}, blame {scores[1]:+.2f}, nothing {scores[2]:+.2f}"
    moved = _moved_by_others(reward, tolerance, cfg)
    return not moved, moved or f"praise {scores[0]:+.2f}, blame {scores[1]:+.2f}"


def _moved_by_others(reward: Reward, tolerance: float, cfg: TrainConfig) -> str:
    """The text whose score most depends on the rest of its batch, and by how much; nothing within the tolerance.

    The texts differ in length, because padding is what classifiers see of others.
    """
    texts = ["", "Fine.", PRAISE.strip(), BLAME.strip(), PRAISE.strip() + 4 * BLAME]
    together = score_responses(reward, texts, [""] * len(texts), cfg.rm_name).total
    alone = torch.cat([score_responses(reward, [text], [""], cfg.rm_name).total for text in texts])
    gaps = (together - alone).abs().nan_to_num(torch.inf)
    worst = int(gaps.argmax())
    if gaps[worst] <= tolerance:
        return ""
    return (
        f"{texts[worst]!r} scores {alone[worst]:+.3f} alone and {together[worst]:+.3f} beside longer texts: take "
        "--reward_batch_size 1, or another rm_name"
    )
