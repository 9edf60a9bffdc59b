"""The policy: GPT-2 with a critic. It samples responses, evaluates them, and is saved and loaded.

Only this file turns masks into positions, and only this file aligns logits and values with response tokens. The
Hugging Face model owns the weights; dropout is always off.
"""

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.pytorch_utils import Conv1D

import utils
from runtime.attention import attend
from runtime.device import widest_float
from runtime.hub import load_gpt2, loading
from runtime.recording import Recorded
from utils import (
    compare_policies,
    map_tensors,
    output_embedding,
    padded_logits,
    position_ids,
    put_tokens,
    sample_tokens,
    take_rows,
    take_tokens,
    token_logprobs,
    warp_logits,
)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with sampled responses, exactly as the sampler left them.

    tokens (B, T) int64 and attention_mask (B, T) bool; response_mask (B, R) is True up to and including the first EOS;
    logprobs (B, R) are the sampler's own; support (B, R, V) bool marks what top-k or top-p let through (None: all).
    lengths (B,) of the responses stay on the CPU, so that finding the real tokens never waits for a GPU.
    """

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    lengths: Tensor
    temperature: float = 1.0
    support: Tensor | None = None

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        logprobs: Tensor,
        temperature: float = 1.0,
        support: Tensor | None = None,
    ) -> "Sequences":
        """Sequences whose lengths are read from the response mask."""
        lengths = response_mask.sum(1).cpu()
        return cls(tokens, attention_mask, response_mask, logprobs, lengths, temperature, support)

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.attention_mask.shape
        assert self.response_mask.shape == self.logprobs.shape
        assert self.response_mask.device.type != "cpu" or torch.equal(self.lengths, self.response_mask.sum(1))
        assert self.attention_mask.dtype == self.response_mask.dtype == torch.bool

    @property
    def prompt_len(self) -> int:
        """P, the width of the left-padded prompts."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """The response tokens (B, R)."""
        return self.tokens[:, self.prompt_len :]

    def real_tokens(self) -> Tensor:
        """Where the real response tokens are among the flattened (B * R), in order."""
        real = (torch.arange(self.response_mask.shape[1]) < self.lengths[:, None]).flatten()
        return real.nonzero().squeeze(1).to(self.tokens.device, non_blocking=True)

    def real_support(self, real: Tensor) -> Tensor | None:
        """The rows (N, V) of the support at the real tokens, None where every token can be chosen."""
        return None if self.support is None else take_tokens(self.support, real)

    @cached_property
    def token_lists(self) -> tuple[list[list[int]], list[list[int]]]:
        """The real tokens of every prompt and of every response, in a single copy from the device."""
        tokens, mask = torch.stack([self.tokens, self.attention_mask.to(self.tokens.dtype)]).cpu()
        prompts = []
        responses = []
        for row, real, length in zip(tokens, mask.bool(), self.lengths.tolist(), strict=True):
            prompts.append(row[: self.prompt_len][real[: self.prompt_len]].tolist())
            responses.append(row[self.prompt_len :][:length].tolist())
        return prompts, responses

    def copy_to_host(self) -> None:
        """Copy the tokens from the device now, so that a GPU goes on with other work while the host reads them."""
        _ = self.token_lists

    def prompt_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The prompts as text."""
        return decode(tokenizer, self.token_lists[0])

    def texts(self, tokenizer: PreTrainedTokenizerBase, with_prompt: bool = False) -> list[str]:
        """The responses as text without EOS, after their prompts if wanted."""
        prompts, responses = self.token_lists
        if with_prompt:
            responses = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return decode(tokenizer, responses)

    def select(self, rows: Tensor | slice) -> "Sequences":
        """Some of the rows."""
        return map_tensors(lambda x: take_rows(x, rows), self)


def decode(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Texts of lists of tokens; special tokens such as EOS are left out."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class GPT2WithValueHead(nn.Module):
    """GPT-2 and a linear value head on its last hidden state, which starts at exactly zero.

    With own_critic another GPT-2 with a value head is the critic, and this one's head is not used.
    """

    def __init__(self, lm: GPT2LMHeadModel, dtype: torch.dtype = torch.float32) -> None:
        """Weights stay float32; dtype is that of matrix products."""
        super().__init__()
        self.lm = lm
        self.dtype = dtype
        self.value_head = nn.Linear(lm.config.n_embd, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.own_critic: GPT2WithValueHead | None = None
        self.eval()

    @property
    def critic(self) -> "GPT2WithValueHead":
        """The model whose value head gives the values: this one itself, unless it has a critic of its own."""
        return self if self.own_critic is None else self.own_critic

    def train(self, mode: bool = True) -> "GPT2WithValueHead":
        """Stays in evaluation mode: with dropout the ratio of PPO would not start at 1."""
        return super().train(False)

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matrix products run in self.dtype; softmax, losses and the optimiser stay in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.lm.device.type, self.dtype)

    def response_hidden(self, seqs: Sequences) -> Tensor:
        """The hidden states (B, R, H) in which the response tokens were chosen, one column before them."""
        mask = seqs.attention_mask[:, :-1]
        with self.autocast():
            return transformer_forward(
                self.lm, seqs.tokens[:, :-1], position_ids(mask), visible_keys(mask), seqs.prompt_len - 1
            )

    @cached_property
    def embedding(self) -> Tensor:
        """The output embedding (V, H) in the precision of matrix products, made once: for a frozen model only."""
        assert not self.lm.lm_head.weight.requires_grad
        return output_embedding(self.lm.lm_head.weight, self.dtype)

    def values(self, hidden: Tensor) -> Tensor:
        """The critic's values (B, R) before each token is chosen, in float32."""
        return F.linear(hidden.float(), self.value_head.weight, self.value_head.bias).squeeze(-1)

    def critic_hidden(self, seqs: Sequences, hidden: Tensor) -> Tensor:
        """The hidden states (B, R, H) behind the values: the policy's, `hidden`, or those of a critic of its own."""
        return hidden if self.own_critic is None else self.own_critic.response_hidden(seqs)

    def evaluate_responses(self, seqs: Sequences, with_entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies (B, R) of the response tokens, differentiable, in float32."""
        hidden = self.response_hidden(seqs)
        values = self.critic.values(self.critic_hidden(seqs, hidden))
        chunks = [self.evaluate_hidden(hidden[rows], seqs.select(rows), with_entropy) for rows in self.chunk(seqs)]
        logprobs = torch.cat([chunk.logprobs for chunk in chunks])
        entropy = torch.cat([chunk.entropy for chunk in chunks])
        return logprobs, values, entropy

    def evaluate_hidden(
        self, hidden: Tensor, seqs: Sequences, with_entropy: bool = True, ref_states: "ReferenceStates | None" = None
    ) -> "Evaluation":
        """Evaluate the response tokens from their hidden states (B, R, H), differentiable, in float32.

        The exact KL is 0 where no states of the reference are given. All is 0 outside the mask.
        """
        real = seqs.real_tokens()
        shape = seqs.response_mask.shape
        ref_hidden = None
        ref_embedding = None
        if ref_states is not None:
            ref_hidden = take_tokens(ref_states.hidden, real).to(ref_states.model.dtype)
            ref_embedding = ref_states.model.embedding
        logprobs, entropy, kl = token_logprobs(
            take_tokens(hidden, real).to(self.dtype),
            self.lm.lm_head.weight,
            take_tokens(seqs.responses, real),
            seqs.temperature,
            seqs.real_support(real),
            with_entropy,
            ref_hidden,
            ref_embedding,
        )
        logprobs = put_tokens(logprobs, real, shape)
        entropy = put_tokens(entropy, real, shape)
        exact_kl = torch.zeros_like(logprobs) if ref_states is None else put_tokens(kl, real, shape)
        return Evaluation(logprobs, entropy, exact_kl)

    def chunk(self, seqs: Sequences) -> list[slice]:
        """Slices of the rows whose logits, utils.CHUNK_FLOATS numbers at most, are in memory at a time.

        Beside them may be as many of the reference.
        """
        rows, width = seqs.response_mask.shape
        on_cpu = seqs.tokens.device.type == "cpu"
        numbers = utils.CHUNK_FLOATS if on_cpu else utils.GPU_CHUNK_FLOATS
        size = max(1, numbers // self.lm.config.vocab_size // width)
        return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]

    @classmethod
    def from_pretrained(
        cls, name: str, setting: str = "policy_name", dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> "GPT2WithValueHead":
        """Load a GPT-2 from the hub or a folder, with a new critic (raises UserError)."""
        return cls(load_gpt2(name, setting, revision), dtype)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "GPT2WithValueHead":
        """Load policy and critic as save_pretrained wrote them (raises UserError)."""
        model = cls.from_pretrained(str(folder / "policy_lm"), "ckpt_dir", dtype)
        with loading("ckpt_dir", str(folder), "value head"):
            model.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))
        return model

    def save_pretrained(self, folder: Path) -> None:
        """Write folder/policy_lm, a plain Hugging Face model, and folder/value_head.safetensors.

        A critic's own network is in the checkpoints alone.
        """
        self.lm.save_pretrained(folder / "policy_lm")
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")


class Evaluation(NamedTuple):
    """What a policy says of response tokens: all (B, R), float32, in nats.

    exact_kl is KL(policy || reference) over the whole vocabulary.
    """

    logprobs: Tensor
    entropy: Tensor
    exact_kl: Tensor


class PairedEvaluation(NamedTuple):
    """What policy, reference and critic say of the same response tokens: all (B, R), float32.

    All are in nats, but for the values, which are in units of the reward.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    exact_kl: Tensor


@dataclass(frozen=True, eq=False)
class ReferenceStates:
    """The frozen reference, and its hidden states (B, R, H) before the response tokens: what the exact KL needs."""

    hidden: Tensor
    model: GPT2WithValueHead

    @classmethod
    @torch.no_grad()
    def of(cls, reference: GPT2WithValueHead, seqs: Sequences) -> "ReferenceStates":
        """Run the reference on some responses."""
        return cls(reference.response_hidden(seqs), reference)


def load_reference(
    name: str, setting: str = "ref_name", dtype: torch.dtype = torch.float32, revision: str | None = None
) -> GPT2WithValueHead:
    """Load the frozen reference: the same class as the policy, without gradients."""
    return GPT2WithValueHead(load_gpt2(name, setting, revision), dtype).requires_grad_(False)


def add_own_critic(policy: GPT2WithValueHead, reference: GPT2WithValueHead) -> None:
    """Give a policy a critic of its own: a copy of the reference that is trained, with a value head that is zero."""
    lm = copy.deepcopy(reference.lm).requires_grad_(True)
    policy.own_critic = GPT2WithValueHead(lm, reference.dtype).to(lm.device)
    policy.value_head.requires_grad_(False)


# --- GPT-2's forward pass -------------------------------------------------------------------------------------------


def transformer_forward(
    lm: GPT2LMHeadModel,
    tokens: Tensor,
    positions: Tensor,
    visible: Tensor,
    first: int = 0,
    cache: "_Cache | None" = None,
) -> Tensor:
    """The last hidden states (B, n - first, H) of columns first, first + 1, ... of tokens (B, n) at positions (B, n).

    visible (B, 1, n, S) bool says which of the S keys each column attends to. It calls the library's modules without
    the library's bookkeeping; the last block computes only the columns asked for.
    """
    gpt2: GPT2Model = lm.transformer
    x = gpt2.wte(tokens) + gpt2.wpe(positions)
    for layer, block in enumerate(gpt2.h):
        qkv = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, lm.config.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if layer == len(gpt2.h) - 1 and first:
            x = x[:, first:]
            q = q[:, :, first:]
            visible = visible[..., first:, :]
        attended = attend(q, k, v, visible, _attention_scale(lm, layer))
        x = x + block.attn.c_proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return gpt2.ln_f(x)


def visible_keys(mask: Tensor) -> Tensor:
    """The keys that each column of left-padded rows attends to: (B, 1, n, n) bool for a mask (B, n).

    Attention is causal. A padded column sees itself, because attention to nothing would be NaN.
    """
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    return (mask[:, None, None, :] & causal) | (causal & causal.T)


def _attention_scale(lm: GPT2LMHeadModel, layer: int) -> float:
    scale = 1.0
    if lm.config.scale_attn_weights:
        scale /= math.sqrt(lm.config.n_embd // lm.config.n_head)
    if lm.config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    return scale


@torch.no_grad()
def evaluate_both(
    policy: GPT2WithValueHead, reference: GPT2WithValueHead, seqs: Sequences, ref_hidden: Tensor | None = None
) -> PairedEvaluation:
    """Evaluate the responses under both models; everything is 0 outside the mask.

    exact_kl is KL(policy || reference) over the whole vocabulary. The reference's hidden states (B, R, H) are computed
    unless they are given.
    """
    hidden = policy.response_hidden(seqs)
    if ref_hidden is None:
        ref_hidden = reference.response_hidden(seqs)
    embedding = output_embedding(policy.lm.lm_head.weight, policy.dtype)
    ref_embedding = output_embedding(reference.lm.lm_head.weight, reference.dtype)
    chunks = []
    for rows in policy.chunk(seqs):
        chunk = seqs.select(rows)
        real = chunk.real_tokens()
        compared = compare_policies(
            take_tokens(hidden[rows], real).to(policy.dtype),
            embedding,
            take_tokens(ref_hidden[rows], real).to(reference.dtype),
            ref_embedding,
            take_tokens(chunk.responses, real),
            chunk.temperature,
            chunk.real_support(real),
        )
        chunks.append([put_tokens(x, real, chunk.response_mask.shape) for x in compared])
    logprobs, ref_logprobs, entropy, exact_kl = map(torch.cat, zip(*chunks, strict=True))
    values = torch.where(seqs.response_mask, policy.critic.values(policy.critic_hidden(seqs, hidden)), 0)
    return PairedEvaluation(logprobs, ref_logprobs, values, entropy, exact_kl)


# --- sampling -------------------------------------------------------------------------------------------------------

CHECK_EVERY = 8  # tokens between checks whether every response has ended: on a GPU a check waits for it
PROMPT_COLUMNS = 16  # on a GPU prompts are padded to a multiple of this, so that nearly all batches have the same shape


@dataclass(frozen=True)
class Decoding:
    """Which token ends a response, and the distribution that tokens are drawn from."""

    eos_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1


@torch.no_grad()
def sample_responses(
    policy: GPT2WithValueHead,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    *,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sampler: "Sampler | None" = None,
) -> Sequences:
    """Sample one response per prompt, up to and including EOS, or of as many tokens as there are uniforms.

    prompt_ids and prompt_mask (B, P), left-padded; uniforms (B, max_new_tokens) in [0, 1) are all the randomness. A
    sampler keeps a GPU's memory for the next call.
    """
    on_cpu = policy.lm.device.type == "cpu"
    if not on_cpu:
        missing_columns = -prompt_ids.shape[1] % PROMPT_COLUMNS
        prompt_ids = F.pad(prompt_ids, (missing_columns, 0))
        prompt_mask = F.pad(prompt_mask, (missing_columns, 0))

    decoding = Decoding(eos_id, temperature, top_k, top_p)
    sampler = sampler or Sampler()
    responses = sampler.empty_responses(policy, prompt_ids.shape[1], uniforms.shape, decoding)

    # 1. read the prompts and draw the first tokens
    responses.begin(prompt_ids, prompt_mask, uniforms)
    # 2. draw a token for each at a time, until all have ended
    for t in range(1, uniforms.shape[1]):
        if on_cpu or t % CHECK_EVERY == 0:
            if not responses.alive.any():
                break
            if on_cpu:
                responses.drop_finished()
        responses.next_token()
    return responses.sequences()


class Sampler:
    """The memory that sampling needs. A GPU's serves the next rollout, too, with the step that was recorded in it."""

    def __init__(self) -> None:
        self.kept: dict[GPT2WithValueHead, UnfinishedResponses] = {}

    def empty_responses(
        self, policy: GPT2WithValueHead, prompt_len: int, shape: torch.Size, decoding: Decoding
    ) -> "UnfinishedResponses":
        """Room for responses of a shape (B, R) to prompts of one width: the last room again, where it fits."""
        kept = self.kept.pop(policy, None)
        if kept is not None and kept.fits(prompt_len, shape, decoding):
            kept.clear()
            responses = kept
        else:
            del kept  # before other memory is taken
            responses = UnfinishedResponses(policy, prompt_len, shape, decoding)
        if policy.lm.device.type != "cpu":
            self.kept[policy] = responses
        return responses


class UnfinishedResponses:
    """Unfinished responses. `next_token` adds a token to each: it runs `step`, or replays it on CUDA.

    On a GPU all tensors keep shape and place, and nothing in a step waits. So CUDA can record one step and replay it,
    in this rollout and in the next.
    """

    def __init__(self, policy: GPT2WithValueHead, prompt_len: int, shape: torch.Size, decoding: Decoding) -> None:
        """Set aside memory for responses of a shape (B, R)."""
        self.policy = policy
        self.prompt_len = prompt_len
        self.shape = shape
        self.decoding = decoding
        self.weights = SamplingWeights(policy)
        device = policy.lm.device
        self.next_token = Recorded(self.step, device)

        # the result, one row per prompt
        batch, width = shape
        self.tokens = torch.zeros(batch, prompt_len + width, dtype=torch.long, device=device)
        self.attention_mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logprobs = torch.zeros(shape, device=device)
        self.support: Tensor | None = None
        if decoding.truncates:
            self.support = torch.ones(*shape, policy.lm.config.vocab_size, dtype=torch.bool, device=device)

        # what the next step needs, one row per unfinished response
        self.rows = torch.arange(batch, device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.uniforms = torch.zeros(shape, dtype=widest_float(device), device=device)
        self.visible = torch.zeros_like(self.attention_mask)
        self.newest = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.newest)  # of the newest token; before the first, of the prompt's last
        self.cache = _Cache(policy, batch, prompt_len + width)
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # response tokens so far

    def fits(self, prompt_len: int, shape: torch.Size, decoding: Decoding) -> bool:
        """Whether this memory and the step recorded in it can be used again."""
        own = (self.prompt_len, self.shape, self.decoding)
        return own == (prompt_len, shape, decoding) and self.weights.have_not_moved()

    def clear(self) -> None:
        """Forget the responses, and take the policy's weights as they are now; nothing moves to another place."""
        for x in (self.tokens, self.attention_mask, self.logprobs, self.t, self.cache.kept):
            x.zero_()
        self.alive.fill_(True)
        if self.support is not None:
            self.support.fill_(True)
        self.weights.update()

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> None:
        """Read the prompts (B, P) and draw the first tokens; uniforms (B, R) are all the randomness."""
        tokens = self.tokens[:, : self.prompt_len]
        mask = self.attention_mask[:, : self.prompt_len]
        tokens.copy_(prompt_ids.to(tokens.dtype), non_blocking=True)
        mask.copy_(prompt_mask.to(mask.dtype), non_blocking=True)
        self.uniforms.copy_(uniforms.to(self.uniforms.dtype), non_blocking=True)
        self.visible.copy_(self.attention_mask)
        self.positions.copy_(mask.sum(-1, keepdim=True) - 1)
        self.cache.columns = torch.arange(self.prompt_len, device=mask.device)
        visible = F.pad(visible_keys(mask), (0, self.shape[1]))
        hidden = self.read(tokens, position_ids(mask), visible)
        self.draw(hidden)

    def step(self) -> None:
        """Read the newest tokens and draw the next."""
        self.cache.columns = self.t + (self.prompt_len - 1)  # of the newest token, drawn but not yet read
        self.visible.index_fill_(1, self.cache.columns, True)
        hidden = self.read(self.newest, self.positions, self.visible[:, None, None, :])
        self.draw(hidden)

    def read(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """The last hidden states (B, H) of some tokens (B, n), whose keys and values are cached."""
        last = tokens.shape[1] - 1
        with self.policy.autocast():
            return transformer_forward(self.weights.lm, tokens, positions, visible, last, self.cache)[:, 0]

    def draw(self, hidden: Tensor) -> None:
        """Draw a token for each hidden state (B, H) and append it, unless the response has ended."""
        logits = padded_logits(hidden.to(self.policy.dtype), self.weights.embedding)
        logits = warp_logits(logits, self.decoding.temperature, self.decoding.top_k, self.decoding.top_p)
        token, logprob = sample_tokens(logits, self.uniforms.index_select(1, self.t).squeeze(1))
        # NaN logits must give a token that exists: the update rejects them when its loss is not finite
        vocabulary = len(self.weights.embedding)
        token = token.clamp(max=vocabulary - 1)

        column = self.t + self.prompt_len
        self.tokens[self.rows, column] = torch.where(self.alive, token, 0)
        self.attention_mask[self.rows, column] = self.alive
        self.logprobs[self.rows, self.t] = torch.where(self.alive, logprob, 0)
        if self.support is not None:
            possible = logits[:, :vocabulary].isfinite()  # and everything where a response has ended: no -inf there
            self.support[self.rows, self.t] = possible | ~self.alive[:, None]
        self.alive.logical_and_(token != self.decoding.eos_id)
        self.newest.copy_(token[:, None])
        self.positions += 1
        self.t += 1

    def drop_finished(self) -> None:
        """Drop the responses that have ended, once fewer than three in four are left; not where steps are recorded."""
        if 4 * int(self.alive.sum()) >= 3 * len(self.alive):
            return
        unfinished = self.alive.nonzero().squeeze(1)
        self.rows = self.rows[unfinished]
        self.alive = self.alive[unfinished]
        self.uniforms = self.uniforms[unfinished]
        self.visible = self.visible[unfinished]
        self.newest = self.newest[unfinished]
        self.positions = self.positions[unfinished]
        self.cache.kept = self.cache.kept[:, :, unfinished]

    def sequences(self) -> Sequences:
        """The sampled sequences, cut to the longest response; copies, because the next rollout writes here again."""
        lengths = self.attention_mask[:, self.prompt_len :].sum(1).cpu()
        width = int(lengths.max()) if len(lengths) else 1  # a rank may have no rows
        mask = self.attention_mask[:, : self.prompt_len + width].clone()
        return Sequences(
            tokens=self.tokens[:, : self.prompt_len + width].clone(),
            attention_mask=mask,
            response_mask=mask[:, self.prompt_len :],
            logprobs=self.logprobs[:, :width].clone(),
            temperature=self.decoding.temperature,
            support=None if self.support is None else self.support[:, :width].clone(),
            lengths=lengths,
        )


class _Cache:
    """Keys and values of every layer; new ones go to the columns named by self.columns."""

    def __init__(self, policy: GPT2WithValueHead, batch: int, width: int) -> None:
        config = policy.lm.config
        shape = (config.n_layer, 2, batch, config.n_head, width, config.n_embd // config.n_head)
        self.kept = torch.zeros(shape, dtype=policy.dtype, device=policy.lm.device)
        self.columns = torch.arange(width, device=policy.lm.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, heads, n, d) and return all of this layer (B, heads, width, d)."""
        keys, values = self.kept[layer]
        keys.index_copy_(2, self.columns, k)
        values.index_copy_(2, self.columns, v)
        return keys, values


class SamplingWeights:
    """A policy's weights as sampling reads them: projections and output embedding in the precision of its products.

    Autocast would cast them again at every token. In float32 they are the policy's own.
    """

    def __init__(self, policy: GPT2WithValueHead) -> None:
        self.policy = policy
        self.lm = policy.lm
        if policy.dtype != torch.float32:
            self.lm = projections_in(policy.dtype, policy.lm)
        self.embedding = output_embedding(policy.lm.lm_head.weight, policy.dtype)
        self.address = policy.lm.lm_head.weight.data_ptr()  # of one weight: a model moves as a whole

    def have_not_moved(self) -> bool:
        """Whether weights and precision are those of a step that was recorded."""
        same_address = self.policy.lm.lm_head.weight.data_ptr() == self.address
        return same_address and self.policy.dtype == self.embedding.dtype

    def update(self) -> None:
        """Take the policy's weights as they are now."""
        if self.lm is self.policy.lm:
            return
        for own, current in zip(self.lm.parameters(), self.policy.lm.parameters(), strict=True):
            if own is not current:
                own.data.copy_(current.data)
        self.embedding.copy_(output_embedding(self.policy.lm.lm_head.weight, self.policy.dtype))


def projections_in(dtype: torch.dtype, lm: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same model with its projections stored in another precision; it shares all other weights."""
    projections = [module for module in lm.modules() if isinstance(module, Conv1D)]
    own = {id(weight) for module in projections for weight in module.parameters()}
    # what deepcopy is told to have copied already, it takes as it is
    shared = {id(weight): weight for weight in lm.parameters() if id(weight) not in own}
    copied = copy.deepcopy(lm, shared)
    for module in copied.modules():
        if isinstance(module, Conv1D):
            module.to(dtype)
    return copied
