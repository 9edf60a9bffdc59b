"""Several processes on one run, started by torchrun: how they meet, agree and leave.

Process 0 writes and speaks; the others are silent. What each does with its share of the rows is in utils.py and ppo.py.
"""

import contextlib
import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar

from config import TrainConfig, UserError  # isort: skip  (before torch: see there)

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from utils import enough_memory, is_first, meeting_place, rank, resolve_device, world_size

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # with a process that is slow; one that died is noticed at once


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the other processes, if torchrun started this one; leave them at the end (raises UserError)."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():  # some machines set the latter for no reason
        yield
        return
    cuda = resolve_device(device) == "cuda"
    if cuda:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        # torchrun then keeps the addresses of processes that it has replaced since: the living meet apart from the dead
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        with contextlib.ExitStack() as silence:
            if not is_first():
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    except RuntimeError as error:  # gloo's and NCCL's way of saying that another process is gone
        if isinstance(error, torch.OutOfMemoryError) or not _says_that_one_is_gone(error):
            raise
        if _first_to_tell(store):
            print("error: another process of this run has died; what was saved is whole, and torchrun --max-restarts N "
                  "or --resume goes on from it", file=sys.__stderr__, flush=True)  # fmt: skip
        os._exit(1)  # leaving in good order would mean waiting for the dead
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _says_that_one_is_gone(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "peer", "connection", "timed out", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _first_to_tell(store: dist.Store) -> bool:
    """Whether no other survivor has said it yet."""
    with contextlib.suppress(Exception):  # torchrun, which keeps the store, may be gone, too
        return bool(store.add("told", 1) == 1)
    return is_first()


def job() -> str | None:
    """What tells one call of torchrun from another, and stays the same when it replaces processes that died."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun {os.getppid()} on {socket.gethostname()}" if name == "none" else name


@contextmanager
def together(to_lower: str = "batch_size, eval_prompts or max_new_tokens") -> Iterator[None]:
    """What fails with a UserError, or for want of memory, in one process fails in all."""
    problem = None
    try:
        with enough_memory(to_lower):
            yield
    except UserError as error:
        problem = error
    if world_size() == 1:
        if problem is not None:
            raise problem
        return
    for who, text in enumerate(_told_by_all(None if problem is None else str(problem))):
        if text is not None:
            raise UserError(text if who == 0 else f"{text} (in process {who})")


def first_then_others(work: Callable[[], T]) -> T:
    """Let process 0 do it before the others: it may download or make what they only read."""
    problem, done = None, []
    for turn in (True, False):
        if turn == is_first():
            try:
                done.append(work())
            except UserError as error:  # the others must not wait for ever
                problem = error
        if world_size() > 1:
            dist.barrier()
    if problem is not None:
        raise problem
    return done[0]


def all_alike(cfg: TrainConfig, policy: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse processes that differ in settings, versions, weights or prompts (raises UserError)."""
    if world_size() == 1:
        return
    weights = hashlib.sha256()
    for weight in policy.state_dict().values():
        weights.update(weight.detach().float().cpu().numpy().tobytes())
    own = {**asdict(cfg), "resume": None, "weights of policy_name": weights.hexdigest()[:12],
           "python": sys.version.split()[0],
           "prompts of dataset": hashlib.sha256(repr(prompts).encode()).hexdigest()[:12],
           **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}}  # fmt: skip
    everyone = _told_by_all(own)
    for who, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                raise UserError(f"process {who} has {name}={value} where process 0 has {everyone[0][name]}: make them "
                                "alike on all machines")  # fmt: skip


def hand_out(policy: nn.Module, optimizer: Optimizer, told: dict[str, Any]) -> dict[str, Any]:
    """Give every process the weights, optimiser and counters that process 0 has; returns the counters."""
    if world_size() == 1:
        return told
    keys = sorted({key for kept in optimizer.state.values() for key in kept})
    (told, keys), *_ = _told_by_all((told, keys))
    for weight in policy.parameters():
        dist.broadcast(weight.data, 0)
        for key in keys:
            kept = optimizer.state[weight]
            if key not in kept:
                kept[key] = torch.zeros_like(weight) if key != "step" else torch.zeros((), device=weight.device)
            there = kept[key].to(meeting_place())
            dist.broadcast(there, 0)
            kept[key].copy_(there)
    return told


def _told_by_all(what: T) -> list[T]:
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, what)
    return found


def gather_to_first(what: list[T]) -> list[T]:
    """The lists of all processes as one, in process 0; nothing in the others."""
    if world_size() == 1:
        return what
    found: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(what, found)
    return [x for part in found or [] for x in part]
