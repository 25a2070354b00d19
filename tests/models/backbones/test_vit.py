from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.backbones.sizes import SIZES
from pretrain.models.backbones.vit import ViT


def tiny(img_size=(32, 48), depth=3, **kwargs) -> ViT:
    torch.manual_seed(0)
    vit = ViT(img_size, 8, embed_dim=24, depth=depth, num_heads=3, **kwargs)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("in_chans", [1, 3, 6])
def test_tokens_are_class_then_registers_then_patches(registers: int, in_chans: int):
    vit = tiny(num_registers=registers, in_chans=in_chans)
    assert vit.grid_size == (4, 6)
    assert vit(torch.randn(2, in_chans, 32, 48)).shape == (2, 1 + registers + 24, 24)
    assert vit(torch.randn(2, in_chans, 16, 64)).shape == (2, 1 + registers + 16, 24)
    assert vit.num_prefix_tokens == 1 + registers


def test_equals_timm_with_the_same_weights():
    vit = tiny(img_size=(32, 32), pos_embed="learned")
    other = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0
    ).eval()
    other.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images), other.forward_features(images), atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 24), st.integers(0, 4), st.integers(0, 2**31))
def test_keeping_patches_equals_choosing_them_before_the_first_block(kept: int, registers: int, seed: int):
    vit = tiny(num_registers=registers)
    torch.manual_seed(seed)
    images = torch.randn(2, 3, 32, 48)
    keep = torch.rand(2, 24).argsort(1)[:, :kept]
    everything = vit.prepare_tokens(images)
    prefix = everything[:, : vit.num_prefix_tokens]
    patches = everything[:, vit.num_prefix_tokens :].gather(1, keep[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(vit.prepare_tokens(images, keep), torch.cat([prefix, patches], 1), atol=1e-5, rtol=1e-5)
    assert vit(images, keep).shape == (2, vit.num_prefix_tokens + kept, 24)


def test_keeping_every_patch_in_order_changes_nothing():
    vit, images = tiny(num_registers=2), torch.randn(2, 3, 32, 48)
    keep = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(vit(images, keep), vit(images))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_class_token_alone_is_exact_with_its_gradients(depth: int):
    vit, images = tiny(depth=depth, num_registers=1), torch.randn(2, 3, 32, 48)
    gradients = []
    for features in (vit.forward_cls(images), vit(images)[:, 0]):
        vit.zero_grad()
        features.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None})
    torch.testing.assert_close(vit.forward_cls(images), vit(images)[:, 0], atol=1e-5, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-4, rtol=1e-4, msg=name)


def test_intermediate_ends_with_the_output():
    vit, images = tiny(), torch.randn(2, 3, 32, 48)
    outputs = vit.intermediate(images, 3)
    assert len(outputs) == 3
    torch.testing.assert_close(outputs[-1], vit(images))
    with pytest.raises(ValueError, match="between 1 and the depth 3"):
        vit.intermediate(images, 4)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        vit = tiny().train()
        vit.set_checkpointing(enabled)
        torch.manual_seed(1)
        vit(torch.randn(2, 3, 32, 48)).square().mean().backward()
        gradients.append([p.grad for p in vit.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_drop_path_drops_in_training_only_and_the_first_block_never():
    vit, images = tiny(drop_path_rate=0.5), torch.randn(4, 3, 32, 48)
    dropped, kept = torch.zeros(4, 3, 2), torch.ones(4, 3, 2)
    assert torch.equal(vit(images, drop=dropped), vit(images))
    vit.train()
    assert not torch.equal(vit(images, drop=dropped), vit(images, drop=kept))
    assert [block.drop_rate for block in vit.blocks] == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match=r"needs its random numbers: drop \[b, 3, 2\]"):
        vit(images)


def test_what_drop_path_drops_belongs_to_the_sample_and_not_to_its_batch():
    vit, images, drop = tiny(drop_path_rate=0.5).train(), torch.randn(4, 3, 32, 48), torch.rand(4, 3, 2)
    whole = vit.forward_cls(images, drop)
    parts = [vit.forward_cls(images[i : i + 2], drop[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(vit(images, drop=drop)[:, 0], whole)


def test_a_dropped_branch_leaves_the_sample_as_it_is_and_a_kept_one_is_scaled():
    block = tiny(drop_path_rate=0.5).train().blocks[2]
    x = torch.randn(2, 5, block.norm1.normalized_shape[0])
    uniform = torch.tensor([[0.4, 0.4], [0.6, 0.4]])
    out = block(x, slice(None), uniform)
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1], x[1] + 2 * block.attn(block.norm1(x))[1])


def test_checkpointing_drops_the_same_paths():
    gradients = []
    for enabled in (False, True):
        vit = tiny(drop_path_rate=0.5).train()
        vit.set_checkpointing(enabled)
        torch.manual_seed(1)
        vit.forward_cls(torch.randn(4, 3, 32, 48), torch.rand(4, 3, 2)).square().mean().backward()
        gradients.append(vit.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_sincos_positions_are_fixed_and_saved():
    vit = tiny()
    assert not vit.pos_embed.requires_grad and "pos_embed" in vit.state_dict()
    assert tiny(pos_embed="learned").pos_embed.requires_grad


def test_weights_start_as_in_the_papers():
    torch.manual_seed(0)
    mae = ViT((32, 32), 8, embed_dim=192, depth=1, num_heads=3).requires_grad_(False)
    bound = (6 / (192 + 768)) ** 0.5
    assert mae.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert mae.patch_embed.proj.weight.abs().max().item() == pytest.approx((6 / (192 + 192)) ** 0.5, rel=0.01)
    assert mae.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not mae.blocks[0].attn.qkv.bias.any()
    dino = ViT((32, 32), 8, embed_dim=192, depth=1, num_heads=3, pos_embed="learned").requires_grad_(False)
    assert dino.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert dino.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_trailing_pixels_are_left_out_as_by_a_strided_convolution():
    vit, images = tiny(), torch.randn(2, 3, 37, 50)
    torch.testing.assert_close(vit(images), vit(images[:, :, :32, :48]))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads 5 does not divide embed_dim 24"):
        ViT((32, 32), 8, embed_dim=24, depth=1, num_heads=5)
    with pytest.raises(ValueError, match="smaller than one patch"):
        ViT((4, 32), 8, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match=r"\[b, 3, H, W\], got \[2, 1, 32, 48\]"):
        tiny()(torch.randn(2, 1, 32, 48))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_timms(name: str):
    patch = {"vit_huge": 14, "vit_giant": 14}.get(name, 16)
    with torch.device("meta"):
        other = timm.create_model(f"{name}_patch{patch}_224", num_classes=0)
        ours = ViT((224, 224), patch, **SIZES[name], pos_embed="learned")
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in other.state_dict().items()}


def test_registers_start_near_nothing_and_apart_or_they_would_stay_the_same_for_ever():
    tokens = ViT((16, 16), 8, 3, 16, 1, 2, num_registers=3).state_dict()["reg_token"][0]
    assert tokens.abs().max() < 1e-5 and len(tokens.unique(dim=0)) == 3
