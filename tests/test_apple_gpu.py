"""Apple's GPUs, as far as one machine can tell: a pretended device that refuses what those refuse.

Its tensors are held on the CPU, but every operation on them is seen: one in float64 is an error, and so is one that
mixes them with tensors of the host.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError

import pytest
import torch
import torchgen
import yaml
from conftest import make_policy, ragged_prompts
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedTokenizerFast

import train
import utils
from data import PromptStream
from ppo import Models, build_optimizer, collect_rollout, ppo_update
from reward import SentimentReward
from runtime.device import resolve_device, resolve_dtype
from training.audit import audit
from training.parts import Parts
from training.score_scale import measure

KIND = "lazy"  # a kind of device that autograd serves on the CPU
BETWEEN_DEVICES = ("_to_copy", "copy_")


class There(Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=KIND
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> None:
        raise AssertionError(f"{func} was called where nothing watches")


class PretendedDevice(TorchDispatchMode):
    """Runs operations on the CPU and refuses those that an Apple GPU would; `ops` are the names of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, There)]
        is_there = torch.device(kwargs["device"]).type == KIND if kwargs.get("device") else bool(there)
        name = func.overloadpacket.__name__
        if there and name not in BETWEEN_DEVICES:
            assert all(isinstance(x, There) or not x.dim() for x in tensors), f"{func} mixes host and device"
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
        found = func(*args, **kwargs)
        if not is_there:
            return found
        self.ops.add(str(func).removeprefix("aten."))

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            assert x.dtype != torch.float64, f"{func} makes float64 on the device"
            return next((old for old in there if old.held is x), x if isinstance(x, There) else There(x))

        return tree_map(wrapped, found)


def moved(module: nn.Module) -> nn.Module:
    """The module with its weights on the pretended device; weights that are shared stay shared."""
    new: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                if weight not in new:
                    new[weight] = nn.Parameter(weight.detach().to(KIND), weight.requires_grad)
                part._parameters[name] = new[weight]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(KIND)
    return module


def one_step(parts: Parts, cfg: TrainConfig) -> dict[str, Any]:
    """Everything that a run computes: the audit, the scale, two steps, an evaluation, samples; weights at the end."""
    models = parts.models
    audit(models, parts.prompts.batch(1), cfg)
    scale = measure(parts, cfg)
    optimizer = build_optimizer(models.policy, cfg)
    optimizer.param_groups[0]["fused"] = False  # the pretended device has no such kernel; MPS has
    rows = []
    for step in (1, 2):
        noise = utils.uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
        rollout = collect_rollout(models, parts.prompts.batch(step), noise, cfg, cfg.kl_coef)
        update = ppo_update(models.policy, optimizer, rollout, cfg, step)
        rows.append({**rollout.metrics(), **update, "seconds_update": 0})
    samples = train.sample_rows(parts, rollout, cfg, 2)
    held_out = train.evaluate_held_out(parts, cfg)
    weights = {name: weight.detach().cpu() for name, weight in models.policy.named_parameters()}
    return {"scale": scale, "rows": rows, "samples": samples, "held_out": held_out, "weights": weights}


def make_parts(tokenizer: PreTrainedTokenizerFast, classifier_dir: Path) -> Parts:
    policy, reference = (make_policy(len(tokenizer)) for _ in range(2))
    models = Models(policy, reference.requires_grad_(False), SentimentReward(str(classifier_dir)), tokenizer)
    ids, mask = ragged_prompts(24, 8, len(tokenizer))
    prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    return Parts(models, PromptStream(prompts, 16, 0), PromptStream(prompts[:6], 6, 0))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    monkeypatch.setattr(utils, "WITHOUT_FLOAT64", {KIND})
    with PretendedDevice() as mode:
        yield mode


SETTINGS = TrainConfig(
    policy_name="tiny", batch_size=16, minibatch_size=8, micro_batch_size=4, max_prompt_len=8, max_new_tokens=10,
    top_k=50, top_p=0.95, ent_coef=0.01, reward_every=2, lr=1e-3, dtype="float32",
)  # fmt: skip


def test_a_step_on_a_device_without_float64_equals_one_on_the_cpu(
    tokenizer: PreTrainedTokenizerFast, classifier_dir: Path, device: PretendedDevice
) -> None:
    """Nothing is in float64 there and nothing mixes devices; every operation has a kernel for Apple's GPUs."""
    here = one_step(make_parts(tokenizer, classifier_dir), SETTINGS)
    assert not device.ops
    parts = make_parts(tokenizer, classifier_dir)
    for module in (parts.models.policy, parts.models.reference, parts.models.reward.model):
        moved(module)
    there = one_step(parts, SETTINGS)
    weights = there.pop("weights")
    assert all(torch.equal(weight, weights[name]) for name, weight in here.pop("weights").items())
    assert str(there) == str(here)
    assert len(device.ops) > 50
    assert not device.ops - supported()


def supported() -> set[str]:
    """Operations with a kernel for MPS, or made of such, as torch's own list of its functions has it."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.load(text, yaml.CSafeLoader)}
    keys = {
        name: ",".join((entries[entry["structured_delegate"]] if "structured_delegate" in entry else entry)
                       .get("dispatch", {"CompositeImplicit": 0}))
        for name, entry in entries.items()
    }  # fmt: skip
    found = {name for name, key in keys.items() if "MPS" in key or "Composite" in key}
    return found | {f"{name}.default" for name in found}


def test_what_the_device_would_refuse_is_an_error_here(device: PretendedDevice) -> None:
    x = torch.ones(3).to(KIND)
    for refused in (x.double, lambda: x + torch.ones(3), lambda: torch.zeros(2, dtype=torch.float64, device=KIND)):
        with pytest.raises(AssertionError, match=r"float64|mixes"):
            refused()
    assert (x + 1).cpu().double().tolist() == [2, 2, 2]


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
