from __future__ import annotations

import pytest
import torch

from pretrain.models.layers.attention import Attention, Block, attend, choose


@pytest.mark.parametrize("length", [1, 17, 128, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_every_kernel_gives_the_same_attention_and_gradients(length: int, dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    results = []
    inputs = torch.randn(3, 2, 4, length, 8, dtype=dtype)
    for kernel in ("sdpa", "bmm"):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = attend(q, k, v, kernel=kernel)
        out.sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_sdpa_is_never_chosen_for_bf16_on_a_cpu():
    cpu = torch.device("cpu")
    assert {choose(cpu, torch.bfloat16, n) for n in (1, 50, 197, 1025)} == {"bmm"}
    assert choose(cpu, torch.float32, 50) == "bmm"
    assert choose(cpu, torch.float32, 197) == "sdpa"
    assert choose(torch.device("cuda"), torch.bfloat16, 50) == "sdpa"


def test_attending_for_some_tokens_equals_attending_for_all_and_dropping_the_rest():
    torch.manual_seed(0)
    attention, x = Attention(16, 4, qkv_bias=True), torch.randn(2, 9, 16)
    for queries in (slice(0, 1), slice(5, None), slice(None)):
        torch.testing.assert_close(attention(x, queries), attention(x)[:, queries], atol=1e-6, rtol=1e-5)


def test_a_block_without_qkv_bias_can_answer_for_one_token():
    torch.manual_seed(0)
    block, x = Block(16, 4, qkv_bias=False), torch.randn(2, 9, 16)
    torch.testing.assert_close(block(x, slice(0, 1)), block(x)[:, :1], atol=1e-6, rtol=1e-5)


def test_attention_probabilities_are_those_of_the_output():
    torch.manual_seed(0)
    attention, x = Attention(16, 4, qkv_bias=True), torch.randn(2, 9, 16)
    probabilities = attention.probabilities(x)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 9))
    _, _, v = attention.split_heads(x)
    out = attention.proj((probabilities @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, attention(x), atol=1e-6, rtol=1e-5)


def test_bf16_autocast_stays_near_fp32():
    torch.manual_seed(0)
    block, x = Block(32, 4), torch.randn(2, 40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = block(x)
    torch.testing.assert_close(low.float(), block(x), atol=5e-2, rtol=5e-2)
