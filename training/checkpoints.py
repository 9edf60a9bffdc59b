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
    # 1. everything under a temporary name
    fresh = folder / ".partial"
    remove(fresh)
    fresh.mkdir(parents=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in policy.named_parameters()}
    save_file(weights, fresh / "policy.safetensors")
    save_file(_moments(policy, optimizer), fresh / "optimizer.safetensors")
    checksums = {name: sha256(fresh / name) for name in FILES}
    record = {**counters, "sha256": {**checksums, "counters": _digest(counters)}}
    (fresh / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # 2. to the disk, then into place
    for name in (*FILES, "state.json"):
        fsync(fresh / name)
    fsync(fresh)
    remove(place)
    rename(fresh, place)
    fsync(folder)
    # 3. older ones last
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
    paths = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(paths, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


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
        counters = counters_of(path)
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


def counters_of(checkpoint: Path) -> dict[str, Any]:
    """What state.json says of the run at a checkpoint: its step, beta and the like."""
    return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def load_checkpoint(path: Path, policy: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Restore weights and optimiser; returns the counters. Raises UserError where they do not fit the policy."""
    try:
        saved_weights = load_file(path / "policy.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        counters = counters_of(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"resume={path} cannot be read ({error}): choose another checkpoint") from None
    weights = dict(policy.named_parameters())
    if {name: x.shape for name, x in saved_weights.items()} != {name: x.shape for name, x in weights.items()}:
        raise UserError(f"resume={path} is a checkpoint of another model: name the policy that it was made with")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved_weights[name])
    optimizer.state.clear()
    for key, value in moments.items():
        name, _, moment = key.partition("/")
        weight = weights[name]
        optimizer.state[weight][moment] = value.to(weight.device, copy=True)  # which lets go of the file
    return counters


def _digest(counters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(counters, sort_keys=True).encode()).hexdigest()
