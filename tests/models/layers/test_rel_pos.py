from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.beit import gen_relative_position_index

from pretrain.models.layers.rel_pos import bias_of, keep_pairs, new_table, num_rows, relative_index, resize_table

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=20, deadline=None)
@given(GRIDS)
def test_pairs_have_the_rows_that_beit_gives_them(grid: tuple[int, int]):
    assert torch.equal(relative_index(grid, 1), gen_relative_position_index(grid))


@settings(max_examples=20, deadline=None)
@given(GRIDS, st.integers(0, 3))
def test_every_row_is_used_and_no_other(grid: tuple[int, int], prefix: int):
    index = relative_index(grid, prefix)
    assert index.shape == (prefix + grid[0] * grid[1],) * 2
    expected = num_rows(grid) - (0 if prefix else 3)
    assert index.unique().tolist() == list(range(expected))


def test_patches_at_the_same_distance_share_a_row():
    index = relative_index((3, 4), 0)
    place = lambda y, x: y * 4 + x  # noqa: E731
    assert index[place(0, 0), place(1, 2)] == index[place(1, 1), place(2, 3)]
    assert index[place(0, 0), place(1, 2)] != index[place(1, 2), place(0, 0)]


def test_a_kept_pair_has_the_bias_of_that_pair():
    torch.manual_seed(0)
    table, index = torch.randn(num_rows((2, 3)), 4), relative_index((2, 3), 1)
    tokens = torch.tensor([[0, 5, 2], [0, 1, 6]])
    kept, whole = bias_of(table, keep_pairs(index, tokens)), bias_of(table, index)[0]
    assert kept.shape == (2, 4, 3, 3)
    for image in range(2):
        rows = tokens[image]
        assert torch.equal(kept[image], whole[:, rows][:, :, rows])


def test_a_resized_table_keeps_the_middle_the_symmetry_and_the_last_rows():
    torch.manual_seed(0)
    table = torch.randn(num_rows((3, 3)), 2)
    image = table[:-3].unflatten(0, (5, 5))
    table = torch.cat([(image + image.flip(0, 1)).flatten(0, 1), table[-3:]])
    new = resize_table(table, (3, 3), (5, 7))
    assert new.shape == (num_rows((5, 7)), 2) and torch.equal(new[-3:], table[-3:])
    image = new[:-3].unflatten(0, (9, 13))
    torch.testing.assert_close(image, image.flip(0, 1))
    torch.testing.assert_close(image[4, 6], table[12])
    assert resize_table(table, (3, 3), (3, 3)) is table


def test_a_table_of_another_grid_is_named():
    with pytest.raises(ValueError, match="table has 28 rows, its grid 2 x 2 needs 12"):
        resize_table(torch.zeros(28, 2), (2, 2), (4, 4))


def test_a_new_table_changes_nothing():
    assert not new_table((2, 2), 3).any()
