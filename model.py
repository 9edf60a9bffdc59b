"""The policy: GPT-2 with a scalar value head. It samples responses, evaluates them, and is saved and loaded.

Only this file turns masks into positions, and only this file aligns logits and values with response tokens. The
Hugging Face model owns the weights; dropout is always off.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from config import UserError

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.pytorch_utils import Conv1D

import utils
from runtime.device import widest_float
from runtime.hub import DEFAULT_REVISION, loading, refuse_missing_weights
from utils import (
    compare_policies,
    map_tensors,
    output_embedding,
    padded_logits,
    position_ids,
    sample_tokens,
    token_logprobs,
    warp_logits,
)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with sampled responses, exactly as the sampler left them.

    tokens (B, T) int64 and attention_mask (B, T) bool; response_mask (B, R) is True up to and including the first EOS;
    logprobs (B, R) are the sampler's own; support (B, R, V) bool marks what top-k or top-p let through (None: all).
    """

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    temperature: float = 1.0
    support: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.attention_mask.shape
        assert self.response_mask.shape == self.logprobs.shape
        assert self.attention_mask.dtype == self.response_mask.dtype == torch.bool

    @property
    def prompt_len(self) -> int:
        """P, the width of the left-padded prompts."""
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """The response tokens (B, R)."""
        return self.tokens[:, self.prompt_len :]

    def prompt_texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The prompts as text."""
        return _decode(tokenizer, self.tokens[:, : self.prompt_len], self.attention_mask[:, : self.prompt_len])

    def texts(self, tokenizer: PreTrainedTokenizerBase, with_prompt: bool = False) -> list[str]:
        """The responses as text without EOS, after their prompts if wanted."""
        if with_prompt:
            return _decode(tokenizer, self.tokens, self.attention_mask)
        return _decode(tokenizer, self.responses, self.response_mask)

    def first(self, n: int) -> "Sequences":
        """The same sequences with the first n response tokens only."""
        end = self.prompt_len + n
        return replace(
            self, tokens=self.tokens[:, :end], attention_mask=self.attention_mask[:, :end],
            response_mask=self.response_mask[:, :n], logprobs=self.logprobs[:, :n],
            support=None if self.support is None else self.support[:, :n],
        )  # fmt: skip

    def select(self, rows: Tensor | slice) -> "Sequences":
        """Some of the rows."""
        return map_tensors(lambda x: x[rows], self)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, mask: Tensor) -> list[str]:
    """Texts of the real tokens of each row; tokens and mask (B, n); special tokens such as EOS are left out."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class GPT2WithValueHead(nn.Module):
    """GPT-2 and a linear value head on its last hidden state, which starts at exactly zero."""

    def __init__(self, lm: GPT2LMHeadModel, dtype: torch.dtype = torch.float32) -> None:
        """Weights stay float32; dtype is that of matrix products."""
        super().__init__()
        self.lm, self.dtype = lm, dtype
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

    def values(self, hidden: Tensor) -> Tensor:
        """The critic's values (B, R) before each token is chosen, in float32."""
        return F.linear(hidden.float(), self.value_head.weight, self.value_head.bias).squeeze(-1)

    def evaluate_responses(self, seqs: Sequences, with_entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies (B, R) of the response tokens, differentiable, in float32."""
        hidden = self.response_hidden(seqs)
        parts = [self.evaluate_hidden(hidden[rows], seqs.select(rows), with_entropy) for rows in self.chunk(seqs)]
        logprobs, values, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        return logprobs, values, entropy

    def evaluate_hidden(
        self, hidden: Tensor, seqs: Sequences, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the hidden states (B, R, H); log-probabilities and entropies are 0 outside the mask."""
        real = seqs.response_mask
        logprobs, entropy = token_logprobs(
            hidden[real].to(self.dtype), self.lm.lm_head.weight, seqs.responses[real], seqs.temperature,
            None if seqs.support is None else seqs.support[real], with_entropy,
        )  # fmt: skip
        zeros = torch.zeros_like(seqs.logprobs)
        return zeros.masked_scatter(real, logprobs), self.values(hidden), zeros.masked_scatter(real, entropy)

    def chunk(self, seqs: Sequences) -> list[slice]:
        """Slices of the rows whose logits, utils.CHUNK_FLOATS numbers at most, are in memory at a time."""
        rows, width = seqs.response_mask.shape
        size = max(1, utils.CHUNK_FLOATS // self.lm.config.vocab_size // width)
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


def load_gpt2(name: str, setting: str, revision: str | None = None) -> GPT2LMHeadModel:
    """Load a complete GPT-2 in float32 from the hub or a folder (raises UserError)."""
    with loading(setting, name, "GPT-2"):
        kind = GPT2Config.get_config_dict(name, revision=revision or DEFAULT_REVISION)[0].get("model_type")
        if kind != "gpt2":
            raise UserError(f"{setting}={name} is a {kind} model: choose a GPT-2")
        lm, info = GPT2LMHeadModel.from_pretrained(
            name, revision=revision or DEFAULT_REVISION, dtype=torch.float32, output_loading_info=True
        )
    refuse_missing_weights(setting, name, info, "GPT-2 language model")
    if lm.config.activation_function == "gelu_new":  # the same function in one kernel instead of eight
        for block in lm.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return lm


def load_reference(
    name: str, setting: str = "ref_name", dtype: torch.dtype = torch.float32, revision: str | None = None
) -> GPT2WithValueHead:
    """Load the frozen reference: the same class as the policy, without gradients."""
    return GPT2WithValueHead(load_gpt2(name, setting, revision), dtype).requires_grad_(False)


def check_fit(
    policy: GPT2WithValueHead, reference: GPT2WithValueHead, tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    """Refuse models that disagree on the vocabulary, or a context too short for `length` tokens (UserError)."""
    sizes = policy.lm.config.vocab_size, reference.lm.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"policy and reference have different vocabularies ({sizes[0]} and {sizes[1]} tokens): change ref_name"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer of policy_name has no EOS token: save one that has")
    if len(tokenizer) > sizes[0]:
        raise UserError(
            f"the tokenizer of policy_name has {len(tokenizer)} tokens, its model only {sizes[0]}: save them together"
        )
    context = min(policy.lm.config.n_positions, reference.lm.config.n_positions)
    if length > context:
        raise UserError(
            f"max_prompt_len + max_new_tokens = {length} is longer than the model's context of {context}: lower one"
        )


# --- GPT-2's forward pass -------------------------------------------------------------------------------------------


def transformer_forward(
    lm: GPT2LMHeadModel, tokens: Tensor, positions: Tensor, visible: Tensor, first: int = 0,
    cache: "_Cache | None" = None,
) -> Tensor:  # fmt: skip
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


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of queries (B, heads, n, d) to the keys and values (B, heads, S, d) that are visible (B, 1, n, S) bool.

    In bfloat16 on the CPU the library's kernel takes 3 times as long as the formula, and 5 times for a single query.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return softmax_attention(q, k, v, visible, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The same written out; the softmax is taken in float32."""
    scores = (q * scale) @ k.mT
    scores += torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -math.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


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
    policy: GPT2WithValueHead, reference: GPT2WithValueHead, seqs: Sequences
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Evaluate the responses under both models: logprobs, ref_logprobs, values, entropy and exact_kl, all (B, R).

    They are 0 outside the mask; exact_kl is KL(policy || reference) over the whole vocabulary, in nats.
    """
    hidden, ref_hidden = policy.response_hidden(seqs), reference.response_hidden(seqs)
    chunks: list[list[Tensor]] = []
    for rows in policy.chunk(seqs):
        part, real = seqs.select(rows), seqs.response_mask[rows]
        found = compare_policies(
            hidden[rows][real].to(policy.dtype), policy.lm.lm_head.weight,
            ref_hidden[rows][real].to(reference.dtype), reference.lm.lm_head.weight,
            part.responses[real], part.temperature, None if part.support is None else part.support[real],
        )  # fmt: skip
        chunks.append([torch.zeros_like(part.logprobs).masked_scatter(real, x) for x in found])
    logprobs, ref_logprobs, entropy, exact_kl = (torch.cat(x) for x in zip(*chunks, strict=True))
    return logprobs, ref_logprobs, torch.where(seqs.response_mask, policy.values(hidden), 0), entropy, exact_kl


# --- sampling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_responses(
    policy: GPT2WithValueHead, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, *, eos_id: int,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
) -> Sequences:  # fmt: skip
    """Sample one response per prompt, up to and including EOS, or of as many tokens as there are uniforms.

    prompt_ids and prompt_mask (B, P), left-padded; uniforms (B, max_new_tokens) in [0, 1) are all the randomness.
    """
    device = policy.lm.device
    uniforms = uniforms.to(widest_float(device))
    prompt_ids, prompt_mask, uniforms = (x.to(device) for x in (prompt_ids, prompt_mask, uniforms))
    sampler = _Sampler(policy, prompt_ids, prompt_mask, uniforms, eos_id, (temperature, top_k, top_p))
    cuda, step = device.type == "cuda", sampler.step
    for t in range(1, uniforms.shape[1]):
        if not cuda or t % CHECK_EVERY == 0:
            if not sampler.alive.any():
                break
            if not cuda:
                sampler.drop_finished()
        if cuda and t == 2:  # the first step has warmed everything up
            step = sampler.recorded()
        step()
    return sampler.sequences()


CHECK_EVERY = 8  # tokens between checks whether every row has ended: on CUDA a check waits for the device


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
    """Unfinished responses. `step` adds one token to each, using only operations on tensors of fixed shape.

    Nothing in it waits for the device, so CUDA can record one step and replay it.
    """

    def __init__(
        self, policy: GPT2WithValueHead, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, eos_id: int,
        warp: tuple[float, int, float],
    ) -> None:  # fmt: skip
        """Read the prompts and draw the first tokens."""
        (batch, self.prompt_len), width, device = prompt_ids.shape, uniforms.shape[1], prompt_ids.device
        self.policy, self.uniforms, self.eos_id, self.warp = policy, uniforms, eos_id, warp
        self.lm = policy.lm if policy.dtype == torch.float32 else _with_projections_in(policy.dtype, policy.lm)
        self.embedding = output_embedding(policy.lm.lm_head.weight, policy.dtype)
        # the result, one row per prompt
        self.tokens = F.pad(prompt_ids, (0, width))
        self.attention_mask = F.pad(prompt_mask, (0, width))
        self.logprobs = torch.zeros(batch, width, device=device)
        truncated = warp[1] > 0 or warp[2] < 1
        shape = (batch, width, len(self.embedding))
        self.support = torch.ones(shape, dtype=torch.bool, device=device) if truncated else None
        # what the next step needs, one row per unfinished response
        self.rows = torch.arange(batch, device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.visible = F.pad(prompt_mask, (0, width))
        self.positions = prompt_mask.sum(-1, keepdim=True) - 1  # of the newest token
        self.newest = prompt_ids[:, -1:].clone()
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # response tokens so far
        self.cache = _Cache(policy, batch, self.prompt_len + width)

        self.cache.columns = torch.arange(self.prompt_len, device=device)
        visible = F.pad(visible_keys(prompt_mask), (0, width))
        self._draw(self._read(prompt_ids, position_ids(prompt_mask), visible))

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
        """The sampled sequences, cut to the longest response."""
        response_mask = self.attention_mask[:, self.prompt_len :]
        width = int(response_mask.any(0).sum())
        total = self.prompt_len + width
        return Sequences(
            self.tokens[:, :total], self.attention_mask[:, :total], response_mask[:, :width],
            self.logprobs[:, :width], self.warp[0], None if self.support is None else self.support[:, :width],
        )  # fmt: skip


def _with_projections_in(dtype: torch.dtype, lm: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same model with its projections stored in `dtype`; autocast would cast them again at every token."""
    projections = [module for module in lm.modules() if isinstance(module, Conv1D)]
    own = {id(weight) for module in projections for weight in module.parameters()}
    copied = copy.deepcopy(lm, {id(weight): weight for weight in lm.parameters() if id(weight) not in own})
    for module in copied.modules():
        if isinstance(module, Conv1D):
            module.to(dtype)
    return copied
