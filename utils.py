"""The arithmetic of PPO-RLHF as pure functions: masks, sampling, log-probabilities, KL shaping, GAE, whitening.

Shapes: B batch, P left-padded prompt, R response, T = P + R, V vocabulary, H hidden. Masks are bool, True = real.
Nothing here knows of models, files or settings.
"""

import contextlib
import ctypes
import math
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from config import UserError

LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError, ImportError,
               pickle.UnpicklingError)  # fmt: skip
CHUNK_FLOATS = 24_000_000  # logits alive at a time, 96 MB in float32: large products are fast, and memory stays low
MAIN = "main"  # the revision where none is named
ENOUGH = 8  # responses, to foretell a score from
BLOCK = 256  # tokens: vocabularies are rounded up to whole blocks, and sampled from in two levels


# --- randomness: every draw is a function of (seed, step, what it is for) -------------------------------------------


def uniforms(seed: int, step: int, rows: int, width: int) -> Tensor:
    """The random numbers of one step's sampling: (rows, width) float64 in [0, 1), one per response token."""
    return torch.from_numpy(np.random.default_rng([seed, step, 1]).random((rows, width)))


def permutation(seed: int, step: int, epoch: int, n: int) -> Tensor:
    """The order (n,) in which one epoch of one step's update visits its responses."""
    return torch.from_numpy(np.random.default_rng([seed, step, 2, epoch]).permutation(n))


# --- several processes, each with its share of the rows; where there is only one, all of this is trivial ------------


def world_size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def share_of(rows: int) -> slice:
    """Which of so many rows are this process's."""
    return slice(rows * rank() // world_size(), rows * (rank() + 1) // world_size())


def gather_rows(x: Tensor, rows: int) -> Tensor:
    """The shares x (b, ...) of all processes together: (rows, ...), the same everywhere."""
    if world_size() == 1:
        return x
    kind = torch.uint8 if x.dtype == torch.bool else x.dtype
    whole = torch.zeros(rows, *x.shape[1:], dtype=kind, device=x.device)
    whole[share_of(rows)] = x.to(kind)
    dist.all_reduce(whole)  # everyone else adds exact zeros
    return whole.to(x.dtype)


def sum_of_all(x: Tensor) -> Tensor:
    """The sum of all processes' tensors of one shape, the same everywhere."""
    if world_size() > 1:
        there = x.to(meeting_place())
        dist.all_reduce(there)
        x = there.to(x.device)
    return x


def largest(x: float) -> float:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return x
    found = torch.tensor([float(x)], dtype=torch.float64, device=meeting_place())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def meeting_place() -> torch.device:
    """Where tensors must be to be sent: NCCL knows only CUDA."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


class GradientSum:
    """Adds up the gradients of all processes, once per optimiser step, while the backward pass is still under way.

    Gradients are sent in buckets, in the order in which a backward pass finishes them. Loss and gradient of a
    minibatch are sums over its rows, so that the sum over processes is that of one process with all rows.
    """

    BUCKET = 6_000_000  # numbers: 24 MB at a time keep the line busy and leave little for the end

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Parameters in the order in which their gradients become ready."""
        self.buckets: list[list[Tensor]] = []
        self.sent: list[tuple[Tensor, Any]] = []
        self.waiting: dict[Tensor, int] = {}
        if world_size() == 1:
            return
        room = 0
        for parameter in parameters:
            if room < parameter.numel():
                self.buckets.append([])
                room = self.BUCKET
            self.buckets[-1].append(parameter)
            room -= parameter.numel()
        self.hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in parameters]  # type: ignore[arg-type]

    def begin(self) -> None:
        """From here on a gradient that is accumulated is complete."""
        self.waiting = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}

    def _ready(self, parameter: Tensor) -> None:
        if self.waiting.pop(parameter, None) is not None:
            while len(self.sent) < len(self.buckets) and not any(
                p in self.waiting for p in self.buckets[len(self.sent)]
            ):  # in the same order everywhere, whatever is ready first
                self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Send what is left, and put the sums in the gradients' place."""
        self.waiting = {}
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            for parameter, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = grad.view_as(parameter)
        self.sent = []

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self.hooks if self.buckets else ():
            hook.remove()


# --- masks ----------------------------------------------------------------------------------------------------------


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only, so that padding on the left moves nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True places of mask (scalar)."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale x to mean 0 and standard deviation 1 over the True places of mask; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + eps), 0)


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
    """Draw one token per row by inverting the cumulative distribution at `uniform`, and say how likely it was.

    logits (B, V), uniform (B,) float64 in [0, 1); returns tokens (B,) int64 and logprobs (B,). Two levels,
    blocks of 256 tokens and then the tokens of one block, keep the running sums exact in float64 at the cost of one
    pass over the vocabulary.
    """
    probs = logits.softmax(-1)
    if logits.shape[-1] % BLOCK:
        probs = F.pad(probs, (0, -logits.shape[-1] % BLOCK))
    blocks = probs.unflatten(-1, (-1, BLOCK))
    block_ends = blocks.sum(-1).double().cumsum(-1)
    target = uniform[:, None].to(block_ends) * block_ends[:, -1:]
    block = torch.searchsorted(block_ends, target, right=True).clamp(max=block_ends.shape[-1] - 1)
    within = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).double()
    target = target - (block_ends.gather(1, block) - within.sum(-1, keepdim=True))
    # a target that rounding put at or beyond the block's end falls on the block's last token of any probability
    last = BLOCK - 1 - (within > 0).flip(-1).int().argmax(-1, keepdim=True)
    place = torch.minimum(torch.searchsorted(within.cumsum(-1), target.clamp(min=0), right=True), last)
    token = (block * BLOCK + place).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(-1), probs.gather(1, token).log().squeeze(-1)


# --- log-probabilities without the (tokens, V) matrix ---------------------------------------------------------------


def token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, support: Tensor | None = None,
    chunk_rows: int = 0, with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of each token and entropy of the distribution it came from, float32 and differentiable.

    hidden (N, H) are the states that the tokens (N,) were chosen in, weight (V, H) the output embedding, support
    (N, V) bool the tokens that could be chosen (None: all). Logits exist for `chunk_rows` rows at a time (0: see
    rows_at_a_time), forward and backward; the backward pass computes them again where there is more than one chunk.
    Entropy is 0 where not wanted.
    """
    return _TokenLogprobs.apply(hidden, weight, tokens, temperature, support, chunk_rows, with_entropy)


class _TokenLogprobs(torch.autograd.Function):
    """With z the warped logits, p = softmax(z), h its entropy, and k the token chosen:
    d log p_k / d z_j = [j = k] - p_j    and    d h / d z_j = -p_j (log p_j + h).
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, tokens, temperature, support, chunk_rows, with_entropy):  # type: ignore[no-untyped-def]
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.zeros_like(logprobs)
        embedding = output_embedding(weight, hidden.dtype)
        chunks = list(_chunks(len(hidden), len(weight), chunk_rows))
        for rows in chunks:
            all_logprobs = _all_logprobs(hidden, embedding, temperature, support, rows)
            logprobs[rows] = all_logprobs.gather(1, tokens[rows, None]).squeeze(1)
            if with_entropy:
                entropy[rows] = -_expectation(all_logprobs.exp(), all_logprobs, support, rows, len(weight))
        ctx.save_for_backward(hidden, weight, embedding, tokens, entropy, all_logprobs if len(chunks) == 1 else None)
        ctx.rest = chunks, temperature, support
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs, grad_entropy):  # type: ignore[no-untyped-def]
        hidden, weight, embedding, tokens, entropy, kept = ctx.saved_tensors
        chunks, temperature, support = ctx.rest
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        grad_logprobs = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs
        for rows in chunks:
            all_logprobs = kept if kept is not None else _all_logprobs(hidden, embedding, temperature, support, rows)
            grad = all_logprobs.exp()
            if grad_entropy is None:
                grad *= -grad_logprobs[rows, None]
            else:
                slope = (all_logprobs + entropy[rows, None]).nan_to_num(neginf=0.0)
                grad *= -(grad_logprobs[rows, None] + grad_entropy[rows, None] * slope)
            grad.scatter_add_(1, tokens[rows, None], grad_logprobs[rows, None])
            if temperature != 1:
                grad /= temperature
            grad = grad[:, : len(weight)].to(hidden.dtype)
            grad_hidden[rows] = grad @ embedding
            if grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, hidden[rows])
            else:
                grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None, None, None, None


@torch.no_grad()
def compare_policies(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor,
    temperature: float = 1.0, support: Tensor | None = None, chunk_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Policy and reference at the same tokens: logprobs, ref_logprobs, entropy and exact KL(policy || reference).

    Shapes as in token_logprobs; each result is (N,) float32, the KL in nats over the whole vocabulary.
    """
    out = hidden.new_empty(4, len(hidden), dtype=torch.float32)
    embedding, ref_embedding = output_embedding(weight, hidden.dtype), output_embedding(ref_weight, ref_hidden.dtype)
    for rows in _chunks(len(hidden), len(weight), chunk_rows):
        lp = _all_logprobs(hidden, embedding, temperature, support, rows)
        ref_lp = _all_logprobs(ref_hidden, ref_embedding, temperature, support, rows)
        probs = lp.exp()
        out[0, rows] = lp.gather(1, tokens[rows, None]).squeeze(1)
        out[1, rows] = ref_lp.gather(1, tokens[rows, None]).squeeze(1)
        gap = torch.sub(lp, ref_lp, out=ref_lp)
        out[2, rows] = -_expectation(lp, probs, support, rows, len(weight))
        out[3, rows] = _expectation(gap, probs, support, rows, len(weight))
    return out[0], out[1], out[2], out[3]


def output_embedding(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The output embedding (V, H) as it is multiplied by.

    In half precision its mean row is taken out: that shifts all logits of a token alike, which no probability notices,
    and spares bfloat16 the large common offset of GPT-2's logits, next to which it could not tell tokens apart.
    """
    return weight if dtype == torch.float32 else (weight - weight.mean(0)).to(dtype)


def padded_logits(hidden: Tensor, embedding: Tensor) -> Tensor:
    """Float32 logits (N, V') of states (N, H), where V' is V rounded up to blocks and the columns added are -inf.

    With GPT-2's 50,257 columns no row but the first would start at an address that matrix products like: they take up
    to twice as long.
    """
    vocabulary = len(embedding)
    logits = hidden.new_empty(len(hidden), -(-vocabulary // BLOCK) * BLOCK)
    torch.mm(hidden, embedding.T, out=logits[:, :vocabulary])
    logits[:, vocabulary:] = -math.inf
    return logits.float()


def rows_at_a_time(vocabulary: int) -> int:
    """How many rows of logits are held at a time."""
    return max(1, CHUNK_FLOATS // vocabulary)


def _chunks(rows: int, vocabulary: int, chunk_rows: int) -> Iterator[slice]:
    size = chunk_rows or rows_at_a_time(vocabulary)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def _all_logprobs(hidden: Tensor, embedding: Tensor, temperature: float, support: Tensor | None, rows: slice) -> Tensor:
    logits = padded_logits(hidden[rows], embedding)
    if temperature != 1:
        logits /= temperature
    if support is not None:
        logits[:, : len(embedding)].masked_fill_(~support[rows], -math.inf)
    return torch.log_softmax(logits, -1, out=logits)


def _expectation(x: Tensor, probs: Tensor, support: Tensor | None, rows: slice, vocabulary: int) -> Tensor:
    """Sum of probs * x over the tokens that can be chosen; x is overwritten, which saves a pass over memory."""
    product = x.mul_(probs)[:, :vocabulary]
    if support is not None:  # outside it both are without meaning: 0 times infinity
        product.masked_fill_(~support[rows], 0)
    return product.sum(-1)


# --- rewards and advantages -----------------------------------------------------------------------------------------


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float,
    running: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per-token rewards -kl_coef * kl, plus the score where it is paid; and kl = logprobs - ref_logprobs.

    scores (B,), everything else (B, R); kl is in nats and 0 outside the mask (Ziegler et al. 2019, eq. 2). The score is
    paid on the last real token, or, where there are running scores, as spread_scores says.
    """
    kl = torch.where(response_mask, logprobs - ref_logprobs, 0)
    return spread_scores(scores, running, response_mask) - kl_coef * kl, kl


def spread_scores(scores: Tensor, running: Tensor | None, response_mask: Tensor) -> Tensor:
    """Pay each response's score (B,) to its tokens (B, R): to those that changed what score was to be expected.

    running (B, R) is the score of the unfinished response up to a token, NaN where it was not looked up. What it tells
    of the final score is found by regression over the other responses, for each column by itself: early on little,
    later nearly all. Each change of that expectation is paid when it comes to light. The payments add up to the score
    minus what is expected before anything is written, the mean of the other scores; they are differences of a function
    of the state, which leaves the best policy as it is at gamma 1 (Ng et al. 1999), and where the expectation is right
    no function of the state leaves less noise. Without running scores, the last token is paid everything.
    """
    last = response_mask.sum(1, keepdim=True) - 1  # every response has a token: its EOS at least
    paid = torch.zeros(response_mask.shape, device=scores.device)
    expected = torch.zeros_like(scores, dtype=torch.float32)
    if running is not None:
        known = ~running.isnan() & (torch.arange(running.shape[1], device=last.device) < last)
        columns = (known.sum(0) >= ENOUGH).nonzero().squeeze(1).tolist()
        if columns:
            expected += (scores.sum() - scores) / (len(scores) - 1)
        for t in columns:
            rows = known[:, t]
            update = _foretold(running[rows, t], scores[rows])
            paid[rows, t] = update - expected[rows]
            expected[rows] = update
    return paid.scatter_add(1, last, (scores - expected)[:, None])


def _foretold(seen: Tensor, scores: Tensor) -> Tensor:
    """What each final score (n,) is expected to be from what was seen, by ridge regression on all the others.

    Leaving one out changes its error by 1 / (1 - leverage); a slope outside [0, 1] is set to the nearer end.
    """
    news = seen - seen.mean()
    total = news.square().sum() + 1
    slope = (news * (scores - scores.mean())).sum() / total
    fitted = slope.clamp(0, 1)
    leverage = 1 / len(seen) + torch.where(slope == fitted, news.square() / total, 0)
    return scores - (scores - scores.mean() - fitted * news) / (1 - leverage)


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


# --- text and machine -----------------------------------------------------------------------------------------------


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, mask: Tensor) -> list[str]:
    """Texts of the real tokens of each row; tokens and mask (B, n); special tokens such as EOS are left out."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def spreadsheet_safe(text: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe goes before what would begin one."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and move it there, so that it is never seen half-written."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def keep_freed_memory() -> None:
    """Let the process reuse memory that it freed instead of giving it back to the system (glibc; elsewhere nothing).

    A step frees and takes gigabytes; fresh pages cost up to eight times what it takes to fill them.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too


@contextlib.contextmanager
def enough_memory(to_lower: str) -> Iterator[None]:
    """Where memory does not suffice, name the settings to lower (raises UserError)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"memory does not suffice: lower {to_lower}") from None


def quiet_libraries() -> None:
    """Silence progress bars and notices of the libraries that a user cannot act on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def resolve_device(device: str) -> str:
    """auto -> cuda where present, else cpu (raises UserError where cuda is asked for in vain)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but this machine or this torch has no CUDA: use --device cpu or auto")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> str:
    """auto -> bfloat16 where the hardware multiplies it fast, else float32."""
    if dtype == "auto":
        return "bfloat16" if fast_bfloat16(torch.device(device)) else "float32"
    return dtype


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


# --- the hub --------------------------------------------------------------------------------------------------------


def require_hub(setting: str, name: str) -> None:
    """Make sure that `name` can be had: a folder, in the cache, or on a hub that answers.

    Where the hub does not answer but the cache has the name, the libraries are switched to offline mode, which spares
    half a minute of retries. Raises UserError where it can be had nowhere.
    """
    try:
        if Path(name).exists():
            return
    except OSError as error:
        raise UserError(f"{setting}={name} cannot be looked up: {error.strerror}") from None
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"{setting}={name} does not exist: check the path")
    kind = "datasets" if setting.startswith("dataset") else "models"
    cached = (Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}" / "snapshots").is_dir()
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    elif _hub_answers():
        return
    else:
        reason = f"the hub at {constants.ENDPOINT} does not answer"
    if not cached:
        raise UserError(
            f"{setting}={name} is neither a folder nor in the cache, and {reason}: "
            "connect, name a folder, or use --preset tiny, which needs no network"
        )
    _go_offline()


def _go_offline() -> None:
    constants.HF_HUB_OFFLINE = True
    with contextlib.suppress(ImportError):
        import datasets

        datasets.config.HF_HUB_OFFLINE = True


def _hub_answers(timeout: float = 3.0) -> bool:
    """One request, in a thread, because a name look-up can hang for longer than any timeout."""
    answers: list[object] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever went wrong, the hub did not answer
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    return bool(answers)


@contextlib.contextmanager
def loading(setting: str, name: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads `name` into a UserError of one line."""
    require_hub(setting, name)
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{setting}={name} has damaged weights ({error}): fetch or save them again") from None
    except LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{setting}={name} cannot be loaded as a {what}: {reason}") from None


def load_tokenizer(setting: str, name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model (raises UserError where there is none: the library would make one up)."""
    with loading(setting, name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or MAIN, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{setting}={name} has no tokenizer: save it with the model")
    return tokenizer


def resolved_commit(setting: str, name: str, revision: str | None = None) -> str | None:
    """The commit that a name from the hub stood for when it was loaded; None for a folder or a file."""
    kind = "datasets" if setting.startswith("dataset") else "models"
    cache = Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    if Path(name).exists() or not cache.is_dir():
        return None
    reference = cache / "refs" / (revision or MAIN)
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision


def refuse_missing(setting: str, name: str, info: dict[str, Any], what: str) -> None:
    """Raise UserError where a model came without some of its weights, which the library would fill with noise."""
    if info["missing_keys"]:
        first = min(info["missing_keys"])
        raise UserError(f"{setting}={name} lacks the weights of {first}: it is not a complete {what}")
