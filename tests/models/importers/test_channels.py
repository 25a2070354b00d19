"""Weights of 3 channels for images of others, by each rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.models.importers.channels import to_channels

WEIGHT = torch.rand(4, 3, 2, 2)


def made(in_chans: int, rule: Any) -> torch.Tensor:
    state, line = to_channels(
        {"proj": WEIGHT, "other": WEIGHT[:, :, 0]}, {"proj": torch.zeros(4, in_chans, 2, 2)}, rule
    )
    assert f"3 channels became {in_chans} (channels_from: {rule})" in line and state["other"] is not None
    return state["proj"]


@pytest.mark.parametrize(("in_chans", "rule"), [(1, "mean"), (13, "mean"), (4, "repeat"), (13, "repeat"), (13, "zero")])
def test_an_image_of_equal_channels_has_the_output_of_its_gray(in_chans: int, rule: Any):
    torch.testing.assert_close(made(in_chans, rule).sum(1), WEIGHT.sum(1))


def test_repeat_takes_the_channels_in_turn_and_zero_keeps_them():
    repeated, grown = made(6, "repeat"), made(5, "zero")
    torch.testing.assert_close(repeated, WEIGHT.repeat(1, 2, 1, 1) / 2)
    assert grown[:, :3].equal(WEIGHT) and not grown[:, 3:].any()


def test_a_missing_rule_and_fewer_channels_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="for 3 channels, the images have 5: channels_from=mean, repeat or zero"):
        made(5, None)
    for rule in ("repeat", "zero"):
        with pytest.raises(ValueError, match=f"{rule} adds channels to 3, the images have 1; take mean"):
            made(1, rule)
