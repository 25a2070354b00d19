from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.dense import windows
from finetune.dense.plain import PlainDense
from pretrain.models.backbones.vit import ViT

sides = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(rows=sides, columns=sides, high=sides, wide=sides, num_prefix=st.integers(0, 2))
def test_joining_windows_inverts_splitting_them(rows: int, columns: int, high: int, wide: int, num_prefix: int):
    grid, window = (rows, columns), (min(high, rows), min(wide, columns))
    x = torch.randn(2, num_prefix + rows * columns, 3, dtype=torch.float64)
    split = windows.split(x, grid, window, num_prefix=num_prefix)
    assert split.shape == (2 * windows.count(grid, window), num_prefix + window[0] * window[1], 3)
    joined = windows.join(split, grid, window, num_prefix=num_prefix)
    torch.testing.assert_close(joined[:, num_prefix:], x[:, num_prefix:], rtol=0, atol=0)
    torch.testing.assert_close(joined, x)


@settings(max_examples=40, deadline=None)
@given(rows=sides, columns=sides, high=sides, wide=sides)
def test_every_patch_is_in_one_window_and_other_places_are_empty(rows: int, columns: int, high: int, wide: int):
    grid, window = (rows, columns), (min(high, rows), min(wide, columns))
    numbers = torch.arange(1.0, rows * columns + 1).view(1, -1, 1)
    split = windows.split(numbers, grid, window)[..., 0]
    empty = windows.empty_places(grid, window)
    filled = split[split > 0] if empty is None else split[~empty]
    assert sorted(filled.tolist()) == numbers.flatten().tolist()
    if empty is not None:
        assert (split[empty] == 0).all()
        assert not empty.all(1).any(), "a window without a place has nothing to attend to"


def vit(**options: object) -> ViT:
    torch.manual_seed(0)
    made = ViT((32, 32), 8, 3, 32, 3, 4, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.eval()


def same_window(grid: tuple[int, int], side: int) -> torch.Tensor:
    """bool [N, N], written down place by place."""
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    return torch.tensor([[(a // side, b // side) == (c // side, d // side) for c, d in places] for a, b in places])


POSITIONS = [
    {"pos_embed": "learned"},
    {"pos_embed": "rope"},
    {"pos_embed": "rope", "rope": {"frequencies": (7e-4, 7.0)}},
    {"pos_embed": "none", "rel_pos_bias": "shared", "qkv_bias": "no_key"},
    {"pos_embed": "none", "rel_pos_bias": "per_block", "layer_scale": 0.5},
]


@pytest.mark.parametrize("positions", POSITIONS, ids=lambda p: p.get("rel_pos_bias", p["pos_embed"]))
@pytest.mark.parametrize(("height", "width"), [(32, 48), (40, 29), (16, 64)])
def test_windowed_attention_is_global_attention_with_a_mask(positions: dict[str, object], height: int, width: int):
    backbone, side = vit(class_token=False, **positions), 3
    local, whole = PlainDense(backbone, window=side, global_blocks=(2,)), PlainDense(backbone)
    x, grid = local.prepare(torch.randn(2, 3, height, width))
    mask = same_window(grid, side)[None, None]
    for index in (0, 1):
        expected = whole.block(index, x, grid, mask=mask)
        torch.testing.assert_close(local.block(index, x, grid), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS[:2], ids=lambda p: p["pos_embed"])
def test_the_class_token_and_registers_join_every_window_and_are_averaged(positions: dict[str, object]):
    backbone = vit(num_registers=1, **positions)
    dense = PlainDense(backbone, window=2, global_blocks=(2,))
    x, grid = dense.prepare(torch.randn(2, 3, 32, 48))
    turns = dense._geometry(grid, 1, 0, is_global=True).rotations
    prefix, patches = [], torch.zeros(2, *grid, 32)
    for top in range(0, grid[0], 2):
        for left in range(0, grid[1], 2):
            places = [2 + (top + dy) * grid[1] + left + dx for dy in range(2) for dx in range(2)]
            tokens = [0, 1, *places]
            own = None if turns is None else turns[:, :, :, tokens]
            out = backbone.blocks[0](x[:, tokens], rotation=own)
            prefix.append(out[:, :2])
            patches[:, top : top + 2, left : left + 2] = out[:, 2:].unflatten(1, (2, 2))
    expected = torch.cat([torch.stack(prefix).mean(0), patches.flatten(1, 2)], dim=1)
    torch.testing.assert_close(dense.block(0, x, grid), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS, ids=lambda p: p.get("rel_pos_bias", p["pos_embed"]))
def test_windows_as_large_as_the_image_are_plain_attention(positions: dict[str, object]):
    backbone, images = vit(**positions), torch.randn(2, 3, 40, 29)
    expected = PlainDense(backbone)(images)[0]
    torch.testing.assert_close(PlainDense(backbone, window=9)(images)[0], expected, atol=2e-5, rtol=1e-4)
