"""Several processes on one run, started by torchrun: how they meet, share rows, add up gradients and fail together.

Rank 0 is the main process: it writes files and prints, the others are silent. With one process everything here is
trivial. Errors that one rank meets alone would leave the others waiting for ever, hence raise_on_all_ranks.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from config import UserError

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.cli import Stopped, was_launched
from runtime.device import enough_memory, lacks_memory, resolve_device

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for a slow rank; a dead one is noticed at once


# --- joining and leaving --------------------------------------------------------------------------------------------


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the other processes if torchrun started this one, and leave them at the end.

    Raises UserError where there are more processes than GPUs or the environment does not say how to meet, Stopped where
    another process died.
    """
    if not was_launched():
        yield
        return
    device = resolve_device(device)
    check_launcher(with_gpus=device == "cuda")
    if device == "mps":
        raise UserError("device=mps works in one process only: start it without torchrun, or with --device cpu")
    gpu = torch.device("cuda", own_gpu()) if device == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except (dist.DistError, ValueError) as error:
        address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} and MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(f"{address} are no place where processes can meet ({error}): name others") from None
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        # torchrun keeps the addresses of processes that it has replaced: each restart meets under a prefix of its own
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # what is on the CPU, control messages above all, goes through gloo, which notices at once that a peer has died
    backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT, device_id=gpu)
    lost = False
    try:
        with _silence_unless_main():
            yield
    except RuntimeError as error:
        lost = _means_lost_rank(error)
        if not lost:
            raise
        message = "error: another process of this run has died; what was saved is whole, and torchrun --max-restarts N "
        message += "or --resume goes on from it"
        raise Stopped(1, message if _first_to_report(store) else "", at_once=True) from error
    finally:
        if not lost:  # else this would wait for the dead
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def check_launcher(with_gpus: bool) -> None:
    """Refuse an environment that names this process's number, but not all else that processes need to meet."""
    remedy = "start it by torchrun, which sets them all, or unset RANK and WORLD_SIZE to run one process"
    numbers = ["RANK", "WORLD_SIZE", "MASTER_PORT", *(["LOCAL_RANK", "LOCAL_WORLD_SIZE"] if with_gpus else [])]
    if missing := [name for name in ("MASTER_ADDR", *numbers) if name not in os.environ]:
        raise UserError(f"RANK and WORLD_SIZE are set without {' and '.join(missing)}: {remedy}")
    for name in numbers:
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]!r} is not a number: {remedy}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise UserError(f"RANK={os.environ['RANK']} must be less than WORLD_SIZE={os.environ['WORLD_SIZE']}: {remedy}")


def own_gpu() -> int:
    """The number of this process's GPU among those that it sees (raises UserError where there are too few).

    A launcher may show each process one GPU of its own, by CUDA_VISIBLE_DEVICES; then it is number 0.
    """
    seen, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if seen >= wanted:
        return int(os.environ["LOCAL_RANK"])
    if seen == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        return 0
    raise UserError(f"this machine has {seen} GPUs: lower --nproc_per_node")


@contextmanager
def _silence_unless_main() -> Iterator[None]:
    if is_main_process():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _means_lost_rank(error: RuntimeError) -> bool:
    if lacks_memory(error):
        return False
    words = ("gloo", "nccl", "peer", "connection", "timed out", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _first_to_report(store: dist.Store) -> bool:
    """Whether no other survivor has reported the loss yet."""
    with contextlib.suppress(Exception):  # torchrun, which keeps the store, may be gone, too
        return bool(store.add("reported", 1) == 1)
    return is_main_process()


def torchrun_job() -> str | None:
    """A name for this call of torchrun, which stays the same when it replaces processes that died."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun {os.getppid()} on {socket.gethostname()}" if name == "none" else name


# --- who is who, and whose rows are whose ---------------------------------------------------------------------------


def world_size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def rank_slice(rows: int) -> slice:
    """Which of so many rows belong to this rank."""
    return slice(rows * rank() // world_size(), rows * (rank() + 1) // world_size())


# --- collectives ----------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, rows: int) -> Tensor:
    """The rows x (b, ...) of all ranks as one tensor (rows, ...), the same on every rank."""
    if world_size() == 1:
        return x
    dtype = torch.uint8 if x.dtype == torch.bool else x.dtype
    whole = torch.zeros(rows, *x.shape[1:], dtype=dtype, device=x.device)
    whole[rank_slice(rows)] = x.to(dtype)
    dist.all_reduce(whole)  # every other rank adds exact zeros
    return whole.to(x.dtype)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of all ranks' tensors of one shape, the same on every rank."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_reduce_max(x: float) -> float:
    """The largest of all ranks' numbers."""
    if world_size() == 1:
        return x
    sent = torch.tensor([float(x)], dtype=torch.float64)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return sent.item()


def all_reduce_min(x: float) -> float:
    """The smallest of all ranks' numbers."""
    return -all_reduce_max(-x)


def all_gather(what: T) -> list[T]:
    """The objects of all ranks, in order of rank."""
    if world_size() == 1:
        return [what]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, what)
    return gathered


def gather_to_main(what: list[T]) -> list[T]:
    """The lists of all ranks as one, in the main process; nothing on the others."""
    if world_size() == 1:
        return what
    gathered: list[Any] | None = [None] * world_size() if is_main_process() else None
    dist.gather_object(what, gathered)
    return [x for items in gathered or [] for x in items]


# --- failing and starting together ----------------------------------------------------------------------------------


@contextmanager
def raise_on_all_ranks(to_lower: str = "batch_size, eval_prompts or max_new_tokens") -> Iterator[None]:
    """Raise the UserError of any rank on every rank; too little memory becomes one that names settings to lower."""
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
    for number, text in enumerate(all_gather(None if problem is None else str(problem))):
        if text is not None:
            raise UserError(text if number == 0 else f"{text} (in process {number})")


def call_on_main(work: Callable[[], T]) -> T:
    """Call work() in the main process and give every rank its result (raises its UserError on every rank)."""
    with raise_on_all_ranks():
        result = work() if is_main_process() else None
    return all_gather(result)[0]  # type: ignore[return-value]


def main_process_first(work: Callable[[], T]) -> T:
    """Call work() in the main process before the others: it may download or make what they only read."""
    problem, done = None, []
    for turn in (True, False):
        if turn == is_main_process():
            try:
                done.append(work())
            except UserError as error:  # the others must not wait for ever
                problem = error
        all_reduce_max(0.0)  # a barrier, through gloo
    if problem is not None:
        raise problem
    return done[0]


# --- gradients ------------------------------------------------------------------------------------------------------


def sum_gradients(model: nn.Module) -> None:
    """Put the sum over all ranks in place of every gradient.

    Loss and gradient of a minibatch are sums over its rows, so this is the gradient of one process with all rows.
    Tensor by tensor gloo is quicker than with one collective of all of them, which has to copy them.
    """
    if world_size() == 1:
        return
    pending = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # of a rank without rows
            parameter.grad = torch.zeros_like(parameter)
        pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for collective in pending:
        collective.wait()
