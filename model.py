"""The policy: GPT-2 with a scalar value head. It samples responses, scores them, and is saved and loaded.

Positions come from masks here and nowhere else, and this is the only place that lines up logits and values with
response tokens. The Hugging Face model owns the weights; dropout is off for good.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from config import UserError
from utils import (
    compare_policies,
    decode,
    loading,
    output_columns,
    position_ids,
    refuse_missing,
    sample_tokens,
    token_logprobs,
    warp_logits,
)  # fmt: skip


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

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The prompts as text."""
        return decode(tokenizer, self.tokens[:, : self.prompt_len], self.attention_mask[:, : self.prompt_len])

    def texts(self, tokenizer: PreTrainedTokenizerBase, with_prompt: bool = False) -> list[str]:
        """The responses as text, behind their prompts if wanted, without EOS."""
        if with_prompt:
            return decode(tokenizer, self.tokens, self.attention_mask)
        return decode(tokenizer, self.responses, self.response_mask)

    def select(self, rows: Tensor) -> "Sequences":
        """The same for some rows only."""
        return Sequences(
            self.tokens[rows], self.attention_mask[rows], self.response_mask[rows], self.logprobs[rows],
            self.temperature, None if self.support is None else self.support[rows],
        )  # fmt: skip


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
        """Where matrix products run in self.dtype; softmax, losses and the optimiser never do."""
        half = self.dtype != torch.float32
        return torch.autocast(self.lm.device.type, self.dtype) if half else nullcontext()

    def response_hidden(self, seqs: Sequences) -> Tensor:
        """The hidden states (B, R, H) in which the response tokens were chosen: those one column before them."""
        mask = seqs.attention_mask[:, :-1]
        # Causal attention never sees padding on the right; only padding on the left needs a mask
        padded = not bool(mask[:, 0].all())
        with self.autocast():
            states = self.lm.transformer(
                input_ids=seqs.tokens[:, :-1],
                attention_mask=mask.long() if padded else None,
                position_ids=position_ids(mask),
                use_cache=False,
            ).last_hidden_state
        return states[:, seqs.prompt_len - 1 :]

    def values(self, hidden: Tensor) -> Tensor:
        """What the critic expects (B, R), in float32, before each token is chosen."""
        return F.linear(hidden.float(), self.value_head.weight, self.value_head.bias).squeeze(-1)

    def evaluate_responses(self, seqs: Sequences, with_entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies (B, R) of the response tokens, differentiable, in float32."""
        hidden = self.response_hidden(seqs)
        logprobs, entropy = token_logprobs(
            hidden.flatten(0, 1).to(self.dtype), self.lm.lm_head.weight, seqs.responses.flatten(), seqs.temperature,
            None if seqs.support is None else seqs.support.flatten(0, 1), with_entropy=with_entropy,
        )  # fmt: skip
        return logprobs.view_as(seqs.logprobs), self.values(hidden), entropy.view_as(seqs.logprobs)

    @classmethod
    def from_pretrained(
        cls, name: str, setting: str = "policy_name", dtype: torch.dtype = torch.float32
    ) -> "GPT2WithValueHead":
        """A GPT-2 from the hub or a folder, with a fresh critic (raises UserError)."""
        return cls(load_gpt2(name, setting), dtype)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "GPT2WithValueHead":
        """Policy and critic as save_pretrained left them (raises UserError)."""
        model = cls.from_pretrained(str(folder / "policy_lm"), "ckpt_dir", dtype)
        with loading("ckpt_dir", str(folder), "value head"):
            model.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))
        return model

    def save_pretrained(self, folder: Path) -> None:
        """Write folder/policy_lm, a plain Hugging Face model, and folder/value_head.safetensors."""
        self.lm.save_pretrained(folder / "policy_lm")
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")


def load_gpt2(name: str, setting: str) -> GPT2LMHeadModel:
    """A GPT-2 language model in float32 from the hub or a folder, complete or not at all (raises UserError)."""
    with loading(setting, name, "GPT-2"):
        kind = GPT2Config.get_config_dict(name)[0].get("model_type")
        if kind != "gpt2":
            raise UserError(f"{setting}={name} is a {kind} model: choose a GPT-2")
        lm, info = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    refuse_missing(setting, name, info, "GPT-2 language model")
    if lm.config.activation_function == "gelu_new":  # the same function in one kernel instead of eight
        for block in lm.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return lm


def load_reference(name: str, setting: str = "ref_name", dtype: torch.dtype = torch.float32) -> GPT2WithValueHead:
    """The frozen anchor: the same class as the policy, without gradients."""
    return GPT2WithValueHead(load_gpt2(name, setting), dtype).requires_grad_(False)


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


@torch.no_grad()
def score_responses(
    policy: GPT2WithValueHead, reference: GPT2WithValueHead, seqs: Sequences
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What both models think of the responses: logprobs, ref_logprobs, values, entropy and exact_kl, all (B, R).

    Log-probabilities and values at real tokens, 0 elsewhere; exact_kl is KL(policy || reference) over the vocabulary.
    """
    hidden, ref_hidden = policy.response_hidden(seqs), reference.response_hidden(seqs)
    scored = compare_policies(
        hidden.flatten(0, 1).to(policy.dtype), policy.lm.lm_head.weight,
        ref_hidden.flatten(0, 1).to(reference.dtype), reference.lm.lm_head.weight,
        seqs.responses.flatten(), seqs.temperature, None if seqs.support is None else seqs.support.flatten(0, 1),
    )  # fmt: skip
    logprobs, ref_logprobs, entropy, exact_kl = (x.view_as(seqs.logprobs) for x in scored)
    everything = (logprobs, ref_logprobs, policy.values(hidden), entropy, exact_kl)
    return tuple(torch.where(seqs.response_mask, x, 0) for x in everything)  # type: ignore[return-value]


# --- sampling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    policy: GPT2WithValueHead, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, *, eos_id: int,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
) -> Sequences:  # fmt: skip
    """Answer each prompt once: sample until EOS, which belongs to the response, or until the uniforms are used up.

    prompt_ids and prompt_mask (B, P), left-padded; uniforms (B, max_new_tokens) in [0, 1) are all the randomness.
    """
    (batch, prompt_len), width = prompt_ids.shape, uniforms.shape[1]
    tokens = F.pad(prompt_ids, (0, width))
    response_mask = torch.zeros(batch, width, dtype=torch.bool, device=tokens.device)
    logprobs = torch.zeros(batch, width, device=tokens.device)
    truncated = top_k > 0 or top_p < 1
    support: list[Tensor] = []
    alive = torch.ones(batch, dtype=torch.bool, device=tokens.device)

    decoder = _Decoder(policy, prompt_mask, width)
    logits = decoder.read(prompt_ids, position_ids(prompt_mask))
    position = prompt_mask.sum(-1, keepdim=True)
    for t in range(width):
        logits = warp_logits(logits, temperature, top_k, top_p)
        token = sample_tokens(logits, uniforms[:, t])
        tokens[:, prompt_len + t] = torch.where(alive, token, 0)
        logprobs[:, t] = torch.where(alive, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1), 0)
        response_mask[:, t] = alive
        if truncated:
            support.append(logits.isfinite() | ~alive[:, None])
        alive = alive & (token != eos_id)
        if t + 1 == width or not alive.any():
            break
        logits = decoder.read(token[:, None], position + t)

    stop = t + 1
    return Sequences(
        tokens[:, : prompt_len + stop], torch.cat([prompt_mask, response_mask[:, :stop]], 1), response_mask[:, :stop],
        logprobs[:, :stop], temperature, torch.stack(support, 1) if truncated else None,
    )  # fmt: skip


class _Decoder:
    """GPT-2's forward pass over a key-value cache: read some tokens, get the logits that follow the last of them.

    It runs on the library's own modules, one line per step of the paper's figure, without the library's per-token
    bookkeeping. That it agrees with the library is a test, and is checked on the real model whenever training starts.
    """

    def __init__(self, policy: GPT2WithValueHead, prompt_mask: Tensor, width: int) -> None:
        self.policy, self.lm, self.used = policy, policy.lm, 0
        (batch, prompt_len), config = prompt_mask.shape, policy.lm.config
        shape = (2, batch, config.n_head, prompt_len + width, config.n_embd // config.n_head)
        self.columns = output_columns(policy.lm.lm_head.weight, policy.dtype)
        self.cache = [torch.zeros(shape, dtype=policy.dtype, device=prompt_mask.device) for _ in self.lm.transformer.h]
        self.key_mask = F.pad(prompt_mask, (0, width), value=True)[:, None, None, :]  # (B, 1, 1, T)

    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) after tokens (B, n) at positions (B, n), whose keys and values join the cache."""
        with self.policy.autocast():
            return self._read(tokens, positions)

    def _read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        gpt2: GPT2Model = self.lm.transformer
        (batch, n), heads, start = tokens.shape, self.lm.config.n_head, self.used
        self.used = stop = start + n
        visible = self.key_mask[..., :stop]
        if n > 1:  # a padded place may see itself, because attention to nothing is not a number
            square = torch.ones(n, stop, dtype=torch.bool, device=tokens.device)
            visible = visible & square.tril(start) | square.tril(start).triu(start)
        x = gpt2.wte(tokens) + gpt2.wpe(positions)
        for layer, (block, (keys, values)) in enumerate(zip(gpt2.h, self.cache, strict=True)):
            qkv = block.attn.c_attn(block.ln_1(x)).view(batch, n, 3, heads, -1)
            q, keys[:, :, start:stop], values[:, :, start:stop] = qkv.permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(
                q, keys[:, :, :stop], values[:, :, :stop], attn_mask=visible, scale=_attention_scale(self.lm, layer)
            )
            x = x + block.attn.c_proj(attended.transpose(1, 2).reshape(batch, n, -1))
            x = x + block.mlp(block.ln_2(x))
        return gpt2.ln_f(x[:, -1]).to(self.columns.dtype) @ self.columns


def _attention_scale(lm: GPT2LMHeadModel, layer: int) -> float:
    scale = 1 / math.sqrt(lm.config.n_embd // lm.config.n_head) if lm.config.scale_attn_weights else 1.0
    return scale / (layer + 1) if lm.config.scale_attn_by_inverse_layer_idx else scale
