from __future__ import annotations

import pytest
import torch

from pretrain.models.pictures.drawing import heat, overlay, sheet, to_rgb


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (6, [0, 1, 2])])
def test_any_number_of_channels_becomes_rgb(channels: int, shown: list[int]):
    pixels = torch.rand(2, channels, 4, 5)
    mean, std = tuple(0.1 * i for i in range(channels)), (0.5,) * channels
    normalized = (pixels - torch.tensor(mean).view(1, -1, 1, 1)) / 0.5
    rgb = to_rgb(normalized, mean=mean, std=std)
    assert rgb.dtype == torch.uint8
    assert (rgb.int() - (pixels[:, shown] * 255).round().int()).abs().max() <= 1


def test_what_is_out_of_range_is_clipped_and_nan_is_gray():
    rgb = to_rgb(torch.tensor([-9.0, 9.0, float("nan")]).view(1, 1, 1, 3), mean=(0.0,), std=(1.0,))
    assert rgb[0, 0, 0].tolist() == [0, 255, 128]


def test_a_sheet_shows_every_picture_in_rows():
    pictures = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 5)
    whole = sheet(pictures, gap=1)
    assert whole.shape == (3, 2 * 6, 3 * 7)
    assert whole[0, 1::6, 1::7].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (whole[:, 0] == 255).all()


def test_a_heat_map_is_brightest_at_its_maximum():
    values = torch.zeros(2, 3, 2, 4)
    values[..., 1, 2] = 0.01
    maps = heat(values, (8, 16))
    assert maps.shape == (2, 3, 3, 8, 16) and maps.dtype == torch.uint8
    assert (maps[..., 4:, 8:12] == 255).all() and not maps[..., :4, :].any()


def test_an_overlay_is_half_of_each():
    one, other = torch.full((3, 2, 2), 200, dtype=torch.uint8), torch.full((3, 2, 2), 100, dtype=torch.uint8)
    assert (overlay(one, other) == 150).all()
