"""Facts that hold for every kind of vision transformer: positions, biases, tokens, networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.backbones.vit import ViT

pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"num_registers": 2, "pos_embed": "learned"},
    "no class token": {"class_token": False, "num_registers": 1},
    "rows first": {"pos_embed": "sincos_rows_first"},
    "no positions": {"pos_embed": "none"},
    "rotary": {"pos_embed": "rope", "num_registers": 3, "layer_scale": 0.3, "ffn": "swiglu", "qkv_bias": "no_key"},
    "free rotary": {
        **{"pos_embed": "rope", "rope": {"frequencies": (7e-4, 7.0)}, "num_registers": 3, "class_token": False},
        **{"qkv_bias": False, "proj_bias": False, "ffn_bias": False, "norm_layer": "rms"},
    },
    "BEiT": {"pos_embed": "none", "rel_pos_bias": "shared", "layer_scale": 0.3, "qkv_bias": "no_key"},
    "BEiT by block": {"pos_embed": "learned", "rel_pos_bias": "per_block", "num_registers": 1, "qkv_bias": False},
    "few biases": {"proj_bias": False, "ffn_bias": False, "qk_scale": 0.6},
    "attention alone": {"pos_embed": "rope", "ffn": "identity", "qk_scale": 0.6},
    "squared": {"ffn": "relu2"},
    "few units": {"ffn": "topk", "ffn_topk": 0.25},
    "rms norms": {
        **{"pos_embed": "rope", "norm_layer": "rms", "num_registers": 2},
        **{"ffn": "swiglu", "ffn_multiple": 32, "rope": {"periods": (0.7, 8.0), "normalize": "max"}},
    },
    "BEiT, both": {"pos_embed": "none", "rel_pos_bias": "both", "qkv_bias": "no_key"},
    "bias alone": {"pos_embed": "none", "rel_pos_bias": "per_block", "class_token": False},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant: str, img_size=(16, 24), **kwargs: Any) -> ViT:
    torch.manual_seed(0)
    vit = ViT(img_size, 8, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2.0, **VARIANTS[variant] | kwargs)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return vit.eval()


def images(*size: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, *(size or (16, 24)))


@variants
def test_keeping_every_patch_in_another_order_changes_only_the_order(variant: str):
    vit, order = tiny(variant), torch.tensor([[3, 0, 5, 1, 4, 2], [5, 4, 3, 2, 1, 0]])
    prefix, whole = vit.num_prefix_tokens, vit(images())
    kept = vit(images(), keep=order)
    torch.testing.assert_close(kept[:, :prefix], whole[:, :prefix], atol=1e-5, rtol=1e-5)
    expected = whole[:, prefix:].gather(1, order[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(kept[:, prefix:], expected, atol=1e-5, rtol=1e-5)


@variants
def test_patches_that_are_not_kept_change_nothing(variant: str):
    vit, keep = tiny(variant), torch.tensor([[3, 0], [5, 1]])
    changed = images()
    changed[0, :, :8, 8:24] = 9.0  # patches 1 and 2
    assert torch.equal(vit(changed, keep=keep)[0], vit(images(), keep=keep)[0])


@variants
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (32, 32)])
def test_one_vector_of_an_image_is_exact_with_its_gradients_at_every_size(variant: str, size: tuple[int, int]):
    vit, x = tiny(variant), images(*size)
    gradients, vectors = [], []
    for cls_only in (True, False):
        vit.zero_grad()
        if cls_only:
            vector = vit.forward_cls(x)
        else:
            tokens = vit(x)
            vector = tokens[:, 0] if vit.class_token else tokens[:, vit.num_prefix_tokens :].mean(1)
        vector.square().sum().backward()
        vectors.append(vector)
        gradients.append({name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-4, rtol=1e-4, msg=name)


@variants
def test_masked_pixels_never_reach_the_blocks_and_the_mask_token_does(variant: str):
    vit, token = tiny(variant), torch.randn(1, 1, 24, requires_grad=True)
    mask = torch.tensor([[True, False, False, True, False, False], [False] * 6])
    changed = images()
    changed[0, :, :8, :8] = 9.0
    out = vit(images(), mask=mask, mask_token=token)
    assert torch.equal(out, vit(changed, mask=mask, mask_token=token))
    torch.testing.assert_close(out[1], vit(images())[1])
    assert not torch.allclose(out[0], vit(images())[0])
    out[0].square().sum().backward()
    assert token.grad is not None and token.grad.any()


@variants
def test_mask_and_keep_together_are_the_kept_part_of_the_mask(variant: str):
    vit, token = tiny(variant), torch.randn(1, 1, 24)
    mask, keep = torch.rand(2, 6) < 0.5, torch.arange(6).expand(2, -1)
    torch.testing.assert_close(
        vit(images(), keep=keep, mask=mask, mask_token=token),
        vit(images(), mask=mask, mask_token=token),
        atol=1e-5,
        rtol=1e-5,
    )


@variants
def test_layers_are_raw_and_end_with_the_output(variant: str):
    vit = tiny(variant)
    first, last = vit.layers(images(), [0, 2])
    torch.testing.assert_close(vit.norm(last), vit(images()))
    assert torch.equal(vit.layers(images(), [0])[0], first)
    assert torch.equal(vit.intermediate(images(), 3)[0], vit.norm(first))
    for wrong in ([], [2, 0], [0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="indices must ascend within 0 to 2"):
            vit.layers(images(), wrong)


@variants
def test_the_last_attention_is_that_of_the_output(variant: str):
    vit, captured = tiny(variant), []
    last = vit.blocks[-1].attn
    handle = last.proj.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    vit(images())
    handle.remove()
    probabilities = vit.last_attention(images())
    _, _, v = last.split_heads(vit.blocks[-1].norm1(vit.layers(images(), [1])[0]))
    torch.testing.assert_close((probabilities @ v).transpose(1, 2).flatten(2), captured[0], atol=1e-5, rtol=1e-5)


@variants
def test_recomputing_changes_no_gradient(variant: str):
    gradients = []
    for enabled in (False, True):
        vit = tiny(variant, drop_path_rate=0.5).train()
        vit.set_checkpointing(enabled)
        torch.manual_seed(2)
        vit(images(), keep=torch.tensor([[3, 0], [5, 1]]), drop=torch.rand(2, 3, 2)).square().mean().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=name)


@variants
def test_what_drop_path_by_subset_drops_is_in_the_numbers_alone(variant: str):
    vit, drop = tiny(variant).train(), torch.rand(2, 3, 2)
    vit.set_drop_path(0.5, uniform=True, subset=True)
    keep = torch.tensor([[3, 0], [5, 1]])
    assert [block.drop_rate for block in vit.blocks] == [0.5] * 3
    assert torch.equal(vit(images(), keep=keep, drop=drop), vit(images(), keep=keep, drop=drop))
    vit.eval()
    assert torch.equal(vit(images(), keep=keep, drop=drop), vit(images(), keep=keep))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.integers(1, 3), st.integers(1, 4))
def test_any_number_of_whole_patches_is_encoded(variant: str, rows: int, columns: int):
    vit = tiny(variant)
    assert vit(images(rows * 8, columns * 8)).shape == (2, vit.num_prefix_tokens + rows * columns, 24)


@variants
def test_what_it_provides_is_everything_it_has(variant: str):
    vit = tiny(variant)
    assert ("class_token" in vit.provides) == vit.class_token == (vit.cls_token is not None)
    assert vit.provides >= {"image", "patches", "keep", "mask", "layers"} and vit.mask_dim == vit.embed_dim


def test_a_relative_bias_starts_at_zero_and_sees_the_order():
    torch.manual_seed(0)
    vit = ViT((16, 24), 8, embed_dim=24, depth=1, num_heads=3, pos_embed="none", rel_pos_bias="shared")
    table = vit.rel_pos_bias.relative_position_bias_table
    assert not table.any()
    flipped = images().flip(3)
    even = vit.eval().forward_cls(images())
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
    assert not torch.allclose(vit.forward_cls(images()), even)
    assert not torch.allclose(vit(flipped)[:, 1:].mean(1), vit(images())[:, 1:].mean(1), atol=1e-4)


def test_outputs_of_beits_blocks_start_smaller_with_depth():
    torch.manual_seed(0)
    vit = ViT((16, 16), 8, embed_dim=192, depth=4, num_heads=3, pos_embed="none", rel_pos_bias="shared")
    stds = [block.mlp.fc2.weight.std().item() for block in vit.blocks]
    assert stds[0] / stds[3] == pytest.approx(2.0, rel=0.05)
    assert vit.blocks[0].attn.qkv.weight.abs().max() <= 0.02


def test_moco_starts_query_key_and_value_as_three_matrices():
    torch.manual_seed(0)
    vit = ViT((32, 32), 8, embed_dim=192, depth=1, num_heads=3, pos_embed="sincos_rows_first")
    assert vit.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx((6 / 384) ** 0.5, rel=0.01)
    assert vit.patch_embed.proj.weight.abs().max().item() == pytest.approx((6 / (192 + 192)) ** 0.5, rel=0.01)
    assert 0 < vit.cls_token.abs().max() < 1e-5


def test_heads_that_cannot_turn_are_named():
    with pytest.raises(ValueError, match="head dimension 6 is not a multiple of 4"):
        ViT((16, 16), 8, embed_dim=24, depth=1, num_heads=4, pos_embed="rope")


def test_class_token_and_registers_can_have_a_last_norm_of_their_own():
    vit = tiny("rms norms", cls_norm=True)
    (raw,) = vit.layers(images(), [2])
    assert vit.cls_norm is not None
    expected = torch.cat([vit.cls_norm(raw[:, :3]), vit.norm(raw[:, 3:])], dim=1)
    torch.testing.assert_close(vit(images()), expected)
    torch.testing.assert_close(vit.forward_cls(images()), expected[:, 0], atol=1e-5, rtol=1e-5)
    other = torch.nn.LayerNorm(24)
    torch.testing.assert_close(vit.forward_cls(images(), norm=other), other(raw[:, 0]), atol=1e-5, rtol=1e-5)


def test_every_block_turns_by_its_own_coordinates():
    vit, axes = tiny("rotary"), torch.tensor([0.0, 1.0]).repeat(3, 2, 1)
    assert torch.equal(vit(images(), axes=axes), vit(images()))
    for block in range(3):
        moved = axes.clone()
        moved[block, 0, 1] = 1.5
        before, after = vit.layers(images(), [0, 1, 2]), vit.layers(images(), [0, 1, 2], axes=moved)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i < block for i in range(3)]
