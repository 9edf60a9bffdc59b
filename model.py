"""The policy: GPT-2 with a scalar value head. It samples responses, evaluates them, and is saved and loaded.

Only this file turns masks into positions, and only this file aligns logits and values with response tokens. The
Hugging Face model owns the weights; dropout is always off.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
    temperature: float = 1.0
    support: Tensor | None = None
    lengths: Tensor = None  # type: ignore[assignment]  # None: read from the mask

    def __post_init__(self) -> None:
        if self.lengths is None:
            object.__setattr__(self, "lengths", self.response_mask.sum(1).cpu())
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

    @cached_property
    def token_lists(self) -> tuple[list[list[int]], list[list[int]]]:
        """The real tokens of every prompt and of every response, in a single copy from the device."""
        tokens, mask = torch.stack([self.tokens, self.attention_mask.to(self.tokens.dtype)]).cpu()
        start = self.prompt_len
        prompts = [row[keep.bool()].tolist() for row, keep in zip(tokens[:, :start], mask[:, :start], strict=True)]
        return prompts, [row[:n].tolist() for row, n in zip(tokens[:, start:], self.lengths.tolist(), strict=True)]

    def prompt_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The prompts as text."""
        return decode(tokenizer, self.token_lists[0])

    def texts(self, tokenizer: PreTrainedTokenizerBase, with_prompt: bool = False) -> list[str]:
        """The responses as text without EOS, after their prompts if wanted."""
        prompts, responses = self.token_lists
        return decode(tokenizer, [p + r for p, r in zip(prompts, responses, strict=True)] if with_prompt else responses)

    def select(self, rows: Tensor | slice) -> "Sequences":
        """Some of the rows."""
        return map_tensors(lambda x: take_rows(x, rows), self)


def decode(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Texts of lists of tokens; special tokens such as EOS are left out."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class GPT2WithValueHead(nn.Module):
    """GPT-2 and a linear value head on its last hidden state, which starts at exactly zero."""

    def __init__(self, lm: GPT2LMHeadModel, dtype: torch.dtype = torch.float32) -> None:
        """Weights stay float32; dtype is that of matrix products."""
        super().__init__()
        self.lm, self.dtype = lm, dtype
        self.sampler: _Sampler | None = None  # on a GPU, of the last rollout
        self.value_head = nn.Linear(lm.config.n_embd, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()

    def train(self, mode: bool = True) -> "GPT2WithValueHead":
        """Stays in evaluation mode: with dropout the ratio of PPO would not start at 1."""
        return super().train(False)

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matrix products run in self.dtype; softmax, losses and the optimiser stay in float32."""
        half = self.dtype != torch.float32
        return torch.autocast(self.lm.device.type, self.dtype) if half else nullcontext()

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

    def evaluate_responses(self, seqs: Sequences, with_entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies (B, R) of the response tokens, differentiable, in float32."""
        hidden = self.response_hidden(seqs)
        parts = [self.evaluate_hidden(hidden[rows], seqs.select(rows), with_entropy) for rows in self.chunk(seqs)]
        logprobs, values, entropy, _ = (torch.cat(x) for x in zip(*parts, strict=True))
        return logprobs, values, entropy

    def evaluate_hidden(
        self, hidden: Tensor, seqs: Sequences, with_entropy: bool = True, ref_states: "ReferenceStates | None" = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from the hidden states (B, R, H), and the exact KL to the reference.

        KL is 0 where no states of the reference are given. All but the values are 0 outside the mask.
        """
        real, shape = seqs.real_tokens(), seqs.response_mask.shape
        ref = (
            ()
            if ref_states is None
            else (take_tokens(ref_states.hidden, real).to(ref_states.model.dtype), ref_states.model.embedding)
        )
        logprobs, entropy, kl = token_logprobs(
            take_tokens(hidden, real).to(self.dtype),
            self.lm.lm_head.weight,
            take_tokens(seqs.responses, real),
            seqs.temperature,
            None if seqs.support is None else take_tokens(seqs.support, real),
            with_entropy,
            *ref,
        )
        logprobs, entropy = put_tokens(logprobs, real, shape), put_tokens(entropy, real, shape)
        kl = torch.zeros_like(logprobs) if ref_states is None else put_tokens(kl, real, shape)
        return logprobs, self.values(hidden), entropy, kl

    def chunk(self, seqs: Sequences) -> list[slice]:
        """Slices of the rows whose logits, utils.CHUNK_FLOATS numbers at most, are in memory at a time.

        Beside them may be as many of the reference.
        """
        rows, width = seqs.response_mask.shape
        numbers = utils.CHUNK_FLOATS if seqs.tokens.device.type == "cpu" else utils.GPU_CHUNK_FLOATS
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
        """Write folder/policy_lm, a plain Hugging Face model, and folder/value_head.safetensors."""
        self.lm.save_pretrained(folder / "policy_lm")
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")


@dataclass(frozen=True, eq=False)
class ReferenceStates:
    """The frozen reference, and its hidden states (B, R, H) before the response tokens: what the exact KL needs."""

    hidden: Tensor
    model: GPT2WithValueHead

    @classmethod
    @torch.no_grad()
    def of(cls, reference: GPT2WithValueHead, seqs: Sequences) -> "ReferenceStates":
        """Those for some responses."""
        return cls(reference.response_hidden(seqs), reference)


def load_reference(
    name: str, setting: str = "ref_name", dtype: torch.dtype = torch.float32, revision: str | None = None
) -> GPT2WithValueHead:
    """Load the frozen reference: the same class as the policy, without gradients."""
    return GPT2WithValueHead(load_gpt2(name, setting, revision), dtype).requires_grad_(False)


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
            x, q, visible = x[:, first:], q[:, :, first:], visible[..., first:, :]
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
    scale = 1 / math.sqrt(lm.config.n_embd // lm.config.n_head) if lm.config.scale_attn_weights else 1.0
    return scale / (layer + 1) if lm.config.scale_attn_by_inverse_layer_idx else scale


@torch.no_grad()
def evaluate_both(
    policy: GPT2WithValueHead, reference: GPT2WithValueHead, seqs: Sequences, ref_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the responses under both models: logprobs, ref_logprobs, values, entropy and exact_kl, all (B, R).

    They are 0 outside the mask; exact_kl is KL(policy || reference) over the whole vocabulary, in nats. The reference's
    hidden states (B, R, H) are computed unless they are given.
    """
    hidden = policy.response_hidden(seqs)
    ref_hidden = reference.response_hidden(seqs) if ref_hidden is None else ref_hidden
    embedding, ref_embedding = (output_embedding(x.lm.lm_head.weight, x.dtype) for x in (policy, reference))
    chunks: list[list[Tensor]] = []
    for rows in policy.chunk(seqs):
        part = seqs.select(rows)
        real = part.real_tokens()
        found = compare_policies(
            take_tokens(hidden[rows], real).to(policy.dtype),
            embedding,
            take_tokens(ref_hidden[rows], real).to(reference.dtype),
            ref_embedding,
            take_tokens(part.responses, real),
            part.temperature,
            None if part.support is None else take_tokens(part.support, real),
        )
        chunks.append([put_tokens(x, real, part.response_mask.shape) for x in found])
    logprobs, ref_logprobs, entropy, exact_kl = (torch.cat(x) for x in zip(*chunks, strict=True))
    return logprobs, ref_logprobs, torch.where(seqs.response_mask, policy.values(hidden), 0), entropy, exact_kl


# --- sampling -------------------------------------------------------------------------------------------------------


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
) -> Sequences:
    """Sample one response per prompt, up to and including EOS, or of as many tokens as there are uniforms.

    prompt_ids and prompt_mask (B, P), left-padded; uniforms (B, max_new_tokens) in [0, 1) are all the randomness.
    """
    cpu = policy.lm.device.type == "cpu"
    if not cpu:
        prompt_ids, prompt_mask = (F.pad(x, (-x.shape[1] % PROMPT_COLUMNS, 0)) for x in (prompt_ids, prompt_mask))
    sampler = _sampler_for(policy, *prompt_ids.shape, uniforms.shape[1], eos_id, (temperature, top_k, top_p))
    sampler.begin(prompt_ids, prompt_mask, uniforms)
    for t in range(1, uniforms.shape[1]):
        if cpu or t % CHECK_EVERY == 0:
            if not sampler.alive.any():
                break
            if cpu:
                sampler.drop_finished()
        sampler.next_token()
    return sampler.sequences()


CHECK_EVERY = 8  # tokens between checks whether every row has ended: on a GPU a check waits for it
PROMPT_COLUMNS = 16  # on a GPU prompts are padded to a multiple of this, so that nearly all batches have the same shape


def _sampler_for(policy: GPT2WithValueHead, *shape: Any) -> "_Sampler":
    """A sampler for new responses; on a GPU the policy's own, with the step that it has recorded, where it fits."""
    weight = policy.lm.lm_head.weight
    key = (*shape, policy.dtype, weight.data_ptr())  # weights that were moved need another recording
    if policy.sampler is not None and policy.sampler.key == key:
        policy.sampler.renew()
        return policy.sampler
    sampler = _Sampler(policy, *shape)
    sampler.key, policy.sampler = key, None if weight.device.type == "cpu" else sampler
    return sampler


class _Cache:
    """Keys and values of every layer; new ones go to the columns named by self.columns."""

    def __init__(self, policy: GPT2WithValueHead, batch: int, width: int) -> None:
        config, device = policy.lm.config, policy.lm.device
        shape = (config.n_layer, 2, batch, config.n_head, width, config.n_embd // config.n_head)
        self.kept = torch.zeros(shape, dtype=policy.dtype, device=device)
        self.columns = torch.arange(width, device=device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, heads, n, d) and return all of this layer (B, heads, width, d)."""
        keys, values = self.kept[layer]
        keys.index_copy_(2, self.columns, k)
        values.index_copy_(2, self.columns, v)
        return keys, values


class _Sampler:
    """Unfinished responses. `step` adds a token to each; its tensors keep shape and place, and nothing in it waits.

    So CUDA can record one step and replay it, in this rollout and in the next.
    """

    def __init__(
        self,
        policy: GPT2WithValueHead,
        batch: int,
        prompt_len: int,
        width: int,
        eos_id: int,
        warp: tuple[float, int, float],
    ) -> None:
        """Set aside memory for `width` tokens after `batch` prompts of `prompt_len` tokens."""
        device = policy.lm.device
        self.policy, self.prompt_len, self.eos_id, self.warp = policy, prompt_len, eos_id, warp
        self.lm = policy.lm if policy.dtype == torch.float32 else _with_projections_in(policy.dtype, policy.lm)
        self.embedding = output_embedding(policy.lm.lm_head.weight, policy.dtype)
        self.key: tuple[Any, ...] = ()  # what a rollout must have in common with the last one
        self.replay: Callable[[], None] | None = None
        # the result, one row per prompt
        self.tokens = torch.zeros(batch, prompt_len + width, dtype=torch.long, device=device)
        self.attention_mask = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logprobs = torch.zeros(batch, width, device=device)
        shape, truncated = (batch, width, len(self.embedding)), warp[1] > 0 or warp[2] < 1
        self.support = torch.ones(shape, dtype=torch.bool, device=device) if truncated else None
        # what the next step needs, one row per unfinished response
        self.uniforms = torch.zeros(batch, width, dtype=widest_float(device), device=device)
        self.rows = torch.arange(batch, device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.visible = torch.zeros_like(self.attention_mask)
        self.newest = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.newest)  # of the newest token
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # response tokens so far
        self.cache = _Cache(policy, batch, prompt_len + width)

    def renew(self) -> None:
        """Forget the responses, and take the policy's weights as they are now; nothing moves to another place."""
        for x in (self.tokens, self.attention_mask, self.logprobs, self.t, self.cache.kept):
            x.zero_()
        self.alive.fill_(True)
        if self.support is not None:
            self.support.fill_(True)
        if self.lm is not self.policy.lm:
            for own, current in zip(self.lm.parameters(), self.policy.lm.parameters(), strict=True):
                if own is not current:
                    own.data.copy_(current.data)
            self.embedding.copy_(output_embedding(self.policy.lm.lm_head.weight, self.policy.dtype))

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> None:
        """Read the prompts and draw the first tokens."""
        n = self.prompt_len
        tokens, mask = self.tokens[:, :n], self.attention_mask[:, :n]
        for place, given in ((tokens, prompt_ids), (mask, prompt_mask), (self.uniforms, uniforms)):
            place.copy_(given.to(place.dtype), non_blocking=True)
        self.visible.copy_(self.attention_mask)
        self.positions.copy_(mask.sum(-1, keepdim=True) - 1)
        self.cache.columns = torch.arange(n, device=mask.device)
        self._draw(self._read(tokens, position_ids(mask), F.pad(visible_keys(mask), (0, uniforms.shape[1]))))

    def next_token(self) -> None:
        """A step; on CUDA the first one warms up, and all others replay a recording."""
        if self.replay is not None:
            self.replay()
            return
        self.step()
        if self.tokens.is_cuda:
            self.replay = self.recorded()

    def step(self) -> None:
        """Read the newest tokens and draw the next."""
        self.cache.columns = self.t + (self.prompt_len - 1)
        self.visible.index_fill_(1, self.cache.columns, True)
        self._draw(self._read(self.newest, self.positions, self.visible[:, None, None, :]))

    def _read(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        with self.policy.autocast():
            return transformer_forward(self.lm, tokens, positions, visible, tokens.shape[1] - 1, self.cache)[:, 0]

    def _draw(self, hidden: Tensor) -> None:
        logits = warp_logits(padded_logits(hidden.to(self.policy.dtype), self.embedding), *self.warp)
        token, logprob = sample_tokens(logits, self.uniforms.index_select(1, self.t).squeeze(1))
        # NaN logits must give a token that exists: the update rejects them when its loss is not finite
        token = token.clamp(max=len(self.embedding) - 1)
        column = self.t + self.prompt_len
        self.tokens[self.rows, column] = torch.where(self.alive, token, 0)
        self.attention_mask[self.rows, column] = self.alive
        self.logprobs[self.rows, self.t] = torch.where(self.alive, logprob, 0)
        if self.support is not None:
            possible = logits[:, : len(self.embedding)].isfinite()
            self.support[self.rows, self.t] = possible | ~self.alive[:, None]
        self.alive.logical_and_(token != self.eos_id)
        self.newest.copy_(token[:, None])
        self.positions += 1
        self.t += 1

    def drop_finished(self) -> None:
        """Drop the responses that have ended, once fewer than three in four are left."""
        if 4 * int(self.alive.sum()) < 3 * len(self.alive):
            unfinished = self.alive.nonzero().squeeze(1)
            for name in ("rows", "alive", "visible", "positions", "newest", "uniforms"):
                setattr(self, name, getattr(self, name)[unfinished])
            self.cache.kept = self.cache.kept[:, :, unfinished]

    def recorded(self) -> Callable[[], None]:
        """A function that replays one step as a single CUDA graph; recording it draws nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def sequences(self) -> Sequences:
        """The sampled sequences, cut to the longest response; copies, because the next rollout writes here again."""
        lengths = self.attention_mask[:, self.prompt_len :].sum(1).cpu()
        width = int(lengths.max()) if len(lengths) else 1  # a rank may have no rows
        mask = self.attention_mask[:, : self.prompt_len + width].clone()
        return Sequences(
            self.tokens[:, : mask.shape[1]].clone(),
            mask,
            mask[:, self.prompt_len :],
            self.logprobs[:, :width].clone(),
            self.warp[0],
            None if self.support is None else self.support[:, :width].clone(),
            lengths,
        )


def _with_projections_in(dtype: torch.dtype, lm: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same model with its projections stored in `dtype`; autocast would cast them again at every token."""
    projections = [module for module in lm.modules() if isinstance(module, Conv1D)]
    own = {id(weight) for module in projections for weight in module.parameters()}
    copied = copy.deepcopy(lm, {id(weight): weight for weight in lm.parameters() if id(weight) not in own})
    for module in copied.modules():
        if isinstance(module, Conv1D):
            module.to(dtype)
    return copied
