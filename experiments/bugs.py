"""Classic bugs of PPO on language models, each planted from outside by replacing one function.

    python -m experiments.bugs shift --preset tiny --ckpt_dir runs/shift     train.py with a bug and no self-check

Nothing in the product knows of them. A bug is a function here: its docstring says what is wrong, and `instead_of` names
the function whose place it takes, which it gets as `right` (experiments/planting.py).
"""

import copy
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from config import TrainConfig, UserError

import torch
import torch.nn.functional as F
from torch import Tensor

import model
import ppo
import reward
import train
import utils
from experiments.planting import Function, Substitute, planted, replaced
from model import GPT2WithValueHead, Sequences, evaluate_both, transformer_forward, visible_keys
from ppo import Batch, Models, Rollout
from runtime import cli
from runtime.cli import parse_config
from training import checkpoints, parts, plots, self_check
from training.session import Session
from utils import position_ids, whiten

PAGE = Path(__file__).parent.parent / "docs" / "pitfalls.md"
RIGHT = "right"  # the name of training without a bug


@dataclass(frozen=True)
class Bug(Substitute):
    """A bug: the docstring of its function says what is wrong, its section of docs/pitfalls.md everything else."""

    flags: tuple[str, ...] = ()  # settings that the bug needs to show
    resumed: bool = False  # it shows only in a run that was stopped half-way and resumed

    @property
    def name(self) -> str:
        """The name of its function."""
        return self.function.__name__

    @cached_property
    def section(self) -> str:
        """What the page says of it."""
        _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n### {self.name}\n")
        return re.split(r"\n##", rest)[0].strip()

    @property
    def fact(self) -> str | None:
        """The fact of the self-check that refuses to train, None where the self-check passes the bug."""
        named = re.search(r'the self-check\'s\s"([^"]+)"', self.section)
        return named[1] if named else None

    @property
    def test(self) -> str:
        """A test that fails with it."""
        named = re.search(r"`(tests/[^`]+)`", self.section)
        assert named, f"{PAGE} names no test for {self.name}"
        return named[1]


BUGS: list[Bug] = []


def instead_of(owner: Any, replaces: str, **more: Any) -> Callable[[Function], Function]:
    """Add the decorated function to BUGS; `more` are flags and resumed."""

    def add(function: Function) -> Function:
        BUGS.append(Bug(owner, replaces, function, **more))
        return function

    return add


def find_bug(name: str) -> Bug | None:
    """The bug of a name, None for the right run (raises UserError)."""
    if name == RIGHT:
        return None
    for bug in BUGS:
        if bug.name == name:
            return bug
    raise UserError(f"bug={name!r} is unknown: choose {', '.join([RIGHT, *(bug.name for bug in BUGS)])}")


# --- training with a bug --------------------------------------------------------------------------------------------


def main() -> None:
    """Train with the bug that the first word names; the others are flags of train.py (raises UserError)."""
    if len(sys.argv) < 2:
        raise UserError("name a bug, then flags of train.py: python -m experiments.bugs shift --preset tiny")
    train_with(find_bug(sys.argv[1]), sys.argv[2:])


def train_with(bug: Bug | None, flags: list[str]) -> None:
    """Train with a bug, without the self-check and without a picture of the curves."""
    if bug is not None:
        flags = [*flags, *bug.flags]
    settings = parse_config(TrainConfig, flags)
    torch.manual_seed(settings.seed)
    no_self_check = replaced(self_check, "self_check", lambda *_: None)
    no_curves = replaced(plots, "plot_curves", lambda *_: None)
    with planted(bug), no_self_check, no_curves:
        if bug is not None and bug.resumed:
            with stopped_after(settings.total_steps // 2):
                train.main(settings)
            settings = parse_config(TrainConfig, [*flags, "--resume"])
        train.main(settings)


@contextmanager
def stopped_after(last: int) -> Iterator[None]:
    """A context in which runs are stopped and saved after a step."""
    all_steps = Session.steps

    def some_steps(self: Session) -> Iterator[int]:
        for step in all_steps(self):
            yield step
            if step == last:
                self.save()
                return

    with replaced(Session, "steps", some_steps):
        yield


# --- the bugs -------------------------------------------------------------------------------------------------------

LAST_WEIGHTS: WeakKeyDictionary[GPT2WithValueHead, dict[str, Tensor]] = WeakKeyDictionary()  # of the step before


@instead_of(GPT2WithValueHead, "response_hidden")
def shift(right: Function, self: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    """A token's log-probability is read from the logits that follow it."""
    mask = seqs.attention_mask
    with self.autocast():
        return transformer_forward(self.lm, seqs.tokens, position_ids(mask), visible_keys(mask), seqs.prompt_len)


@instead_of(ppo, "collect_rollout")
def prompt_trained(right: Function, models: Models, **rest: Any) -> Rollout:
    """Tokens of the prompt are trained on, as if the policy had written them."""
    rollout = right(models=models, **rest)
    seqs = rollout.sequences
    # the end of the prompt, as many tokens as every prompt has
    extra = int(seqs.attention_mask[:, : seqs.prompt_len].sum(1).min()) - 1
    wide = replace(
        seqs,
        response_mask=F.pad(seqs.response_mask, (extra, 0), value=True),
        lengths=seqs.lengths + extra,
        logprobs=F.pad(seqs.logprobs, (extra, 0)),
        support=None if seqs.support is None else F.pad(seqs.support, (0, 0, extra, 0), value=True),
    )
    evaluation = evaluate_both(models.policy, models.reference, wide)
    partial_scores = F.pad(rollout.partial_scores, (extra, 0), value=math.nan)
    return replace(rollout, sequences=wide, partial_scores=partial_scores, **evaluation._asdict())


@instead_of(GPT2WithValueHead, "response_hidden")
def positions(right: Function, self: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    """Scoring counts padding on the left in the positions; sampling does not."""
    mask = seqs.attention_mask[:, :-1]
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    with self.autocast():
        return transformer_forward(self.lm, seqs.tokens[:, :-1], columns, visible_keys(mask), seqs.prompt_len - 1)


@instead_of(model, "sample_responses")
def eos_untrained(right: Function, eos_id: int, **rest: Any) -> Sequences:
    """The response mask leaves EOS out, because it has the id of padding."""
    seqs = right(eos_id=eos_id, **rest)
    ends = (seqs.responses == eos_id) & (seqs.response_mask.sum(1, keepdim=True) > 1)
    mask = seqs.response_mask & ~ends
    return replace(seqs, response_mask=mask, lengths=mask.sum(1))


@instead_of(model, "sample_responses")
def padding_trained(right: Function, eos_id: int, **rest: Any) -> Sequences:
    """The padding after EOS counts as part of the response."""
    seqs = right(eos_id=eos_id, **rest)
    responses = seqs.responses.masked_fill(~seqs.response_mask, eos_id)
    tokens = torch.cat([seqs.tokens[:, : seqs.prompt_len], responses], 1)
    mask = torch.ones_like(seqs.response_mask)
    return replace(seqs, tokens=tokens, response_mask=mask, lengths=mask.sum(1))


@instead_of(utils, "shape_rewards")
def score_place(right: Function, scores: Tensor, **rest: Any) -> Tensor:
    """The score is paid in the last column, which is padding where a response ended earlier."""
    rewards: Tensor = right(scores=torch.zeros_like(scores), **rest)
    rewards[:, -1] += scores
    return rewards


@instead_of(GPT2WithValueHead, "response_hidden")
def dropout(right: Function, self: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    """Dropout of 10 % is on while the policy is scored and trained."""
    is_reference = not self.value_head.weight.requires_grad
    if is_reference:
        return right(self, seqs)
    layers = [layer for block in self.lm.transformer.h for layer in (block.attn.c_proj, block.mlp)]
    hooks = [layer.register_forward_hook(lambda _, __, out: torch.dropout(out, 0.1, True)) for layer in layers]
    try:
        return right(self, seqs)
    finally:
        for hook in hooks:
            hook.remove()


@instead_of(model, "sample_responses")
def temperature(right: Function, **call: Any) -> Sequences:
    """Responses are sampled at temperature 0.7 and scored at 1."""
    return replace(right(**call | {"temperature": 0.7}), temperature=1.0)


@instead_of(model, "sample_responses")
def top_p(right: Function, **call: Any) -> Sequences:
    """Responses are sampled with top-p 0.9 and scored without."""
    return replace(right(**call | {"top_p": 0.9}), support=None)


@instead_of(utils, "shape_rewards")
def kl_sign(right: Function, kl_coef: float, **rest: Any) -> Any:
    """The KL term of the reward has the wrong sign, so that distance from the reference is paid."""
    return right(kl_coef=-kl_coef, **rest)


@instead_of(Rollout, "metrics")
def kl_logged(right: Function, self: Rollout) -> dict[str, float]:
    """The KL that is logged is the k3 estimate with the ratio upside down; the penalty is right."""
    upside_down = self.kl.exp() - 1 - self.kl
    return right(replace(self, logprobs=upside_down, ref_logprobs=torch.zeros_like(upside_down)))


@instead_of(utils, "shape_rewards")
def kl_upside_down(right: Function, kl: Tensor, **rest: Any) -> Any:
    """The KL that the reward pays for is the k3 estimate with the ratio upside down."""
    return right(kl=kl.exp() - 1 - kl, **rest)


@instead_of(parts, "load_models")
def reference_is_policy(right: Function, **call: Any) -> Models:
    """The reference is the policy itself and not a copy, so the KL is always 0."""
    models = right(**call)
    return replace(models, reference=models.policy)


@instead_of(ppo, "collect_rollout")
def reference_follows(right: Function, models: Models, **rest: Any) -> Rollout:
    """The reference is not frozen: it is the policy of the step before."""
    if models.policy in LAST_WEIGHTS:
        models.reference.load_state_dict(LAST_WEIGHTS[models.policy])
    LAST_WEIGHTS[models.policy] = copy.deepcopy(models.policy.state_dict())
    return right(models=models, **rest)


@instead_of(reward, "find_label")
def label_swapped(right: Function, config: Any, **rest: Any) -> int:
    """The label of the reward is found by a wrong index, so the opposite is rewarded."""
    return (right(config=config, **rest) + 1) % int(config.num_labels)


@instead_of(utils, "whiten")
def whiten_padding(right: Function, mask: Tensor, **rest: Any) -> Tensor:
    """Advantages are whitened over padding as well."""
    return right(mask=torch.ones_like(mask), **rest)


@instead_of(ppo, "accumulate_gradients")
def whiten_minibatch(right: Function, minibatch: Batch, **rest: Any) -> Any:
    """Advantages are whitened in each minibatch and not once over the batch."""
    advantages = whiten(minibatch.advantages, minibatch.sequences.response_mask)
    return right(minibatch=replace(minibatch, advantages=advantages), **rest)


@instead_of(utils, "compute_gae")
def whitened_returns(right: Function, values: Tensor, response_mask: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """The critic's targets are computed from whitened advantages."""
    advantages, _ = right(values=values, response_mask=response_mask, **rest)
    return advantages, torch.where(response_mask, whiten(advantages, response_mask) + values, 0)


@instead_of(ppo, "collect_rollout")
def stale_logprobs(right: Function, models: Models, **rest: Any) -> Rollout:
    """The ratio is taken against the policy of one step ago."""
    rollout = right(models=models, **rest)
    weights = copy.deepcopy(models.policy.state_dict())
    models.policy.load_state_dict(LAST_WEIGHTS.get(models.policy, weights))
    stale, *_ = evaluate_both(models.policy, models.reference, rollout.sequences)
    models.policy.load_state_dict(weights)
    LAST_WEIGHTS[models.policy] = weights
    return replace(rollout, logprobs=stale)


@instead_of(torch.nn.utils, "clip_grad_norm_")
def no_clipping(right: Function, parameters: Any, max_norm: float) -> Tensor:
    """The gradient norm is computed and reported, but nothing is clipped."""
    return right(parameters, math.inf)


@instead_of(ppo, "ppo_loss", flags=("--micro_batch_size=2",))
def mean_of_means(right: Function, batch: Batch, cfg: TrainConfig, token_count: Tensor | int, **rest: Any) -> Any:
    """Each micro-batch divides by its own tokens, so tokens of short responses weigh more."""
    own = batch.sequences.response_mask.sum() * cfg.minibatch_size / len(batch)
    return right(batch=batch, cfg=cfg, token_count=own, **rest)


@instead_of(checkpoints, "load_checkpoint", resumed=True)
def resume_forgets(right: Function, optimizer: torch.optim.Optimizer, **rest: Any) -> dict[str, Any]:
    """A resumed run starts with an empty optimiser and the first value of beta."""
    counters = right(optimizer=optimizer, **rest)
    optimizer.state.clear()
    return {name: value for name, value in counters.items() if name != "kl_coef"}


if __name__ == "__main__":
    sys.exit(cli.run(main))
