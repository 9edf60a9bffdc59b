"""Attention: the kernel that computes it fastest on each device, and none that plans or errs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# cuDNN's attention plans anew for every shape, of which a step has many, and is known to return NaN gradients for some
# masks: torch must not choose it on CUDA.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of queries (B, heads, n, d) to the keys and values (B, heads, S, d) that are visible (B, 1, n, S) bool.

    In bfloat16 on the CPU the library's kernel takes 3 times as long as the formula, and 5 times for a single query.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return softmax_attention(q, k, v, visible, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The same written out; the softmax is taken in float32."""
    scores = (q * scale) @ k.mT
    scores += torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -math.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
