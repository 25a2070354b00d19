from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.layers.attention import Block
from pretrain.models.layers.drop_path import add_to_subset, subset_size, survivors


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.floats(0, 0.99))
def test_a_subset_is_never_empty_and_never_more_than_the_batch(batch: int, rate: float):
    assert 1 <= subset_size(batch, rate) <= batch


def test_both_ways_keep_the_mean_of_the_branch():
    torch.manual_seed(0)
    branch, x = torch.randn(4000, 1, 3) + 1, torch.zeros(4000, 1, 3)
    uniform = torch.rand(4000)
    by_sample = survivors(branch, uniform, 0.4).mean((0, 1))
    chosen = uniform.topk(subset_size(4000, 0.4)).indices
    by_subset = add_to_subset(x, branch[chosen], chosen).mean((0, 1))
    torch.testing.assert_close(by_sample, branch.mean((0, 1)), atol=0.1, rtol=0)
    torch.testing.assert_close(by_subset, branch.mean((0, 1)), atol=0.1, rtol=0)


def test_a_block_by_subset_computes_the_branch_for_the_largest_numbers_only():
    torch.manual_seed(0)
    block, x = Block(16, 2).train(), torch.randn(4, 5, 16)
    block.drop_rate, block.drop_subset = 0.5, True
    seen: list[int] = []
    handle = block.attn.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    drop = torch.tensor([[0.1, 0.2], [0.9, 0.1], [0.8, 0.3], [0.2, 0.4]])
    out = block(x, drop=drop)
    handle.remove()
    assert seen == [2]
    assert torch.equal(out[0], x[0])  # in neither subset
    attended = 2 * block.attn(block.norm1(x))
    torch.testing.assert_close(out[1], x[1] + attended[1])
    torch.testing.assert_close(out[3], x[3] + 2 * block.mlp(block.norm2(x[3:4]))[0])


def test_in_evaluation_no_subset_is_taken():
    torch.manual_seed(0)
    block, x = Block(16, 2, layer_scale=0.5, ffn="swiglu").eval(), torch.randn(3, 5, 16)
    plain = block(x, slice(0, 1))
    block.drop_rate, block.drop_subset = 0.5, True
    assert torch.equal(block(x, slice(0, 1), torch.rand(3, 2)), plain)
