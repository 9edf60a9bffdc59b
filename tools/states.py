"""States from which a run goes on exactly where it was.

state/step_000010/ holds the weights, the optimiser and, in state.json, the counters and a checksum of every file.
Random state is not among them: every draw is a function of (seed, step). A state is written beside its place, flushed
to disk and renamed, and only then is an older one removed, so that whenever the program dies a good one is left.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from config import UserError

FILES = ("policy.safetensors", "optimizer.safetensors")


def save_state(folder: Path, policy: nn.Module, optimizer: Optimizer, counters: dict[str, Any], keep_last: int) -> Path:
    """Write folder/step_N, N being counters["step"], and remove all but the newest keep_last (raises OSError)."""
    place = folder / f"step_{counters['step']:06d}"
    if place.is_dir() and damage(place) is None:  # of the same step, hence the same
        return place
    fresh = folder / ".partial"
    remove(fresh)
    fresh.mkdir(parents=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in policy.named_parameters()}
    for name, tensors in zip(FILES, (weights, _moments(policy, optimizer)), strict=True):
        save_file(tensors, fresh / name)
        flush(fresh / name)
    sums = {name: checksum(fresh / name) for name in FILES}
    record = {**counters, "sha256": {**sums, "counters": _checksum_of(counters)}}
    (fresh / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    flush(fresh / "state.json")
    flush(fresh)
    remove(place)
    fresh.rename(place)
    flush(folder)
    for old in states(folder)[:-keep_last]:
        remove(old)
    return place


def _moments(policy: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers of each weight, as `name/key`; empty before its first step."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, weight in policy.named_parameters()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def states(folder: Path) -> list[Path]:
    """All states in a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest state whose files are all whole, and what is wrong with each newer one."""
    wrong: list[str] = []
    for path in reversed(states(folder)):
        problem = damage(path)
        if problem is None:
            return path, wrong
        wrong.append(f"{path}: {problem}")
    return None, wrong


def damage(path: Path) -> str | None:
    """What is wrong with a state, if anything: a file missing, cut short or changed."""
    try:
        counters = json.loads((path / "state.json").read_text(encoding="utf-8"))
        expected = counters.pop("sha256")
        if _checksum_of(counters) != expected["counters"]:
            return "state.json is damaged"
        for name in FILES:
            if not (path / name).is_file():
                return f"{name} is missing"
            if checksum(path / name) != expected[name]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json cannot be read ({error})"
    return None


def load_state(path: Path, policy: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Put weights and optimiser back as they were; returns the counters (raises UserError)."""
    try:
        weights, moments = (load_file(path / name) for name in FILES)
        counters = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"resume={path} cannot be read ({error}): choose another state") from None
    found = dict(policy.named_parameters())
    if {name: tuple(weight.shape) for name, weight in weights.items()} != {n: tuple(w.shape) for n, w in found.items()}:
        raise UserError(f"resume={path} is the state of another model: name the policy that it was made with")
    with torch.no_grad():
        for name, weight in found.items():
            weight.copy_(weights[name])
    optimizer.state.clear()
    for key, value in moments.items():
        name, _, what = key.partition("/")
        weight = found[name]
        optimizer.state[weight][what] = value.to(weight.device)
    return dict(counters)


class Snapshot:
    """Weights and optimiser as they are now, in memory, to go back to."""

    def __init__(self, policy: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.weights = [(weight, weight.detach().clone()) for weight in policy.parameters()]
        self.moments = {w: {k: v.clone() for k, v in kept.items()} for w, kept in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for weight, value in self.weights:
            weight.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.moments)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(counters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(counters, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process alone (raises UserError where another has it).

    The system gives the lock up when its holder dies, however it dies; the file only says who that is.
    """
    file = _lock_file(folder)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _lock_file(folder: Path) -> IO[str] | None:
    try:
        import fcntl
    except ImportError:  # not on every system
        return None
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"ckpt_dir={folder} is in use by {holder}: wait for it, or choose another folder") from None
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
