"""What any model that reads whole texts needs: padding on the right, and the longest text that fits.

Both are decided here, because what a folder says of them belongs to whatever the model was saved for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH_SETTINGS = ("max_position_embeddings", "max_seq_len")  # in config.json
ANY_LENGTH = 512  # tokens read by a model that has no limit of its own


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and attention mask (B, T), both int64, padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens, special ones included, that the model and its tokenizer take."""
    limits = [getattr(model.config, name, None) or 0 for name in LENGTH_SETTINGS]
    limits = [limit for limit in limits if limit > 0] or [ANY_LENGTH]  # XLNet's is -1
    return int(min(*limits, tokenizer.model_max_length, *_position_rows(model)))


def _position_rows(model: nn.Module) -> list[int]:
    """How many positions each table of them has; where it has a row for padding, they begin after it."""
    tables: list[Any] = [
        module for name, module in model.named_modules() if "position" in name and hasattr(module, "padding_idx")
    ]
    return [len(x.weight) - (0 if x.padding_idx is None else x.padding_idx + 1) for x in tables]
