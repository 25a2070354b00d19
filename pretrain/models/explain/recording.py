"""The attention probabilities that a forward pass uses, of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextmanager
def recorded_attention(
    module: nn.Module, keep: Callable[[Tensor], Tensor] = lambda probabilities: probabilities
) -> Iterator[dict[str, Tensor]]:
    """Inside it, a forward pass of `module` leaves the probabilities of each of its attention layers [b, h, t, s].

    They are in the order of computation, by the name of the layer, before dropout, and part of the graph: a gradient
    of the output with respect to them is `torch.autograd.grad(output, list(maps.values()))`. The layers are those of
    Fovea and timm, which compute fused attention at all other times: fused attention has no probabilities. A second
    forward pass replaces those of the first. Those of cross-covariance attention are between channels.

    Args:
        keep: what stays of the probabilities of a layer.

    Raises:
        ValueError: the module has no such layer.
    """
    layers = attention_layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} has no attention layer whose probabilities could be recorded")
    maps: dict[str, Tensor] = {}
    hooks = []
    before = {name: layer.fused_attn for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.fused_attn = False
            hooks.append(layer.attn_drop.register_forward_pre_hook(partial(_keep, maps, name, keep)))
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.fused_attn = before[name]


def attention_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of `module` whose probabilities can be recorded, by name, in the order of the modules."""
    return {name: layer for name, layer in module.named_modules() if _records(layer)}


def _records(layer: Any) -> bool:
    return hasattr(layer, "fused_attn") and isinstance(getattr(layer, "attn_drop", None), nn.Module)


def _keep(
    maps: dict[str, Tensor], name: str, keep: Callable[[Tensor], Tensor], _: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    maps.pop(name, None)
    maps[name] = keep(inputs[0])
