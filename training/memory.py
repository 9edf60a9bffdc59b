"""How many responses fit into the device's memory at once, found before the first step on the longest shapes."""

from dataclasses import replace

from config import TrainConfig, UserError

import torch

from model import ReferenceStates, Sequences
from ppo import Batch, Models, accumulate_gradients
from runtime.device import lacks_memory
from runtime.distributed import all_reduce_min, raise_on_all_ranks, world_size


def fit_micro_batches(models: Models, cfg: TrainConfig) -> TrainConfig:
    """The settings, with the largest micro-batch that fits where none is set (raises UserError where none fits).

    Micro-batches change memory and nothing else. The memory of a CPU is not tried: the system would end the process.
    """
    if cfg.micro_batch_size or models.policy.lm.device.type == "cpu":
        return cfg
    own_rows = -(-cfg.minibatch_size // world_size())
    with raise_on_all_ranks():
        own_size = largest_micro_batch(models, cfg, own_rows)
    size = int(all_reduce_min(own_size))
    if size == own_rows:
        return cfg
    print(f"{size} responses fit into memory at a time, which changes no result (micro_batch_size)")
    return replace(cfg, micro_batch_size=size)


def largest_micro_batch(models: Models, cfg: TrainConfig, rows: int) -> int:
    """The largest of rows, rows / 2, rows / 4, … that fits (raises UserError where a single response does not)."""
    moments = [torch.empty_like(p) for p in models.policy.parameters() for _ in range(2)]  # AdamW's, from step 1 on
    while not _fits(models, cfg, rows):
        if rows == 1:
            raise UserError("out of memory with a single response: lower max_prompt_len or max_new_tokens")
        rows = -(-rows // 2)
        torch.cuda.empty_cache()  # what the failed attempt held is in pieces
    del moments
    return rows


def _fits(models: Models, cfg: TrainConfig, rows: int) -> bool:
    """Whether memory suffices for the gradient of so many responses of full length."""
    try:
        own = longest_batch(models, cfg, rows * world_size())  # of which this rank takes its share
        accumulate_gradients(models.policy, own, replace(cfg, micro_batch_size=0, minibatch_size=rows))
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return False
    finally:
        models.policy.zero_grad()
    return True


def longest_batch(models: Models, cfg: TrainConfig, rows: int) -> Batch:
    """A batch of the most tokens that a minibatch can have."""
    shape, device = (rows, cfg.max_new_tokens), models.policy.lm.device
    tokens = torch.zeros(rows, cfg.max_prompt_len + cfg.max_new_tokens, dtype=torch.long, device=device)
    zeros, real = torch.zeros(shape, device=device), torch.ones(shape, dtype=torch.bool, device=device)
    support = None
    if cfg.top_k or cfg.top_p < 1:
        support = torch.ones(*shape, models.policy.lm.config.vocab_size, dtype=torch.bool, device=device)
    sequences = Sequences.of(tokens, torch.ones_like(tokens).bool(), real, zeros, cfg.temperature, support)
    ref_states = ReferenceStates.of(models.reference, sequences) if cfg.kl_in_loss else None
    return Batch(
        sequences=sequences,
        logprobs=zeros,
        values=zeros,
        advantages=zeros,
        returns=zeros,
        kl_price=torch.zeros((), device=device),
        ref_states=ref_states,
    )
