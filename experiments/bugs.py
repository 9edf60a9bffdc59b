"""Classic bugs of PPO on language models, each planted from outside by replacing one function.

Nothing in the product knows of them: `with planted(bug):` puts a wrong function wherever the right one was imported,
and takes it out again. experiments/pitfalls.py trains with them.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import TrainConfig

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from model import GPT2WithValueHead, Sequences, evaluate_both, sample_responses, transformer_forward, visible_keys
from ppo import Batch, Models, Rollout, accumulate_gradients, collect_rollout, ppo_loss
from reward import find_label
from training.checkpoints import load_checkpoint
from training.parts import load_models
from utils import compute_gae, position_ids, shape_rewards, whiten

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Bug:
    """A bug: what is wrong, which function it replaces by what, and what notices it.

    make returns the wrong function, with fresh state where it needs any. fact is the one of the self-audit that
    refuses to train, None where it does not notice; test is a test that fails.
    """

    name: str
    wrong: str
    right: Any
    make: Callable[[], Any]
    fact: str | None
    test: str
    shipped: str = ""
    flags: tuple[str, ...] = ()  # settings that the bug needs to show
    resumed: bool = False  # it shows only in a run that was stopped half-way and resumed


@contextmanager
def planted(bug: Bug | None) -> Iterator[None]:
    """A context in which the product has the bug."""
    if bug is None:
        yield
        return
    with replaced(bug.right, bug.make()):
        yield


@contextmanager
def replaced(right: Any, wrong: Any) -> Iterator[None]:
    """A context in which `wrong` stands wherever a module or class of this project has the function `right`."""
    places = [(owner, name) for owner in _owners() for name, value in list(vars(owner).items()) if value is right]
    assert places, f"nothing uses {right}"
    for owner, name in places:
        setattr(owner, name, wrong)
    try:
        yield
    finally:
        for owner, name in places:
            setattr(owner, name, right)


def _owners() -> list[Any]:
    """The modules of this project that are loaded, but this one, and their classes."""
    modules = []
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if name != __name__ and ROOT in file.parents and "site-packages" not in file.parts:
            modules.append(module)
    names = {module.__name__ for module in modules}
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [*modules, *(kind for kind in classes if kind.__module__ in names)]


# --- what is sampled and which tokens count -------------------------------------------------------------------------


def _sample_colder(*args: Any, **named: Any) -> Sequences:
    return replace(sample_responses(*args, **{**named, "temperature": 0.7}), temperature=1.0)


def _sample_top_p(*args: Any, **named: Any) -> Sequences:
    return replace(sample_responses(*args, **{**named, "top_p": 0.9}), support=None)


def _without_eos(*args: Any, **named: Any) -> Sequences:
    seqs = sample_responses(*args, **named)
    ends = (seqs.responses == named["eos_id"]) & (seqs.response_mask.sum(1, keepdim=True) > 1)
    mask = seqs.response_mask & ~ends
    return replace(seqs, response_mask=mask, lengths=mask.sum(1))


def _with_padding(*args: Any, **named: Any) -> Sequences:
    seqs = sample_responses(*args, **named)
    responses = seqs.responses.masked_fill(~seqs.response_mask, named["eos_id"])
    tokens = torch.cat([seqs.tokens[:, : seqs.prompt_len], responses], 1)
    mask = torch.ones_like(seqs.response_mask)
    return replace(seqs, tokens=tokens, response_mask=mask, lengths=mask.sum(1))


def _with_prompt(
    models: Models, prompts: tuple[Tensor, Tensor], uniforms: Tensor, cfg: TrainConfig, kl_coef: float
) -> Rollout:
    """The end of the prompt, as many tokens as every prompt has, counts as part of the response."""
    rollout = collect_rollout(models, prompts, uniforms, cfg, kl_coef)
    seqs = rollout.sequences
    extra = int(seqs.attention_mask[:, : seqs.prompt_len].sum(1).min()) - 1
    wide = replace(
        seqs,
        response_mask=F.pad(seqs.response_mask, (extra, 0), value=True),
        lengths=seqs.lengths + extra,
        logprobs=F.pad(seqs.logprobs, (extra, 0)),
        support=None if seqs.support is None else F.pad(seqs.support, (0, 0, extra, 0), value=True),
    )
    logprobs, ref_logprobs, values, entropy, exact_kl = evaluate_both(models.policy, models.reference, wide)
    return replace(
        rollout,
        sequences=wide,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        entropy=entropy,
        exact_kl=exact_kl,
        partial_scores=F.pad(rollout.partial_scores, (extra, 0), value=math.nan),
    )


# --- how it is evaluated --------------------------------------------------------------------------------------------


def _read_one_late(self: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    mask = seqs.attention_mask
    with self.autocast():
        return transformer_forward(self.lm, seqs.tokens, position_ids(mask), visible_keys(mask), seqs.prompt_len)


def _count_padding(self: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    mask = seqs.attention_mask[:, :-1]
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    with self.autocast():
        return transformer_forward(self.lm, seqs.tokens[:, :-1], columns, visible_keys(mask), seqs.prompt_len - 1)


def _with_dropout(self: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    if not self.value_head.weight.requires_grad:  # the reference
        return _response_hidden(self, seqs)
    layers = [layer for block in self.lm.transformer.h for layer in (block.attn.c_proj, block.mlp)]
    hooks = [layer.register_forward_hook(lambda _, __, out: torch.dropout(out, 0.1, True)) for layer in layers]
    try:
        return _response_hidden(self, seqs)
    finally:
        for hook in hooks:
            hook.remove()


def _stale_logprobs() -> Callable[..., Rollout]:
    old: list[GPT2WithValueHead] = []

    def collect(models: Models, *rest: Any) -> Rollout:
        rollout = collect_rollout(models, *rest)
        old.append(_copy(models.policy))
        acting = old.pop(0) if len(old) > 1 else old[0]
        return replace(rollout, logprobs=evaluate_both(acting, models.reference, rollout.sequences)[0])

    return collect


def _copy(policy: GPT2WithValueHead) -> GPT2WithValueHead:
    """A copy without the sampler, because what CUDA has recorded cannot be copied."""
    copied: GPT2WithValueHead = copy.deepcopy(policy, {id(policy.sampler): None})
    return copied


_response_hidden = GPT2WithValueHead.response_hidden


# --- score, KL and reference ----------------------------------------------------------------------------------------


def _paid_in_the_last_column(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    rewards, kl = shape_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef)
    rewards[:, -1] += scores
    return rewards, kl


def _distance_is_paid(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    return shape_rewards(scores, logprobs, ref_logprobs, mask, -kl_coef)


@property  # type: ignore[misc]
def _k3_upside_down(self: Rollout) -> Tensor:
    log_ratio = torch.where(self.mask, self.logprobs - self.ref_logprobs, 0)
    return log_ratio.exp() - 1 - log_ratio


def _policy_as_reference(*args: Any, **named: Any) -> Models:
    models = load_models(*args, **named)
    return replace(models, reference=models.policy)


def _reference_follows() -> Callable[..., Rollout]:
    last: dict[str, Tensor] = {}

    def collect(models: Models, *rest: Any) -> Rollout:
        if last:
            models.reference.load_state_dict(last)
        last.update(copy.deepcopy(models.policy.state_dict()))
        return collect_rollout(models, *rest)

    return collect


def _next_label(config: Any, target_label: str, model: str) -> int:
    return (find_label(config, target_label, model) + 1) % int(config.num_labels)


# --- the update -----------------------------------------------------------------------------------------------------


def _whiten_everything(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    return whiten(x, torch.ones_like(mask), eps)


def _whiten_again(policy: GPT2WithValueHead, minibatch: Batch, *rest: Any) -> Any:
    own = whiten(minibatch.advantages, minibatch.sequences.response_mask)
    return accumulate_gradients(policy, replace(minibatch, advantages=own), *rest)


def _whitened_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    advantages, _ = compute_gae(rewards, values, mask, gamma, gae_lambda)
    return advantages, torch.where(mask, whiten(advantages, mask) + values, 0)


def _clip_nothing(parameters: Any, max_norm: float) -> Tensor:
    return clip_grad_norm_(parameters, math.inf)


def _mean_of_means(
    new_logprobs: Tensor, new_values: Tensor, entropy: Tensor, batch: Batch, cfg: TrainConfig, token_count: Tensor | int
) -> tuple[Tensor, dict[str, Tensor]]:
    own = batch.sequences.response_mask.sum() * cfg.minibatch_size / len(batch)
    return ppo_loss(new_logprobs, new_values, entropy, batch, cfg, own)


def _forgetful(*args: Any) -> dict[str, Any]:
    counters = load_checkpoint(*args)
    optimizer = args[2]
    optimizer.state.clear()
    return {name: value for name, value in counters.items() if name != "kl_coef"}


# --- the list -------------------------------------------------------------------------------------------------------

SAME_DISTRIBUTION = "the distribution sampled from is the one scored"
EOS = "EOS is the last action, and trained"

BUGS = [
    Bug(
        "shift",
        "A token's log-probability is read from the logits that follow it.",
        GPT2WithValueHead.response_hidden,
        lambda: _read_one_late,
        "a token's log-probability is the library's own cross-entropy",
        "tests/test_model.py::test_evaluate_responses_equals_the_library_loss",
        shipped="the project that this one replaces",
    ),
    Bug(
        "prompt_trained",
        "Tokens of the prompt are trained on, as if the policy had written them.",
        collect_rollout,
        lambda: _with_prompt,
        None,
        "tests/test_train.py::test_every_step_learns_from_what_the_policy_has_just_written",
        shipped="the project that this one replaces; trlX in its logged KL",
    ),
    Bug(
        "positions",
        "Scoring counts padding on the left in the positions; sampling does not.",
        GPT2WithValueHead.response_hidden,
        lambda: _count_padding,
        "padding changes nothing",
        "tests/test_model.py::test_evaluate_responses_is_unmoved_by_padding",
        shipped="reported in TRL #469 and #6800, OpenRLHF #217, trlX PR #509",
    ),
    Bug(
        "eos_untrained",
        "The response mask leaves EOS out, because it has the id of padding.",
        sample_responses,
        lambda: _without_eos,
        EOS,
        "tests/test_model.py::test_generate_returns_consistent_masks",
        shipped="trlX on GPT-2; reported in TRL #3750, #1893, #2387",
    ),
    Bug(
        "padding_trained",
        "The padding after EOS counts as part of the response.",
        sample_responses,
        lambda: _with_padding,
        EOS,
        "tests/test_model.py::test_generate_returns_consistent_masks",
        shipped="TRL, in its statistics",
    ),
    Bug(
        "score_place",
        "The score is paid in the last column, which is padding where a response ended earlier.",
        shape_rewards,
        lambda: _paid_in_the_last_column,
        "the score lands on the last real token",
        "tests/test_utils.py::test_shape_rewards_of_hand_built_rows",
        shipped="TRL, on the token after EOS",
    ),
    Bug(
        "dropout",
        "Dropout of 10 % is on while the policy is scored and trained.",
        GPT2WithValueHead.response_hidden,
        lambda: _with_dropout,
        "two forward passes agree (no dropout)",
        "tests/test_ppo.py::test_ratio_is_1_before_the_first_step",
        shipped="OpenRLHF on GPT-2",
    ),
    Bug(
        "temperature",
        "Responses are sampled at temperature 0.7 and scored at 1.",
        sample_responses,
        lambda: _sample_colder,
        SAME_DISTRIBUTION,
        "tests/test_model.py::test_generate_equals_a_sampler_without_cache",
        shipped="trlX",
    ),
    Bug(
        "top_p",
        "Responses are sampled with top-p 0.9 and scored without.",
        sample_responses,
        lambda: _sample_top_p,
        SAME_DISTRIBUTION,
        "tests/test_model.py::test_generate_equals_a_sampler_without_cache",
        shipped="the project that this one replaces; negative KL in TRL #925, #417, #256, #615, #1161, MedicalGPT #374",
    ),
    Bug(
        "kl_sign",
        "The KL term of the reward has the wrong sign, so that distance from the reference is paid.",
        shape_rewards,
        lambda: _distance_is_paid,
        None,
        "tests/test_utils.py::test_shape_rewards_of_hand_built_rows",
    ),
    Bug(
        "kl_logged",
        "The KL that is logged is the k3 estimate with the ratio upside down; the penalty is right.",
        Rollout.kl,
        lambda: _k3_upside_down,
        None,
        "tests/test_ppo.py::test_rollout_metrics_equal_their_definitions",
        shipped="trlX",
    ),
    Bug(
        "reference_is_policy",
        "The reference is the policy itself and not a copy, so the KL is always 0.",
        load_models,
        lambda: _policy_as_reference,
        "the reference and the reward are frozen",
        "tests/test_train.py::test_train_moves_the_policy_and_neither_reference_nor_reward",
    ),
    Bug(
        "reference_follows",
        "The reference is not frozen: it is the policy of the step before.",
        collect_rollout,
        _reference_follows,
        None,
        "tests/test_train.py::test_train_moves_the_policy_and_neither_reference_nor_reward",
    ),
    Bug(
        "label_swapped",
        "The label of the reward is found by a wrong index, so the opposite is rewarded.",
        find_label,
        lambda: _next_label,
        None,
        "tests/test_reward.py::test_score_equals_the_library",
    ),
    Bug(
        "whiten_padding",
        "Advantages are whitened over padding as well.",
        whiten,
        lambda: _whiten_everything,
        None,
        "tests/test_utils.py::test_whiten_gives_mean_0_and_std_1_over_the_mask",
        shipped="trlX; the project that this one replaces",
    ),
    Bug(
        "whiten_minibatch",
        "Advantages are whitened in each minibatch and not once over the batch.",
        accumulate_gradients,
        lambda: _whiten_again,
        None,
        "tests/test_ppo.py::test_advantages_are_whitened_once_over_the_whole_rollout",
        shipped="OpenAI's lm-human-preferences, RL4LMs, trlX",
    ),
    Bug(
        "whitened_returns",
        "The critic's targets are computed from whitened advantages.",
        compute_gae,
        lambda: _whitened_returns,
        None,
        "tests/test_utils.py::test_compute_gae_at_lambda_1_returns_the_reward_to_go",
    ),
    Bug(
        "stale_logprobs",
        "The ratio is taken against the policy of one step ago.",
        collect_rollout,
        _stale_logprobs,
        None,
        "tests/test_train.py::test_every_step_learns_from_what_the_policy_has_just_written",
        shipped="ratios that do not start at 1: TRL #454, trlX #107 and #508, NeMo-Aligner #68",
    ),
    Bug(
        "no_clipping",
        "The gradient norm is computed and reported, but nothing is clipped.",
        clip_grad_norm_,
        lambda: _clip_nothing,
        None,
        "tests/test_ppo.py::test_ppo_update_clips_the_gradient",
        shipped="TRL #3961",
    ),
    Bug(
        "mean_of_means",
        "Each micro-batch divides by its own tokens, so tokens of short responses weigh more.",
        ppo_loss,
        lambda: _mean_of_means,
        None,
        "tests/test_ppo.py::test_ppo_update_equals_float64_for_every_micro_batch_size",
        shipped="TRL; trlX sums without dividing",
        flags=("--micro_batch_size=2",),
    ),
    Bug(
        "resume_forgets",
        "A resumed run starts with an empty optimiser and the first value of beta.",
        load_checkpoint,
        lambda: _forgetful,
        None,
        "tests/training/test_session.py::test_n_steps_equal_k_steps_and_a_resume[5-]",
        shipped="trlX; OpenRLHF in part; TRL #2657 cannot resume",
        resumed=True,
    ),
]
