"""Puts mechanisms into a network at the places that `model.attention` names.

Our own vision transformer has the places blocks.I, blocks.I.attn and blocks.I.mlp; its blocks give the mechanisms the
grid and the kept patches. In a model of timm's every module with maps or tokens as output is a place; there a mechanism
becomes `placed` of that module, and a hook of the module calls it, so that all other names stay timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.models.layers.attention import Attention, Block
from pretrain.models.layers.mixer import Mixer
from pretrain.models.layers.space_time import DividedBlock
from pretrain.models.mechanisms import class_of
from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.mixers import Blend, build_mixer
from pretrain.models.mechanisms.placed import Change, build_map
from pretrain.models.mechanisms.places import block_places
from pretrain.models.mechanisms.settings import Placed


def new_mixer(entry: Placed | None, dim: int, num_heads: int, *, prefix: bool, **of_attention: Any) -> Mixer:
    """The first branch of a block."""
    if entry is None:
        return Attention(dim, num_heads, **of_attention)
    return build_mixer(entry, dim, num_heads, prefix=prefix, **of_attention)


def front(entries: Sequence[Placed], in_chans: int) -> MapMechanism | None:
    """The mechanism before the network, if there is one."""
    return next((build_map(entry, in_chans) for entry in entries if entry.where == "front"), None)


def change_outputs(blocks: Sequence[Block], entries: Sequence[Placed], dim: int) -> None:
    """Put the mechanisms that change outputs into the blocks; they keep their own initial weights."""
    places = block_places(len(blocks))
    for entry in entries:
        for place in entry.matching(places) if entry.changes_outputs else ():
            _, index, *part = place.split(".")
            block = blocks[int(index)]
            if block.placed is None:
                block.placed = nn.ModuleDict()
            key = part[0] if part else "block"
            if key not in block.placed:
                block.placed[key] = nn.ModuleDict()
            cast(nn.ModuleDict, block.placed[key])[entry.kind] = Change(entry, dim)


def building_problem(entry: Placed, dim: int, num_heads: int, grid: tuple[int, int]) -> str | None:
    """Why a mechanism cannot stand in our own vision transformer of this width and grid; None: it can."""
    try:
        for mechanism in mechanisms_of(_built(entry, dim, num_heads)):
            mechanism.check_grid(grid)
    except ValueError as error:
        return f"{entry.kind}: {error}"
    return None


def weights_of(entry: Placed, dim: int, num_heads: int) -> int:
    """How many weights a mechanism adds to a block of our own vision transformer."""
    built = sum(parameter.numel() for parameter in _built(entry, dim, num_heads).parameters())
    if entry.where != "mixer":
        return built
    with torch.device("meta"):
        return built - sum(parameter.numel() for parameter in Attention(dim, num_heads).parameters())


def _built(entry: Placed, dim: int, num_heads: int) -> nn.Module:
    """It alone, without memory for its weights."""
    with torch.device("meta"):
        if entry.where == "front":
            return build_map(entry, 3)
        if entry.where == "mixer":
            return build_mixer(entry, dim, num_heads, prefix=True)
        return Change(entry, dim)


def mechanisms_of(module: nn.Module) -> list[MapMechanism]:
    """The mechanisms below a module."""
    return [m for m in module.modules() if isinstance(m, MapMechanism)]


def added_names(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the tensors below a module that the same network without mechanisms, or without time, lacks: they may
    be missing in the weights that it starts from."""
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, Change) or name.rpartition(".")[2] == "front":
            found.append(f"{name}.")
        elif isinstance(part, Blend):
            found += [f"{name}.{added}" for added in ("branches.", "router.", "strength")]
        elif isinstance(part, DividedBlock):
            found += [f"{name}.{added}" for added in ("time_norm.", "time_attn.", "time_fc.")]
    return tuple(found)


def into_network(
    network: nn.Module, entries: Sequence[Placed], shape: tuple[int, int, int], *, channels_last: bool
) -> None:
    """Put mechanisms into a network of any kind.

    Args:
        shape: channels, height and width of its images. channels_last: its maps are [b, H, W, C], not [b, C, H, W].

    Raises:
        ValueError: a place is no module of it, or the mechanism cannot stand there.
    """
    for entry in entries:
        names = [name for name, _ in network.named_modules() if name]
        try:
            if entry.where == "mixer":
                raise ValueError("a mixer stands in our own vision transformer only, vit_tiny to vit_giant")
            if entry.where == "front":
                continue
            found = entry.matching(names)
            for place in found if entry.where == "conv" else ():
                network.set_submodule(place, _in_place_of(network.get_submodule(place), entry, place))
            if entry.changes_outputs:
                for place, output in _outputs(network, found, shape).items():
                    _change_output(network.get_submodule(place), place, entry, output, channels_last)
        except ValueError as error:
            raise ValueError(f"{entry.kind}: {error}") from None


def _in_place_of(module: nn.Module, entry: Placed, place: str) -> nn.Module:
    if not isinstance(module, nn.Conv2d):
        raise ValueError(f"places: {place} is a {type(module).__name__}; it stands in place of a convolution")
    if isinstance(module.padding, str):
        raise ValueError(f"places: {place} has padding {module.padding!r}; choose a convolution with numbers")
    kernel, stride, dilation = map(_one, (module.kernel_size, module.stride, module.dilation))
    return class_of(entry.kind)(
        module.in_channels,
        module.out_channels,
        kernel,
        stride=stride,
        padding=_one(module.padding),
        dilation=dilation,
        groups=module.groups,
        bias=module.bias is not None,
        **entry.options,
    )


def _one(pair: tuple[int, ...]) -> Any:
    """A number where both sides are equal."""
    return pair[0] if len(set(pair)) == 1 else pair


def _outputs(network: nn.Module, places: Sequence[str], shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """What the modules give for an image of zeros, by their places."""
    found: dict[str, Tensor] = {}

    def keep(place: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            found[place] = output

        return hook

    handles = [network.get_submodule(place).register_forward_hook(keep(place)) for place in places]
    training = network.training
    try:
        with torch.no_grad():
            device = next(network.parameters()).device
            cast(Any, network.eval()).forward_features(torch.zeros(1, *shape, device=device))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    for place in places:
        if not isinstance(found.get(place), Tensor) or found[place].ndim not in (3, 4):
            raise ValueError(f"places: {place} gives no maps and no tokens; choose a block, a stage or a layer of one")
    return found


def _change_output(module: Any, place: str, entry: Placed, output: Tensor, channels_last: bool) -> None:
    dim = output.shape[-1] if output.ndim == 3 or channels_last else output.shape[1]
    if output.ndim == 3 and entry.reads == "grid":
        raise ValueError(f"places: {place} gives tokens, and it reads maps; use a convolutional network or our own ViT")
    change = Change(entry, dim)
    if output.ndim == 4:
        rows, columns = output.shape[1:3] if channels_last else output.shape[2:]
        for mechanism in mechanisms_of(change):
            mechanism.check_grid((rows, columns))
    placed = getattr(module, "placed", None)
    if not isinstance(placed, Changes):
        placed = Changes(channels_last=channels_last)
        module.add_module("placed", placed)
        if not isinstance(module, nn.Sequential):  # a sequence calls what is added to it
            module.register_forward_hook(_through_placed)
    if entry.kind in dict(placed.named_children()):
        raise ValueError(f"places: {place} has {entry.kind} already; one of the two at a place")
    placed.add_module(entry.kind, change)


class Changes(nn.Module):
    """Mechanisms at one place of a model of timm's, one after the other.

    Args:
        channels_last: maps are [b, H, W, C] there, not [b, C, H, W].
    """

    def __init__(self, *, channels_last: bool):
        super().__init__()
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        for change in cast(Any, self.children()):
            if x.ndim == 3:
                x = change.tokens(x)
            elif self.channels_last:
                x = change(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            else:
                x = change(x)
        return x


def _through_placed(module: Any, _: Any, output: Tensor) -> Tensor:
    return module.placed(output)
