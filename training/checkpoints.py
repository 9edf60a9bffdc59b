"""Checkpoints from which a run resumes exactly where it was.

state/step_000010/ holds the weights, the optimiser and, in state.json, the counters and a checksum of every file.
Random state is not needed: every draw is a function of (seed, step). A checkpoint is written under a temporary name,
flushed to disk and renamed, and only then is an older one removed. So there is an intact one whenever the program dies.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from config import UserError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.files import fsync, remove, rename, sha256

FILES = ("policy.safetensors", "optimizer.safetensors")


def save_checkpoint(
    folder: Path, policy: nn.Module, optimizer: Optimizer, counters: dict[str, Any], keep_last: int
) -> Path:
    """Write folder/step_N for N = counters["step"], then remove all but the newest keep_last (raises OSError)."""
    place = folder / f"step_{counters['step']:06d}"
    if place.is_dir() and find_corruption(place) is None:  # of the same step, so the same
        return place
    fresh = folder / ".partial"
    remove(fresh)
    fresh.mkdir(parents=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in policy.named_parameters()}
    for name, tensors in zip(FILES, (weights, _moments(policy, optimizer)), strict=True):
        save_file(tensors, fresh / name)
        fsync(fresh / name)
    sums = {name: sha256(fresh / name) for name in FILES}
    record = {**counters, "sha256": {**sums, "counters": _digest(counters)}}
    (fresh / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    fsync(fresh / "state.json")
    fsync(fresh)
    remove(place)
    rename(fresh, place)
    fsync(folder)
    for old in list_checkpoints(folder)[:-keep_last]:
        remove(old)
    return place


def _moments(policy: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state of each weight, as `name/key`; empty before its first step."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, weight in policy.named_parameters()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all intact, and what is wrong with each newer one."""
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problem = find_corruption(path)
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def find_corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: a file is missing, cut short or changed."""
    try:
        counters = json.loads((path / "state.json").read_text(encoding="utf-8"))
        expected = counters.pop("sha256")
        if _digest(counters) != expected["counters"]:
            return "state.json is damaged"
        for name in FILES:
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256(path / name) != expected[name]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json cannot be read ({error})"
    return None


def load_checkpoint(path: Path, policy: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Restore weights and optimiser; returns the counters (raises UserError)."""
    try:
        weights, moments = (load_file(path / name) for name in FILES)
        counters = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"resume={path} cannot be read ({error}): choose another checkpoint") from None
    found = dict(policy.named_parameters())
    if {name: tuple(weight.shape) for name, weight in weights.items()} != {n: tuple(w.shape) for n, w in found.items()}:
        raise UserError(f"resume={path} is a checkpoint of another model: name the policy that it was made with")
    with torch.no_grad():
        for name, weight in found.items():
            weight.copy_(weights[name])
    optimizer.state.clear()
    for key, value in moments.items():
        name, _, what = key.partition("/")
        weight = found[name]
        optimizer.state[weight][what] = value.to(weight.device, copy=True)  # which lets go of the file
    return dict(counters)


class Snapshot:
    """A copy of weights and optimiser in memory, to undo an update that is interrupted."""

    def __init__(self, policy: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.weights = [(weight, weight.detach().clone()) for weight in policy.parameters()]
        self.moments = {w: {k: v.clone() for k, v in kept.items()} for w, kept in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Undo all changes since."""
        for weight, value in self.weights:
            weight.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.moments)


def _digest(counters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(counters, sort_keys=True).encode()).hexdigest()


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"])
