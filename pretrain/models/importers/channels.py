"""The first layer of weights for another number of channels, by a stated rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.core.images import ChannelRule


def other_channels(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The names of the first layers, weights [D, C, ...], whose channels differ from those of a network's `own`."""
    return [
        name
        for name, weight in state.items()
        if name in own and weight.ndim == own[name].ndim == 4
        if weight.shape[1] != own[name].shape[1] and weight.shape[0] == own[name].shape[0]
    ]


def to_channels(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], rule: ChannelRule | None
) -> tuple[dict[str, Tensor], str]:
    """The state with the first layer of a network of other channels, and a line for the report.

    With mean (each channel has the mean weight of the old ones) and repeat (the old ones in turn) the weights of all
    channels have the sum that they had: an image whose channels are all equal has the output of that image in gray.
    zero keeps the old channels, and those after them start at 0.

    Args:
        own: the state of that network, which tells the first layer, see `other_channels`.

    Raises:
        ValueError: no rule is given, it does not apply, or the channels are not those of one first layer.
    """
    found = other_channels(state, own)
    if len(found) != 1:
        raise ValueError(f"no single layer reads the channels of images ({', '.join(found) or 'none found'})")
    weight = state[found[0]].float()
    before, in_chans = weight.shape[1], own[found[0]].shape[1]
    if rule is None:
        raise ValueError(
            f"its weights are for {before} channels, the images have {in_chans}: channels_from=mean, repeat or zero "
            "makes a first layer for them"
        )
    if rule != "mean" and in_chans < before:
        raise ValueError(f"channels_from: {rule} adds channels to {before}, the images have {in_chans}; take mean")
    if rule == "zero":
        made = torch.cat([weight, weight.new_zeros(len(weight), in_chans - before, *weight.shape[2:])], dim=1)
    elif rule == "repeat":
        turn = torch.arange(in_chans) % before
        made = weight[:, turn] / turn.bincount()[turn].view(1, -1, 1, 1)
    else:
        made = weight.mean(dim=1, keepdim=True).repeat(1, in_chans, 1, 1) * (before / in_chans)
    line = f"{found[0]}: {before} channels became {in_chans} (channels_from: {rule})"
    return {**state, found[0]: made.to(state[found[0]].dtype)}, line
