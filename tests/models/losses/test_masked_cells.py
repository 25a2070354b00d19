from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.models.losses.masked_cells import MaskedCells


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    unit=st.sampled_from([(2, 8), (4, 4), (8, 2), (6, 3), (3, 6)]),
    seed=st.integers(0, 99),
)
def test_tokens_and_pixels_say_the_same_as_a_drawn_mask(rows: int, columns: int, unit: tuple[int, int], seed: int):
    cell, patch = unit
    side = max(unit)
    size = (rows * side, columns * side)
    total = (size[0] // cell) * (size[1] // cell)
    order = torch.rand(3, total, generator=torch.Generator().manual_seed(seed)).argsort(1)
    cells = MaskedCells(order[:, : max(1, total // 2)], size=size, cell=cell, patch=patch)

    drawn = torch.zeros(3, *size, dtype=torch.bool)
    for image, masked in enumerate(cells.masked.tolist()):
        for index in masked:
            row, column = divmod(index, size[1] // cell)
            drawn[image, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = True
    assert torch.equal(cells.pixels(), drawn)
    assert cells.num_masked_pixels == drawn.sum()
    fine = min(unit)
    assert torch.equal(
        cells.for_encoder(), drawn[:, ::fine, ::fine].flatten(1) if cell < patch else _tokens(drawn, patch)
    )
    chosen, pixels = cells.tokens_to_decode(), cells.pixels_of_tokens()
    if cell >= patch:
        assert chosen is not None and pixels is None
        there = torch.zeros(3, (size[0] // patch) * (size[1] // patch), dtype=torch.bool).scatter(1, chosen, True)
        assert torch.equal(there, _tokens(drawn, patch)) and chosen.numel() == there.sum()
    else:
        assert chosen is None and pixels is not None
        first = drawn[0, :patch, patch : 2 * patch] if columns > 1 else drawn[0, :patch, :patch]
        assert torch.equal(pixels[0, 1 if columns > 1 else 0], first.flatten())


def _tokens(drawn: torch.Tensor, side: int) -> torch.Tensor:
    return drawn[:, ::side, ::side].flatten(1)


def test_a_cell_of_two_tokens_a_side_hides_all_four():
    cells = MaskedCells(torch.tensor([[4]]), size=(32, 48), cell=16, patch=8)
    assert cells.for_encoder()[0].nonzero()[:, 0].tolist() == [2 * 6 + 2, 2 * 6 + 3, 3 * 6 + 2, 3 * 6 + 3]
