"""Apple's GPUs, as far as one machine can tell: a pretended device without float64 does all that a run computes."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError

import pytest
import torch
import torchgen
import yaml
from conftest import forked, make_policy, ragged_prompts
from transformers import PreTrainedTokenizerFast

import train
import utils
from data import PromptStream
from experiments import pretend
from experiments.pretend import OnDevice, Watch
from ppo import Models, build_optimizer, collect_rollout, ppo_update
from reward import SentimentReward
from runtime import device
from runtime.device import resolve_device, resolve_dtype
from training import score_scale
from training.parts import Parts
from training.self_check import self_check

SETTINGS = TrainConfig(
    policy_name="tiny",
    batch_size=16,
    minibatch_size=8,
    micro_batch_size=4,
    max_prompt_len=8,
    max_new_tokens=10,
    top_k=50,
    top_p=0.95,
    ent_coef=0.01,
    reward_every=2,
    lr=1e-3,
    dtype="float32",
)


def make_parts(classifier_dir: Path, gpt2_dir: Path, move: bool) -> Parts:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gpt2_dir)
    policy, reference = (make_policy(len(tokenizer)) for _ in range(2))
    reward = SentimentReward(str(classifier_dir))
    if move:
        for model in (policy, reference, reward.model):
            pretend.moved(model)
    ids, mask = ragged_prompts(24, 8, len(tokenizer))
    prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    models = Models(policy, reference.requires_grad_(False), reward, tokenizer)
    return Parts(models, PromptStream(prompts, 16, 0), PromptStream(prompts[:6], 6, 0))


def a_run(parts: Parts) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """All that a run computes: the self-check, the scale, two steps, samples, an evaluation; its numbers and weights.

    In the second step KL is in the loss.
    """
    models = parts.models
    self_check(models, parts.prompts.batch(1), SETTINGS)
    scale = score_scale.measure(parts, SETTINGS)
    optimizer = build_optimizer(models.policy, SETTINGS)
    rows: list[dict[str, Any]] = [{"mean": scale.mean, "std": scale.std}]
    for step in (1, 2):
        cfg = replace(SETTINGS, kl_in_loss=step == 2)
        noise = utils.uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
        rollout = collect_rollout(models, parts.prompts.batch(step), noise, cfg, cfg.kl_coef)
        update = ppo_update(models.policy, optimizer, rollout, cfg, step)
        rows.append({**rollout.metrics(), **update, "seconds_update": 0})
    rows += [*train.sample_rows(parts, rollout, cfg, 2), train.evaluate_held_out(parts, cfg, cfg.kl_coef)]
    return rows, [weight.detach().cpu() for weight in models.policy.parameters()]


def a_run_without_float64_equals_one_on_the_cpu(classifier_dir: Path, gpt2_dir: Path) -> None:
    score_scale.PROMPTS = 16
    expected, weights = a_run(make_parts(classifier_dir, gpt2_dir, move=False))
    device.WITHOUT_FLOAT64 = {pretend.NAME}
    parts = make_parts(classifier_dir, gpt2_dir, move=True)
    with Watch(float64=False) as watch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", partial(tensor, torch.tensor))
        rows, moved_weights = a_run(parts)
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True)
            assert row[name] == same, name
    for weight, other in zip(moved_weights, weights, strict=True):
        assert (weight - other).abs().max() < 1e-4
    assert len(watch.names) > 50
    assert not watch.names - supported(), "unsupported by Apple's GPUs"


def tensor(make: Any, data: Any, device: Any = None, **rest: Any) -> torch.Tensor:
    """torch.tensor, which makes its tensor where nothing sees it."""
    return make(data, **rest) if device is None else make(data, **rest).to(device)


def supported() -> set[str]:
    """Operations with a kernel for MPS, or made of such, as torch's own list of its functions has it."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.load(text, yaml.CSafeLoader)}
    found = set()
    for name, entry in entries.items():
        kernels = entries[entry["structured_delegate"]] if "structured_delegate" in entry else entry
        keys = ",".join(kernels.get("dispatch", {"CompositeImplicitAutograd": None}))
        if "MPS" in keys or "Composite" in keys:
            found |= {name, f"{name}.default"}
    return found


def what_the_device_refuses_is_an_error_here(classifier_dir: Path, gpt2_dir: Path) -> None:
    with Watch(float64=False):
        x = torch.ones(3).to(torch.device(pretend.NAME, 0))
        assert isinstance(x, OnDevice)
        for refused in (
            x.double,
            lambda: x + torch.ones(3),
            lambda: torch.zeros(2, dtype=torch.float64, device=x.device),
            lambda: torch.ones(2, dtype=torch.float64).to(x.device),
        ):
            with pytest.raises(AssertionError, match=r"float64|mixes"):
                refused()
        assert (x + 1).cpu().double().tolist() == [2, 2, 2]
    assert "add.Tensor" in supported()
    assert "linalg_eig" not in supported()


def on_the_device(check: Any, classifier_dir: Path, gpt2_dir: Path) -> None:
    pretend.register()
    with pretend.attention_by_formula():
        check(classifier_dir, gpt2_dir)


@pytest.mark.parametrize(
    "check", [a_run_without_float64_equals_one_on_the_cpu, what_the_device_refuses_is_an_error_here]
)
def test_a_device_without_float64(check: Any, classifier_dir: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    """Each in a process of its own, because torch must know the device before anything is differentiated."""
    if not pretend.is_possible():
        pytest.skip("this torch has no backends written in Python")
    said = tmp_path / "said.txt"
    child = forked(partial(on_the_device, check, classifier_dir, gpt2_dir), said)
    child.join(100)
    assert child.exitcode == 0, said.read_text()


@pytest.mark.parametrize(("cuda", "mps"), itertools.product((False, True), repeat=2))
def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == ("cuda" if cuda else "mps" if mps else "cpu")
    assert resolve_device("cpu") == "cpu"
    for name, present in (("cuda", cuda), ("mps", mps)):
        if present:
            assert resolve_device(name) == name
        else:
            with pytest.raises(UserError, match=f"device={name}.*--device cpu"):
                resolve_device(name)
    assert resolve_dtype("auto", "mps") == "float32"
