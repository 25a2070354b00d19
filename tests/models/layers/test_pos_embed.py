from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.models.layers.pos_embed import resize, sincos_2d

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(grids, st.sampled_from([4, 8, 24]))
def test_the_first_half_knows_the_column_and_the_second_the_row(grid: tuple[int, int], dim: int):
    table = sincos_2d(dim, grid, cls_row=False).reshape(*grid, dim)
    columns, rows = table[..., : dim // 2], table[..., dim // 2 :]
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len({tuple(row) for row in table.flatten(0, 1).tolist()}) == grid[0] * grid[1]


def test_the_class_row_is_zero():
    assert not sincos_2d(8, (3, 5))[0].any()
    assert sincos_2d(8, (3, 5)).shape == (16, 8)


def test_a_width_that_is_no_multiple_of_4_is_refused():
    with pytest.raises(ValueError, match="embed_dim 6 is not a multiple of 4"):
        sincos_2d(6, (2, 2))


@given(grids, grids, st.sampled_from(["exact", "dino"]))
def test_resizing_gives_the_new_grid_and_keeps_the_class_row(old, new, how):
    table = torch.randn(1, 1 + old[0] * old[1], 4)
    resized = resize(table, old, new, how=how)
    assert resized.shape == (1, 1 + new[0] * new[1], 4)
    assert torch.equal(resized[:, 0], table[:, 0])


def test_resizing_to_the_same_grid_is_the_same_tensor():
    table = torch.randn(1, 13, 4)
    assert resize(table, (3, 4), (3, 4), how="dino") is table


def test_resizing_to_as_many_patches_in_another_shape_is_not_a_reshape():
    table = torch.randn(1, 17, 4)
    assert not torch.allclose(resize(table, (4, 4), (2, 8)), table)


def test_a_constant_table_stays_constant():
    resized = resize(torch.full((1, 17, 4), 2.5), (4, 4), (7, 3))
    torch.testing.assert_close(resized, torch.full_like(resized, 2.5))


def test_the_two_ways_of_resizing_differ():
    table = torch.randn(1, 17, 4)
    assert not torch.allclose(resize(table, (4, 4), (6, 6), how="exact"), resize(table, (4, 4), (6, 6), how="dino"))


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="16 patch rows, its grid 3 x 5 needs 15"):
        resize(torch.randn(1, 17, 4), (3, 5), (4, 4))
