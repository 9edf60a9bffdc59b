"""The processes of one run start alike: settings, versions and prompts are compared, weights sent to all."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from config import TrainConfig, UserError

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from reward import PythonReward, Reward, parts_of
from runtime.distributed import all_gather, world_size
from runtime.fingerprints import weights_sha256


def check_same_on_all_ranks(
    cfg: TrainConfig, policy: nn.Module, prompts: Sequence[Sequence[int]], reward: Reward
) -> None:
    """Refuse ranks that differ in settings, versions, weights, prompts or the parts of scores (raises UserError).

    The reward has been called: reward_weights without names weigh the parts that it returned in their order.
    """
    if world_size() == 1:
        return
    own = {
        **asdict(cfg),
        "resume": None,
        "weights of policy_name": weights_sha256(policy)[:12],
        "python": sys.version.split()[0],
        "parts of rm_name": [part.returned_parts for part in parts_of(reward) if isinstance(part, PythonReward)],
        "prompts of dataset": hashlib.sha256(repr(prompts).encode()).hexdigest()[:12],
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }
    main, *others = all_gather(own)
    for number, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != main[name]:
                raise UserError(
                    f"process {number} has {name}={value} where process 0 has {main[name]}: make them "
                    "alike on all machines"
                )


def broadcast_state(policy: nn.Module, optimizer: Optimizer, counters: dict[str, Any]) -> dict[str, Any]:
    """Give every rank the weights, optimiser state and counters of the main process; returns the counters."""
    if world_size() == 1:
        return counters
    names = sorted({name for state in optimizer.state.values() for name in state})
    (counters, names), *_ = all_gather((counters, names))
    for weight in policy.parameters():
        dist.broadcast(weight.data, 0)
        state = optimizer.state[weight]
        for name in names:
            if name not in state:
                shape = () if name == "step" else weight.shape
                state[name] = torch.zeros(shape, device=weight.device)
            dist.broadcast(state[name], 0)
    return counters
