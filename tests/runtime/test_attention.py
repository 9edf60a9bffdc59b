"""Attention written out against the library's kernel."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_policy, sample
from torch import Tensor

from model import visible_keys
from runtime import attention
from runtime.attention import softmax_attention


def attention_case(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as the model lays them out in memory, and the keys visible to each query."""
    rows, heads, n, d = 3, 4, 24, 16
    q, k, v = torch.randn(rows, n, 3, heads, d, dtype=dtype).permute(2, 0, 3, 1, 4)
    mask = torch.arange(n) >= torch.tensor([[0], [5], [23]])  # the last row is all padding but one
    visible = visible_keys(torch.ones_like(mask) if case == "causal" else mask)
    if case == "one query":  # the sampler's: a single column, and the cache
        return q[:, :, -1:], k.contiguous(), v.contiguous(), mask[:, None, None, :]
    if case == "last columns":
        return q[:, :, 15:], k, v, visible[..., 15:, :]
    return q, k, v, visible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["padded", "causal", "last columns", "one query"])
def test_attention_written_out_equals_the_library_kernel(case: str, dtype: torch.dtype) -> None:
    """Values and gradients, against float32 on the same numbers; bfloat16 errs by its 8 bits of mantissa."""
    *inputs, visible = attention_case(case, dtype)
    found, expected = (
        [x.detach().requires_grad_() for x in inputs],
        [x.float().detach().requires_grad_() for x in inputs],
    )
    out = softmax_attention(*found, visible, 0.4)
    kernel = F.scaled_dot_product_attention(*expected, attn_mask=visible, scale=0.4)
    assert out.dtype == dtype
    slope = torch.randn(out.shape, dtype=dtype)
    out.backward(slope)
    kernel.backward(slope.float())
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    for a, b in zip([out, *(x.grad for x in found)], [kernel, *(x.grad for x in expected)], strict=True):
        assert b.abs().max() > 0.1
        assert (a - b).abs().max() <= tolerance * b.abs().max()
        assert (a - b).square().mean().sqrt() <= tolerance / 2 * b.square().mean().sqrt()


def test_attention_is_written_out_in_bfloat16_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    original = attention.softmax_attention
    monkeypatch.setattr(attention, "softmax_attention", lambda q, *rest: calls.append(q.dtype) or original(q, *rest))
    policy = make_policy()
    sample(policy)
    assert not calls
    policy.dtype = torch.bfloat16
    policy.evaluate_responses(sample(policy))
    assert set(calls) == {torch.bfloat16}
