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
SAMPLING = 1  # what a random draw is for
SHUFFLING = 2
CHUNK_FLOATS = 16_000_000  # logits in memory at a time, 64 MB in float32: large products, and little memory
GPU_CHUNK_FLOATS = 100_000_000  # a GPU has more to do at a time before it is busy
MIN_ROWS_TO_PREDICT = 8  # responses that a regression needs to predict scores from
BLOCK = 256  # tokens: vocabularies are rounded up to whole blocks, and sampled from in two levels


# --- randomness: every draw is a function of (seed, step, what it is for) -------------------------------------------


def uniforms(seed: int, step: int, rows: int, width: int) -> Tensor:
    """The random numbers of one step's sampling, (rows, width) float64 in [0, 1): one per response token."""
    return torch.from_numpy(np.random.default_rng([seed, step, SAMPLING]).random((rows, width)))


def permutation(seed: int, step: int, epoch: int, n: int) -> Tensor:
    """The order (n,) in which one epoch of one step's update visits its responses."""
    return torch.from_numpy(np.random.default_rng([seed, step, SHUFFLING, epoch]).permutation(n))


# --- dataclasses of tensors ------------------------------------------------------------------------------------------


def map_tensors(function: Callable[..., Tensor], *batches: T) -> T:
    """Apply a function field by field to the tensors of dataclasses of one type; other fields come from the first.

    Dataclasses inside dataclasses and dicts of tensors are mapped too.
    """
    changes: dict[str, Any] = {}
    for field in fields(batches[0]):  # type: ignore[arg-type]
        values = [getattr(batch, field.name) for batch in batches]
        if isinstance(values[0], Tensor):
            changes[field.name] = function(*values)
        elif is_dataclass(values[0]):
            changes[field.name] = map_tensors(function, *values)
        elif isinstance(values[0], dict) and all(isinstance(x, Tensor) for x in values[0].values()):
            # in the order of the keys: the function may meet other ranks, whose dicts have another
            mapped = {key: function(*(value[key] for value in values)) for key in sorted(values[0])}
            changes[field.name] = {key: mapped[key] for key in values[0]}
    return replace(batches[0], **changes)  # type: ignore[type-var]


def pad_right(x: Tensor, extra: int) -> Tensor:
    """Add `extra` columns of zeros to x (B, n, ...) on the right; a vector (B,) stays as it is."""
    if x.dim() == 1:
        return x
    later_dimensions = (0, 0) * (x.dim() - 2)
    return F.pad(x, (*later_dimensions, 0, extra))


def take_rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Some rows of a tensor (B, ...) on any device; a scalar stays as it is.

    The numbers of the rows are sent to the device without waiting for it.
    """
    if x.dim() == 0:
        return x
    if isinstance(rows, slice):
        return x[rows]
    return x[rows.to(x.device, non_blocking=True)]


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
    centred = x - masked_mean(x, mask)
    return torch.where(mask, centred * inverse_std(x, mask, eps), 0)


def inverse_std(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """What `whiten` multiplies by: 1 / the standard deviation of x over the True places of mask (scalar)."""
    centred = x - masked_mean(x, mask)
    variance = masked_mean(centred**2, mask)
    return torch.rsqrt(variance + eps)


@on_cpu
def explained_variance(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 a perfect critic, 0 a useless one, NaN undefined."""
    target = returns[mask].double()
    error = (returns - values)[mask].double()
    total_variance = target.var(unbiased=False).item()
    if not total_variance > 0:  # NaN, too
        return math.nan
    return 1 - error.var(unbiased=False).item() / total_variance


# --- the sampling distribution --------------------------------------------------------------------------------------


def warp_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Float32 logits (..., V) of the distribution sampled from; tokens outside top-k or top-p get -inf."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True, dim=-1)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs
        beyond = before >= top_p  # never true of the first
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return logits


def sample_tokens(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`; also return its log-probability.

    logits (B, V), uniform (B,) in [0, 1]; returns tokens (B,) int64 and logprobs (B,). The draw has two levels, blocks
    of 256 tokens and then the tokens of one block. So the running sums are precise, and cost one pass over the
    vocabulary.
    """
    wide = widest_float(logits.device)
    vocabulary = logits.shape[-1]
    probs = logits.softmax(-1)
    if vocabulary % BLOCK:
        probs = F.pad(probs, (0, -vocabulary % BLOCK))

    # 1. the block; a uniform that was rounded up to 1 must not fall behind the last block with non-zero probability
    blocks = probs.unflatten(-1, (-1, BLOCK))
    block_ends = blocks.sum(-1).to(wide).cumsum(-1)
    below_1 = uniform[:, None].to(wide).clamp(max=1 - torch.finfo(wide).eps)
    target = below_1 * block_ends[:, -1:]
    block = torch.searchsorted(block_ends, target, right=True).clamp(max=block_ends.shape[-1] - 1)

    # 2. the token in it; rounding may put the target beyond the block's last token with non-zero probability
    within = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).to(wide)
    block_start = block_ends.gather(1, block) - within.sum(-1, keepdim=True)
    target = (target - block_start).clamp(min=0)
    place = torch.searchsorted(within.cumsum(-1), target, right=True)
    last = BLOCK - 1 - (within > 0).flip(-1).int().argmax(-1, keepdim=True)
    token = block * BLOCK + torch.minimum(place, last)
    token = token.clamp(max=vocabulary - 1)
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
        vocabulary = len(weight)
        embedding = output_embedding(weight, hidden.dtype)
        all_logprobs = vocabulary_logprobs(hidden, embedding, temperature, support)
        logprobs = all_logprobs.gather(1, tokens[:, None]).squeeze(1)

        entropy = torch.zeros_like(logprobs)
        if with_entropy:
            probs = all_logprobs.exp()  # a copy to overwrite: the backward pass needs the logs
            entropy = -_sum_of_products(probs, all_logprobs, support, vocabulary)
        else:
            ctx.mark_non_differentiable(entropy)

        kl = torch.zeros_like(logprobs)
        log_ratio = None
        if ref_hidden is not None:
            all_ref_logprobs = vocabulary_logprobs(ref_hidden, ref_embedding, temperature, support)
            log_ratio = torch.sub(all_logprobs, all_ref_logprobs, out=all_ref_logprobs)
            log_ratio[:, vocabulary:] = 0  # infinity less infinity: here, and outside the support, p is 0
            if support is not None:
                log_ratio[:, :vocabulary].masked_fill_(~support, 0)
            probs = all_logprobs.exp()
            kl = _sum_of_products(probs, log_ratio, None, vocabulary)
        else:
            ctx.mark_non_differentiable(kl)

        ctx.save_for_backward(hidden, weight, embedding, tokens, all_logprobs, entropy, log_ratio, kl)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy, kl

    @staticmethod
    def backward(ctx: Any, grad_logprobs, grad_entropy, grad_kl):  # type: ignore[no-untyped-def]
        hidden, weight, embedding, tokens, all_logprobs, entropy, log_ratio, kl = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        # what p_j is multiplied by
        factor = -grad_logprobs[:, None]
        if grad_entropy is not None:
            log_p_and_entropy = (all_logprobs + entropy[:, None]).nan_to_num(neginf=0.0)
            factor = factor - grad_entropy[:, None] * log_p_and_entropy  # -(log p_j + h)
        if grad_kl is not None:
            # log p_j - log q_j - KL
            factor = torch.addcmul(factor - (grad_kl * kl)[:, None], grad_kl[:, None], log_ratio)
        grad = all_logprobs.exp()
        grad *= factor
        del factor  # as large as the logits
        grad.scatter_add_(1, tokens[:, None], grad_logprobs[:, None])
        if ctx.temperature != 1:
            grad /= ctx.temperature
        grad = grad[:, : len(weight)].to(hidden.dtype)

        grad_hidden = grad @ embedding
        grad_weight = (grad.T @ hidden).float()
        return grad_hidden, grad_weight, None, None, None, None, None, None


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
    logprobs = all_logprobs.gather(1, tokens[:, None]).squeeze(1)
    ref_logprobs = all_ref_logprobs.gather(1, tokens[:, None]).squeeze(1)

    probs = all_logprobs.exp()
    log_ratio = torch.sub(all_logprobs, all_ref_logprobs, out=all_ref_logprobs)
    entropy = -_sum_of_products(all_logprobs, probs, support, len(embedding))
    kl = _sum_of_products(log_ratio, probs, support, len(embedding))
    return logprobs, ref_logprobs, entropy, kl


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
    if dtype == torch.float32:
        return weight
    return (weight - weight.mean(0)).to(dtype)


def padded_logits(hidden: Tensor, embedding: Tensor) -> Tensor:
    """Float32 logits (N, V') of states (N, H), where V' is V rounded up to blocks and the columns added are -inf.

    With GPT-2's 50,257 columns only the first row would start at an aligned address, and matrix products would take
    up to twice as long.
    """
    vocabulary = len(embedding)
    extra = -vocabulary % BLOCK
    if hidden.is_cuda and hidden.dtype != torch.float32:  # sums that are not rounded to bfloat16 first
        wide = torch.mm(hidden, embedding.T, out_dtype=torch.float32)
        return F.pad(wide, (0, extra), value=-math.inf)
    logits = hidden.new_empty(len(hidden), vocabulary + extra)
    torch.mm(hidden, embedding.T, out=logits[:, :vocabulary])
    logits[:, vocabulary:] = -math.inf
    return logits.float()


def _sum_of_products(overwritten: Tensor, other: Tensor, support: Tensor | None, vocabulary: int) -> Tensor:
    """Sum of the products (N, V') over the tokens that can be chosen, in the memory of the first: an expectation."""
    product = overwritten.mul_(other)[:, :vocabulary]
    if support is not None:  # outside it both are undefined: 0 times infinity
        product.masked_fill_(~support, 0)
    return product.sum(-1)


# --- rewards and advantages -----------------------------------------------------------------------------------------


def shape_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards (B, R): -kl_coef * kl, plus the score on the last real token (Ziegler et al. 2019, eq. 2).

    scores (B,); kl (B, R) is logprobs - ref_logprobs in nats, 0 outside the mask.
    """
    last = response_mask.sum(1, keepdim=True) - 1  # every response has a token: its EOS at least
    return (-kl_coef * kl).scatter_add(1, last, scores[:, None])


@on_cpu
def expected_scores(scores: Tensor, partial_scores: Tensor, response_mask: Tensor) -> Tensor:
    """The score (B, R) to expect before each token, from the scores of what was written until then; 0 where none is.

    scores (B,); partial_scores (B, R) hold the score of the unfinished response up to a token, NaN where it was not
    scored. A regression over the other responses, one per column, turns them into expected final scores. Before the
    first of them the mean of the other scores is expected.

    This is a critic: nothing in it depends on the tokens to come. With lambda 1 any critic leaves the expected gradient
    as it is, and changes its noise alone. Below 1 its errors bias the gradient: a score that it foresees only k tokens
    after its cause counts lambda^k there.
    """
    expected = torch.zeros(response_mask.shape, device=scores.device)
    # 1. the columns in which enough responses were scored before they ended
    ends = response_mask.sum(1, keepdim=True) - 1
    before_end = torch.arange(partial_scores.shape[1], device=ends.device) < ends
    scored = before_end & ~partial_scores.isnan()
    columns = (scored.sum(0) >= MIN_ROWS_TO_PREDICT).nonzero().squeeze(1).tolist()
    # 2. from each of them on, what it predicts
    if columns:
        mean_of_others = (scores.sum() - scores) / (len(scores) - 1)
        expected += mean_of_others[:, None]
    for t in columns:
        rows = scored[:, t]
        predicted = leave_one_out_predict(partial_scores[rows, t], scores[rows])
        expected[rows, t + 1 :] = predicted[:, None]
    return torch.where(response_mask, expected, 0)


def leave_one_out_predict(x: Tensor, y: Tensor) -> Tensor:
    """Predict each y (n,) from its x (n,) by ridge regression on all other pairs.

    The penalty is 1. Slopes are clamped to [0, 1]; anything else is noise. No prediction depends on its own y.
    """
    n = len(x)
    centred = x - x.mean()
    deviation = y - y.mean()
    # 1. the slope of all pairs
    total = centred.square().sum() + 1
    slope = (centred * deviation).sum() / total
    # 2. each slope without the pair itself: slope - c e / (S (1 - h)), where h = 1 / n + c^2 / S is the pair's leverage
    error = deviation - slope * centred
    leverage_left = 1 - 1 / n - centred.square() / total
    slopes = slope - centred * error / (total * leverage_left)
    # 3. what the line through the other pairs says; x less the mean of the other x is c n / (n - 1)
    mean_of_others = (y.sum() - y) / (n - 1)
    return mean_of_others + slopes.clamp(0, 1) * centred * n / (n - 1)


def mean_error_of_others(targets: Tensor, predictions: Tensor, response_mask: Tensor) -> Tensor:
    """What the other responses say that a prediction lacks (B, 1): the mean of their mean errors; all are (B, R).

    A critic that is fitted to the past lags behind a policy that improves, and would credit the last tokens of every
    response, whatever they are. No row depends on its own target. 0 for a single response.
    """
    errors = torch.where(response_mask, targets - predictions, 0).sum(1) / response_mask.sum(1)
    return ((errors.sum() - errors) / max(len(errors) - 1, 1))[:, None]


@on_cpu
def compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16); the response's end is the episode's end.

    All (B, R); returns advantages, not yet whitened, and returns = advantages + values; both 0 outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(real, delta + gamma * gae_lambda * next_advantage, 0)
        next_value = torch.where(real, values[:, t], 0)
        advantages[:, t] = next_advantage
    returns = torch.where(response_mask, advantages + values, 0)
    return advantages, returns
