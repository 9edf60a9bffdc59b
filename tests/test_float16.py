"""Float16, as auto takes it on GPUs without fast bfloat16: the facts under autocast on the CPU, and scaling.

Float16 has 11 significant bits. On these models, whose weights are made large on purpose, that is 0.03 nats per token.
"""

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from config import TrainConfig

import pandas as pd
import pytest
import torch
from conftest import (
    EOS,
    as_processes,
    exact,
    exact_logits,
    make_policy,
    make_rollout,
    pad_more,
    real_tokens,
    run,
    same_weights,
    sample,
    weights_of,
)
from torch import Tensor
from torch.amp import GradScaler

import ppo
from model import GPT2WithValueHead, evaluate_both, sample_responses
from ppo import NO_SCALER, Rollout, build_optimizer, build_scaler, ppo_update
from runtime.device import resolve_dtype
from runtime.distributed import process_group
from training.checkpoints import list_checkpoints
from utils import uniforms

TOLERANCE = 0.03
CFG = TrainConfig(
    batch_size=8, minibatch_size=4, micro_batch_size=2, ppo_epochs=2, lr=1e-3, ent_coef=0.01, max_grad_norm=1e9
)


def half(policy: GPT2WithValueHead) -> GPT2WithValueHead:
    policy.dtype = torch.float16
    return policy


def rollout_of(policy: GPT2WithValueHead, kl_in_loss: bool = False) -> Rollout:
    reference, scores = half(make_policy(seed=1)), torch.linspace(-1, 1, 8)
    return make_rollout(policy, reference, sample(policy), scores, 0.1, kl_in_loss=kl_in_loss)


# --- the facts ------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_librarys_and_the_samplers() -> None:
    policy = half(make_policy(vocab=60, critic=True))
    seqs = sample(policy, rows=10)
    logprobs, values, entropy = policy.evaluate_responses(seqs)
    assert logprobs.dtype == values.dtype == entropy.dtype == torch.float32
    assert (logprobs - seqs.logprobs).abs().max() < TOLERANCE
    for row in range(10):
        tokens, start = real_tokens(seqs, row)
        expected = exact_logits(policy.lm, tokens)[start - 1 : -1].log_softmax(-1)
        chosen = expected.gather(1, tokens[start:, None]).squeeze(1)
        n = len(chosen)
        assert (logprobs[row, :n] - chosen).abs().max() < TOLERANCE
        assert (entropy[row, :n] + (expected.exp() * expected).sum(-1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_padding_and_micro_batches_change_nothing(kl_in_loss: bool) -> None:
    policy = half(make_policy(critic=True))
    seqs = sample(policy)
    for a, b in zip(policy.evaluate_responses(seqs), policy.evaluate_responses(pad_more(seqs, 20)), strict=True):
        assert (a - b).abs().max() < TOLERANCE
    rollout, weights = rollout_of(policy, kl_in_loss), []
    for size in (1, 2, 4, 8):
        twin = copy.deepcopy(policy)
        cfg = replace(CFG, micro_batch_size=size, minibatch_size=8, ppo_epochs=1)
        ppo_update(twin, torch.optim.SGD(twin.parameters()), rollout, cfg, 1, build_scaler(twin))
        weights.append([w - v for w, v in zip(twin.parameters(), policy.parameters(), strict=True)])
    largest = max(float(w.detach().abs().max()) for w in weights[0])
    for others in weights[1:]:
        for a, b in zip(weights[0], others, strict=True):
            assert (a - b).detach().abs().max() < 0.01 * largest


def test_the_ratio_starts_at_1_and_lr_0_changes_nothing() -> None:
    policy = half(make_policy(critic=True))
    before, cfg = weights_of(policy), replace(CFG, lr=0.0)
    row = ppo_update(policy, build_optimizer(policy, cfg), rollout_of(policy), cfg, 1, build_scaler(policy))
    assert row["ratio_max"] == pytest.approx(1, abs=TOLERANCE)
    assert row["updates"] == 4
    assert same_weights(policy, before)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    optimizer = build_optimizer(policy, CFG)
    ppo_update(policy, optimizer, rollout_of(policy), CFG, 1, build_scaler(policy))
    assert {x.dtype for state in optimizer.state.values() for x in state.values()} == {torch.float32}


def test_the_critic_sees_only_what_came_before_and_starts_at_zero() -> None:
    policy = half(make_policy(critic=True))
    seqs = sample(policy)
    changed = copy.deepcopy(seqs)
    t = seqs.prompt_len + 5
    changed.tokens[:, t:] = (changed.tokens[:, t:] + 7) % 20
    a, b = (policy.evaluate_responses(x)[1] for x in (seqs, changed))
    assert (a - b)[:, :6].abs().max() < TOLERANCE
    assert (a - b)[:, 6:].abs().max() > 10 * TOLERANCE
    assert not half(make_policy()).evaluate_responses(seqs)[1].any()


def test_draws_are_in_proportion_to_what_is_scored() -> None:
    policy, n = half(make_policy(seed=7, n_layer=1, n_embd=16)), 100_000
    prompt = torch.tensor([[3, 9]])
    seqs = sample_responses(policy, prompt.expand(n, -1), torch.ones(n, 2).bool(), uniforms(0, 1, n, 1), eos_id=EOS)
    scored, _, _ = policy.evaluate_responses(seqs)
    counts = torch.bincount(seqs.responses[:, 0], minlength=20)
    drawn = counts > 0
    logprob = torch.zeros(20).scatter(0, seqs.responses[:, 0], scored[:, 0])
    expected = n * logprob.exp()
    chi2 = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum().item()
    tail = torch.special.gammaincc(torch.tensor((int(drawn.sum()) - 1) / 2.0).double(), torch.tensor(chi2 / 2))
    assert drawn.sum() > 10
    assert tail > 1e-4


def test_exact_kl_of_a_policy_to_itself_is_zero() -> None:
    policy = half(make_policy())
    logprobs, ref_logprobs, _, _, exact_kl = evaluate_both(policy, policy, sample(policy))
    assert torch.equal(logprobs, ref_logprobs)
    assert not exact_kl.any()


# --- loss scaling ---------------------------------------------------------------------------------------------------


def gradient(policy: GPT2WithValueHead, rollout: Rollout, scaler: GradScaler) -> Tensor:
    """The gradient of an update, before clipping, as plain gradient descent shows it."""
    twin = copy.deepcopy(policy)
    cfg = replace(CFG, lr=1.0, ppo_epochs=1, minibatch_size=8, ent_coef=0.0)
    row = ppo_update(twin, torch.optim.SGD(twin.parameters()), rollout, cfg, 1, scaler)
    assert row["updates"] == 1
    return torch.cat(
        [(old - new).detach().flatten() for old, new in zip(policy.lm.parameters(), twin.lm.parameters(), strict=True)]
    )


def test_scaling_keeps_gradients_that_float16_would_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss made a million times smaller: its gradients are those of float32 where it is scaled, and else are lost."""
    policy = make_policy(critic=True)
    rollout = rollout_of(policy)
    loss = ppo.ppo_loss

    def tiny(*args: Any) -> Any:
        found, sums = loss(*args)
        return found * 1e-6, sums

    monkeypatch.setattr(ppo, "ppo_loss", tiny)
    exact_gradient = gradient(policy, rollout, NO_SCALER)
    half(policy)
    scaled, unscaled = (gradient(policy, rollout, s) for s in (GradScaler("cpu", init_scale=2.0**30), NO_SCALER))
    assert (scaled - exact_gradient).norm() < 0.05 * exact_gradient.norm()
    assert (unscaled - exact_gradient).norm() > 0.5 * exact_gradient.norm()


def test_overflows_change_nothing_are_counted_apart_and_halve_the_scale() -> None:
    policy = half(make_policy(critic=True))
    rollout, before, scaler = rollout_of(policy), weights_of(policy), GradScaler("cpu", init_scale=2.0**60)
    row = ppo_update(policy, build_optimizer(policy, CFG), rollout, CFG, 1, scaler)
    assert (row["updates"], row["skipped"], row["overflows"]) == (0, 0, 4)
    assert same_weights(policy, before)
    assert scaler.get_scale() == 2.0**56
    scaler = GradScaler("cpu", init_scale=2.0**40)
    while not row["updates"]:
        row = ppo_update(policy, build_optimizer(policy, CFG), rollout, CFG, 1, scaler)
    assert row["updates"] + row["overflows"] == 4
    assert 1 < scaler.get_scale() < 2.0**36
    assert not same_weights(policy, before)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_no_scale_can_mend_is_skipped(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = half(make_policy())
    loss, before = ppo.ppo_loss, weights_of(policy)

    def poisoned(*args: Any) -> Any:
        found, sums = loss(*args)
        if where == "loss":
            return found * math.nan, {**sums, "policy_loss": sums["policy_loss"] * math.nan}
        found.register_hook(lambda grad: grad * math.inf)
        return found, sums

    monkeypatch.setattr(ppo, "ppo_loss", poisoned)
    scaler = GradScaler("cpu", init_scale=4.0)
    row = ppo_update(policy, build_optimizer(policy, CFG), rollout_of(policy), CFG, 1, scaler)
    # a scale of 4 falls to 2 and to 1; below there is none to try
    assert (row["overflows"], row["skipped"]) == {"loss": (0, 4), "gradient": (2, 2)}[where]
    assert same_weights(policy, before)


def test_only_float16_is_scaled() -> None:
    policy = make_policy()
    assert not build_scaler(policy).is_enabled()
    policy.dtype = torch.bfloat16
    assert not build_scaler(policy).is_enabled()
    assert build_scaler(half(policy)).get_scale() == 2.0**16


def with_scale(init: float, interval: int, policy: GPT2WithValueHead) -> GradScaler:
    return GradScaler("cpu", init_scale=init, growth_interval=interval)


def test_n_steps_equal_k_steps_and_a_resume(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit. The scale falls to what fits and grows again every five minibatches, and so must be remembered."""
    monkeypatch.setattr("training.session.build_scaler", partial(with_scale, 2.0**24, 5))
    flags |= {"dtype": "float16", "eval_every": "0", "total_steps": "8", "save_every": "3"}
    whole = run({**flags, "ckpt_dir": str(tmp_path / "whole")})
    table = pd.read_csv(whole / "metrics.csv")
    assert table.overflows[0] > 0
    assert table.overflows[3:].sum() > 0
    assert not table.skipped.any()
    with monkeypatch.context() as patch:
        patch.setattr("training.session.Session.steps", stopping(5))
        run(flags)
    state = list_checkpoints(Path(flags["ckpt_dir"]) / "state")[-1]
    assert state.name == "step_000003"
    capsys.readouterr()
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert "resuming after step 3" in capsys.readouterr().out
    assert exact(Path(flags["ckpt_dir"])) == exact(whole)


def stopping(at: int) -> Any:
    """Session.steps, but as if the process died at a step."""
    from training.session import Session

    steps = Session.steps

    def some(session: Session) -> Iterator[int]:
        for step in steps(session):
            if step == at:
                return
            yield step

    return some


def overflow_on_one_rank(folder: Path) -> None:
    """One rank of two: a gradient of the last rank alone overflows, once."""
    rank, calls = int(os.environ["RANK"]), []

    def overflow(grad: Tensor) -> Tensor:
        calls.append(1)
        return grad * math.inf if rank == 1 and len(calls) == 2 else grad

    with process_group("cpu"):
        policy = half(make_policy())
        rollout, scaler = rollout_of(policy), build_scaler(policy)
        policy.lm.transformer.h[0].ln_1.weight.register_hook(overflow)
        row = ppo_update(policy, build_optimizer(policy, CFG), rollout, CFG, 1, scaler)
    torch.save([weight.detach() for weight in policy.parameters()], folder / f"weights_{rank}.pt")
    found = [row[name] for name in ("updates", "skipped", "overflows")]
    (folder / f"row_{rank}.txt").write_text(f"{found} {scaler.get_scale()}")


def test_ranks_agree_on_an_overflow_that_one_of_them_has(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    assert as_processes(2, partial(overflow_on_one_rank, tmp_path), said) == [0, 0], said.read_text()
    rows = [(tmp_path / f"row_{rank}.txt").read_text() for rank in range(2)]
    assert rows == ["[3, 0, 1] 32768.0"] * 2
    for a, b in zip(*(torch.load(tmp_path / f"weights_{rank}.pt") for rank in range(2)), strict=True):
        assert torch.equal(a, b)


# --- choosing it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)  # GTX 10, V100, T4 and RTX 20, A100, H100
def test_auto_takes_float16_on_gpus_without_fast_bfloat16(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert resolve_dtype("auto", "cuda") == dtype
    assert resolve_dtype("bfloat16", "cuda") == "bfloat16"


def test_an_overflow_is_no_failed_step(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps in a row without an optimiser step do not end the run: the scale falls until one fits."""
    monkeypatch.setattr("training.session.build_scaler", partial(with_scale, 2.0**36, 2000))
    flags |= {"dtype": "float16", "eval_every": "0", "total_steps": "6", "batch_size": "4", "ppo_epochs": "1"}
    table = pd.read_csv(run(flags) / "metrics.csv")
    assert table.updates[:4].tolist() == [0] * 4
    assert len(table) == 6
