from __future__ import annotations

import pytest
import torch

from finetune.dense import decomposed


@pytest.mark.parametrize(("grid", "sizes", "crop"), [((3, 4), (3, 4), False), ((2, 3), (5, 4), True)])
def test_the_score_of_a_pair_is_that_of_its_two_offsets_in_the_tables(
    grid: tuple[int, int], sizes: tuple[int, int], crop: bool
):
    torch.manual_seed(0)
    tables = (torch.randn(2 * sizes[0] - 1, 6), torch.randn(2 * sizes[1] - 1, 6))
    q, num_prefix = torch.randn(2, 3, 2 + grid[0] * grid[1], 6), 2
    got = decomposed.scores(q, tables, grid, num_prefix=num_prefix, crop=crop)
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    expected = torch.zeros_like(got)
    for i, (y, x) in enumerate(places, start=num_prefix):
        for j, (other_y, other_x) in enumerate(places, start=num_prefix):
            down = tables[0][y - other_y + sizes[0] - 1]
            right = tables[1][x - other_x + sizes[1] - 1]
            expected[:, :, i, j] = q[:, :, i] @ (down + right)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_larger_image_resamples_the_offsets_and_a_smaller_window_uses_the_middle_ones():
    table = torch.arange(-3.0, 4.0)[:, None]
    stretched = decomposed.along(table, 8, crop=False)[:, :, 0]
    assert stretched[7, 0] > 2.5 and stretched[0, 7] == -stretched[7, 0]
    assert stretched.diagonal().abs().max() < 1e-6
    assert decomposed.along(table, 2, crop=True)[:, :, 0].tolist() == [[0, -1], [1, 0]]


def test_a_window_larger_than_its_table_is_refused():
    with pytest.raises(ValueError, match="3 offsets do not cover 3 patches"):
        decomposed.along(torch.zeros(3, 4), 3, crop=True)
