"""Attention of clips in its three forms: what may see what."""

from typing import Any

import pytest
import torch

from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_strict
from pretrain.models.layers.mixer import Layout
from pretrain.models.layers.space_time import DividedBlock, SpaceAttention, TimeAttention, causal_bias
from pretrain.models.mechanisms.placement import added_names
from pretrain.models.release.folder import read_release, write_release

SLICES, PLACES = 3, 6  # 2 x 3 places
TUBES = SLICES * PLACES
FORMS: tuple[TimeAttention, ...] = ("joint", "divided", "block_causal")


def made(form: TimeAttention, **changes: Any) -> VideoViT:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_frames": 2 * SLICES}
    clip = VideoViT((16, 24), 8, time_attention=form, **sizes | changes)
    for name, parameter in clip.named_parameters():
        if "time_fc" in name:  # as after training
            torch.nn.init.normal_(parameter, std=0.2)
    return clip.eval().requires_grad_(False)


def clips(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 2 * SLICES, 3, 16, 24, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("class_token", [True, False])
def test_kept_tubes_in_any_order_give_the_tokens_of_all(form: TimeAttention, class_token: bool):
    clip, x = made(form, class_token=class_token, num_registers=1), clips()
    order = torch.stack([torch.randperm(TUBES), torch.randperm(TUBES)])
    tokens, shuffled = clip(x), clip(x, keep=order)
    prefix = clip.num_prefix_tokens
    torch.testing.assert_close(shuffled[:, :prefix], tokens[:, :prefix])
    back = order.argsort(1)[..., None].expand(-1, -1, 16)
    torch.testing.assert_close(shuffled[:, prefix:].gather(1, back), tokens[:, prefix:])
    torch.testing.assert_close(clip.forward_cls(x), tokens[:, 0] if class_token else tokens[:, prefix:].mean(1))


def test_in_space_a_patch_sees_its_own_time_and_the_prefix():
    attention = SpaceAttention(16, 2, slices=SLICES, qkv_bias=True).eval()
    layout, x = Layout((SLICES * 2, 3), 1), torch.randn(1, 1 + TUBES, 16)
    before = attention(x, layout=layout)
    x[:, 1 + PLACES : 1 + 2 * PLACES] += 1  # the second time
    changed = (attention(x, layout=layout) != before).any(dim=2)[0]
    assert changed.nonzero().flatten().tolist() == [0, *range(1 + PLACES, 1 + 2 * PLACES)]


def test_over_time_a_patch_sees_its_own_place():
    block = DividedBlock(16, 2, slices=SLICES).eval()
    layout, x = Layout((SLICES * 2, 3), 0), torch.randn(1, TUBES, 16)
    before = block._over_time(x, layout)
    x[:, 4] += 1  # a place at the first time
    changed = (block._over_time(x, layout) != before).any(dim=2)[0]
    assert changed.nonzero().flatten().tolist() == [4, 4 + PLACES, 4 + 2 * PLACES]


@pytest.mark.parametrize("keep", [None, torch.tensor([[0, 7, 13, 2, 16]])])
def test_no_patch_of_a_causal_network_sees_a_later_time(keep: torch.Tensor | None):
    clip, x = made("block_causal"), clips(1)
    before = clip(x, keep=keep)
    x[:, 4:] += 1  # the last time
    changed = (clip(x, keep=keep) != before).any(dim=2)[0]
    last = torch.arange(TUBES) if keep is None else keep[0]
    assert changed[0] and torch.equal(changed[1:], last >= 2 * PLACES)


def test_the_bias_of_a_causal_network_is_of_the_tokens_that_are_there():
    bias = causal_bias(Layout((SLICES * 2, 3), 1, torch.tensor([[12, 0]])), SLICES, torch.device("cpu"))
    assert (bias[0, 0] == 0).tolist() == [[True, True, True], [False, True, True], [False, False, True]]


def test_divided_attention_starts_as_the_image_network():
    torch.manual_seed(1)
    image = ViT((16, 24), 8, 3, 16, 2, 2, 2.0, pos_embed="learned").eval()
    one = VideoViT(
        (16, 24), 8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, num_frames=1, tubelet_size=1,
        time_attention="divided", pos_embed="learned",
    ).eval()  # fmt: skip
    load_strict(one, image.state_dict(), grid=image.grid_size, allow_missing=added_names(one))
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(one(x), image(x))


@pytest.mark.parametrize("form", FORMS)
def test_a_release_keeps_the_form(form: TimeAttention, tmp_path):
    clip = made(form)
    write_release(tmp_path / "r", clip, objective="videomae", extra_state={}, record={})
    assert torch.equal(read_release(tmp_path / "r").build().eval()(clips()), clip(clips()))
