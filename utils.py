"""The arithmetic of PPO-RLHF as pure functions: random draws, masks, sampling, log-probabilities, rewards, advantages.

Shapes: B batch, P left-padded prompt, R response, T = P + R, V vocabulary, H hidden, N any number of tokens. Masks are
bool, True = real. Nothing here knows of models, files or settings.
"""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.device import on_cpu, widest_float

T = TypeVar("T")
CHUNK_FLOATS = 16_000_000  # logits in memory at a time, 64 MB in float32: large products, and little memory
GPU_CHUNK_FLOATS = 100_000_000  # a GPU has more to do at a time before it is busy
MIN_ROWS_TO_PREDICT = 8  # responses that a regression needs to predict scores from
BLOCK = 256  # tokens: vocabularies are rounded up to whole blocks, and sampled from in two levels


# --- randomness: every draw is a function of (seed, step, what it is for) -------------------------------------------


def uniforms(seed: int, step: int, rows: int, width: int) -> Tensor:
    """The random numbers of one step's sampling, (rows, width) float64 in [0, 1): one per response token."""
    return torch.from_numpy(np.random.default_rng([seed, step, 1]).random((rows, width)))


def permutation(seed: int, step: int, epoch: int, n: int) -> Tensor:
    """The order (n,) in which one epoch of one step's update visits its responses."""
    return torch.from_numpy(np.random.default_rng([seed, step, 2, epoch]).permutation(n))


# --- dataclasses of tensors ------------------------------------------------------------------------------------------


def map_tensors(function: Callable[..., Tensor], *batches: T) -> T:
    """The first of some dataclasses of one type, each tensor in it replaced by function(that tensor of every one).

    Dataclasses inside dataclasses are mapped too; all other fields stay those of the first.
    """
    changes: dict[str, Any] = {}
    for field in fields(batches[0]):  # type: ignore[arg-type]
        values = [getattr(batch, field.name) for batch in batches]
        if isinstance(values[0], Tensor):
            changes[field.name] = function(*values)
        elif is_dataclass(values[0]):
            changes[field.name] = map_tensors(function, *values)
    return replace(batches[0], **changes)  # type: ignore[type-var]


def pad_right(x: Tensor, extra: int) -> Tensor:
    """Add `extra` columns of zeros to x (B, n, ...) on the right; a vector (B,) stays as it is."""
    return x if x.dim() == 1 else F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra))


def take_rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Some rows of a tensor on any device; their numbers are sent there without waiting for it."""
    return x[rows] if isinstance(rows, slice) else x[rows.to(x.device, non_blocking=True)]


def take_tokens(x: Tensor, places: Tensor) -> Tensor:
    """The values (N, ...) of x (B, R, ...) at some places of the flattened (B * R)."""
    return x.flatten(0, 1).index_select(0, places)


def put_tokens(x: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The inverse: values x (N,) at their places in a matrix of zeros of a shape (B, R)."""
    return x.new_zeros(shape.numel()).index_copy(0, places, x).view(shape)


# --- masks ----------------------------------------------------------------------------------------------------------


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only, so that padding on the left moves nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True places of mask (scalar)."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale x to mean 0 and standard deviation 1 over the True places of mask; 0 elsewhere."""
    return torch.where(mask, (x - masked_mean(x, mask)) * inverse_std(x, mask, eps), 0)


def inverse_std(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """What `whiten` multiplies by: 1 / the standard deviation of x over the True places of mask (scalar)."""
    return torch.rsqrt(masked_mean((x - masked_mean(x, mask)) ** 2, mask) + eps)


@on_cpu
def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 a perfect critic, 0 a useless one, NaN undefined."""
    target, error = returns[mask].double(), (returns - values)[mask].double()
    spread = target.var(unbiased=False).item()
    return 1 - error.var(unbiased=False).item() / spread if spread > 0 else math.nan


# --- the sampling distribution --------------------------------------------------------------------------------------


def warp_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Float32 logits (..., V) of the distribution sampled from; tokens outside top-k or top-p get -inf."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, dim=-1)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # what comes before already holds top_p; never true of the first
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return logits


def sample_tokens(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`; also return its log-probability.

    logits (B, V), uniform (B,) in [0, 1]; returns tokens (B,) int64 and logprobs (B,). The draw has two levels, blocks
    of 256 tokens and then the tokens of one block. So the running sums are precise, and cost one pass over the
    vocabulary.
    """
    wide = widest_float(logits.device)
    probs = logits.softmax(-1)
    if logits.shape[-1] % BLOCK:
        probs = F.pad(probs, (0, -logits.shape[-1] % BLOCK))
    blocks = probs.unflatten(-1, (-1, BLOCK))
    block_ends = blocks.sum(-1).to(wide).cumsum(-1)
    # a uniform that was rounded up to 1 must not fall behind the last block of any probability
    target = uniform[:, None].to(wide).clamp(max=1 - torch.finfo(wide).eps) * block_ends[:, -1:]
    block = torch.searchsorted(block_ends, target, right=True).clamp(max=block_ends.shape[-1] - 1)
    within = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).to(wide)
    target = target - (block_ends.gather(1, block) - within.sum(-1, keepdim=True))
    # a target that rounding put at or beyond the block's end falls on the block's last token of any probability
    last = BLOCK - 1 - (within > 0).flip(-1).int().argmax(-1, keepdim=True)
    place = torch.minimum(torch.searchsorted(within.cumsum(-1), target.clamp(min=0), right=True), last)
    token = (block * BLOCK + place).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(-1), probs.gather(1, token).log().squeeze(-1)


# --- log-probabilities of whole vocabularies, a chunk of tokens at a time ---------------------------------------------


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    support: Tensor | None = None,
    with_entropy: bool = True,
    ref_hidden: Tensor | None = None,
    ref_embedding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each token, entropy of its distribution, KL to the reference's: (N,) float32, differentiable.

    hidden (N, H) are the states in which the tokens (N,) were chosen, weight (V, H) is the output embedding, support
    (N, V) bool marks the tokens that could be chosen (None: all). ref_hidden and ref_embedding (from output_embedding)
    are the reference's. Entropy is 0 where it is not wanted, and KL where there is no reference.
    """
    return _TokenLogprobs.apply(hidden, weight, tokens, temperature, support, with_entropy, ref_hidden, ref_embedding)


class _TokenLogprobs(torch.autograd.Function):
    """With z the warped logits, p = softmax(z), h its entropy, q the reference, and k the token chosen:
    d log p_k / d z_j = [j = k] - p_j,    d h / d z_j = -p_j (log p_j + h)    and
    d KL / d z_j = p_j (log p_j - log q_j - KL).

    One (N, V) matrix is kept for the backward pass, and one more for KL; autograd would keep three, and more.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, weight, tokens, temperature, support, with_entropy, ref_hidden, ref_embedding
    ):
        embedding, vocabulary = output_embedding(weight, hidden.dtype), len(weight)
        all_logprobs = vocabulary_logprobs(hidden, embedding, temperature, support)
        logprobs = all_logprobs.gather(1, tokens[:, None]).squeeze(1)
        entropy, kl, log_ratio = torch.zeros_like(logprobs), torch.zeros_like(logprobs), None
        # the first argument of an expectation is overwritten, and the backward pass needs the logs
        if with_entropy:
            entropy = -_expectation(all_logprobs.exp(), all_logprobs, support, vocabulary)
        if ref_hidden is not None:
            all_ref_logprobs = vocabulary_logprobs(ref_hidden, ref_embedding, temperature, support)
            log_ratio = torch.sub(all_logprobs, all_ref_logprobs, out=all_ref_logprobs)
            log_ratio[:, vocabulary:] = 0  # infinity less infinity: here, and outside the support, p is 0
            if support is not None:
                log_ratio[:, :vocabulary].masked_fill_(~support, 0)
            kl = _expectation(all_logprobs.exp(), log_ratio, None, vocabulary)
        unwanted = [x for x, wanted in ((entropy, with_entropy), (kl, log_ratio is not None)) if not wanted]
        ctx.mark_non_differentiable(*unwanted)
        ctx.save_for_backward(hidden, weight, embedding, tokens, all_logprobs, entropy, log_ratio, kl)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy, kl

    @staticmethod
    def backward(ctx: Any, grad_logprobs, grad_entropy, grad_kl):  # type: ignore[no-untyped-def]
        hidden, weight, embedding, tokens, all_logprobs, entropy, log_ratio, kl = ctx.saved_tensors
        grad_logprobs = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs
        grad, factor = all_logprobs.exp(), -grad_logprobs[:, None]
        if grad_entropy is not None:
            factor = factor - grad_entropy[:, None] * (all_logprobs + entropy[:, None]).nan_to_num(neginf=0.0)
        if grad_kl is not None:
            factor = torch.addcmul(factor - (grad_kl * kl)[:, None], grad_kl[:, None], log_ratio)
        grad *= factor
        del factor  # as large as the logits
        grad.scatter_add_(1, tokens[:, None], grad_logprobs[:, None])
        if ctx.temperature != 1:
            grad /= ctx.temperature
        grad = grad[:, : len(weight)].to(hidden.dtype)
        return grad @ embedding, (grad.T @ hidden).float(), *[None] * 6


@torch.no_grad()
def compare_policies(
    hidden: Tensor,
    embedding: Tensor,
    ref_hidden: Tensor,
    ref_embedding: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    support: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and reference at the same tokens: logprobs, ref_logprobs, entropy and exact KL(policy || reference).

    Shapes as in token_logprobs, embeddings (V, H) as output_embedding returns them; each result is (N,) float32, the KL
    in nats over the whole vocabulary. With a support both are renormalised on the tokens that the policy could choose.
    """
    all_logprobs = vocabulary_logprobs(hidden, embedding, temperature, support)
    all_ref_logprobs = vocabulary_logprobs(ref_hidden, ref_embedding, temperature, support)
    probs = all_logprobs.exp()
    logprobs, ref_logprobs = (x.gather(1, tokens[:, None]).squeeze(1) for x in (all_logprobs, all_ref_logprobs))
    log_ratio = torch.sub(all_logprobs, all_ref_logprobs, out=all_ref_logprobs)
    entropy = -_expectation(all_logprobs, probs, support, len(embedding))
    return logprobs, ref_logprobs, entropy, _expectation(log_ratio, probs, support, len(embedding))


def vocabulary_logprobs(hidden: Tensor, embedding: Tensor, temperature: float, support: Tensor | None) -> Tensor:
    """log softmax of all warped logits (N, V'), float32, where V' is V rounded up to blocks; see padded_logits."""
    logits = padded_logits(hidden, embedding)
    if temperature != 1:
        logits /= temperature
    if support is not None:
        logits[:, : len(embedding)].masked_fill_(~support, -math.inf)
    return torch.log_softmax(logits, -1, out=logits)


def output_embedding(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The output embedding (V, H) in the precision of matrix products.

    In half precision its mean row is subtracted. That shifts all logits of a token alike, so no probability changes,
    and removes GPT-2's large common offset, next to which bfloat16 could not tell tokens apart.
    """
    return weight if dtype == torch.float32 else (weight - weight.mean(0)).to(dtype)


def padded_logits(hidden: Tensor, embedding: Tensor) -> Tensor:
    """Float32 logits (N, V') of states (N, H), where V' is V rounded up to blocks and the columns added are -inf.

    With GPT-2's 50,257 columns only the first row would start at an aligned address, and matrix products would take
    up to twice as long.
    """
    vocabulary = len(embedding)
    if hidden.is_cuda and hidden.dtype != torch.float32:  # sums that are not rounded to bfloat16 first
        wide = torch.mm(hidden, embedding.T, out_dtype=torch.float32)
        return F.pad(wide, (0, -vocabulary % BLOCK), value=-math.inf)
    logits = hidden.new_empty(len(hidden), -(-vocabulary // BLOCK) * BLOCK)
    torch.mm(hidden, embedding.T, out=logits[:, :vocabulary])
    logits[:, vocabulary:] = -math.inf
    return logits.float()


def _expectation(x: Tensor, probs: Tensor, support: Tensor | None, vocabulary: int) -> Tensor:
    """Sum of probs * x over the tokens that can be chosen; x is overwritten, which saves a pass over memory."""
    product = x.mul_(probs)[:, :vocabulary]
    if support is not None:  # outside it both are undefined: 0 times infinity
        product.masked_fill_(~support, 0)
    return product.sum(-1)


# --- rewards and advantages -----------------------------------------------------------------------------------------


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Per-token rewards -kl_coef * kl, plus the score on the last real token, and kl = logprobs - ref_logprobs.

    scores (B,), everything else (B, R); kl is in nats and 0 outside the mask (Ziegler et al. 2019, eq. 2).
    """
    kl = torch.where(response_mask, logprobs - ref_logprobs, 0)
    last = response_mask.sum(1, keepdim=True) - 1  # every response has a token: its EOS at least
    return (-kl_coef * kl).scatter_add(1, last, scores[:, None]), kl


@on_cpu
def expected_scores(scores: Tensor, partial_scores: Tensor, response_mask: Tensor) -> Tensor:
    """The score (B, R) to expect before each token, from the scores of what was written until then; 0 where none is.

    scores (B,); partial_scores (B, R) hold the score of the unfinished response up to a token, NaN where it was not
    scored. A regression over the other responses, one per column, turns them into expected final scores. Before the
    first of them the mean of the other scores is expected. This is a critic: nothing in it depends on the tokens to
    come. With lambda 1 it changes the noise of the advantages and nothing else. Below 1 its errors bias them, as any
    critic's do: what it foresees k tokens late counts lambda^k.
    """
    ends = response_mask.sum(1, keepdim=True) - 1
    known = ~partial_scores.isnan() & (torch.arange(partial_scores.shape[1], device=ends.device) < ends)
    columns = (known.sum(0) >= MIN_ROWS_TO_PREDICT).nonzero().squeeze(1).tolist()
    expected = torch.zeros(response_mask.shape, device=scores.device)
    if columns:
        expected += ((scores.sum() - scores) / (len(scores) - 1))[:, None]
    for t in columns:
        rows = known[:, t]
        expected[rows, t + 1 :] = leave_one_out_predict(partial_scores[rows, t], scores[rows])[:, None]
    return torch.where(response_mask, expected, 0)


def leave_one_out_predict(x: Tensor, y: Tensor) -> Tensor:
    """Predict each y (n,) from its x (n,) by ridge regression on all other pairs; slopes are limited to [0, 1].

    A penalty of 1 means little once the squares of x add up to more. A better start of a response does not foretell a
    worse end, nor an even better one: beyond the limits a slope is noise. No prediction depends on its own y.
    """
    n, centred = len(x), x - x.mean()
    total = centred.square().sum() + 1
    slope = (centred * (y - y.mean())).sum() / total
    error = y - y.mean() - slope * centred
    slopes = slope - centred * error / (total * (1 - 1 / n - centred.square() / total))  # without the own pair
    return (y.sum() - y) / (n - 1) + slopes.clamp(0, 1) * centred * n / (n - 1)


@on_cpu
def compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16); the response's end is the episode's end.

    All (B, R); returns advantages, not yet whitened, and returns = advantages + values; both 0 outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(real, delta + gamma * gae_lambda * next_advantage, 0)
        next_value = torch.where(real, values[:, t], 0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(response_mask, advantages + values, 0)
