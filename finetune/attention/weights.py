"""The weights of the attention modules and gates of a network, where they can be read and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from timm.layers import EcaModule, SEModule  # pyright: ignore[reportPrivateImportUsage]
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn

from pretrain.models.mechanisms.mixers import Blend
from pretrain.models.mechanisms.placed import Change

Kind = Literal["attention", "gate", "router"]
Replace = Callable[[Tensor], Tensor]
_TIMM_GATES = (SEModule, EcaModule, CbamModule, CoordAttn)


@dataclass(frozen=True)
class Source:
    """A module whose weights decide what it passes on.

    Attributes:
        name: of the module. kind: what its weights are:
            "attention": probabilities [b, heads, queries, keys]; of cross-covariance attention [b, heads, channels,
            channels]. "gate": factors [b, C, H, W] of its input, read as output / input. "router": shares of the
            branches of a general block, [b, K].
    """

    name: str
    kind: Kind
    module: nn.Module

    @contextmanager
    def replaced(self, replace: Replace) -> Iterator[None]:
        """Inside it, forward passes use `replace(weights)`; `replace` may return what it is given, to read only."""
        if self.kind == "router":
            with _routed(self.module, replace):
                yield
            return
        layer: Any = self.module
        if self.kind == "attention":
            handle = layer.attn_drop.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0]),))
        else:
            handle = layer.register_forward_hook(lambda _, inputs, out: _scaled(inputs[0], out, replace))
        try:
            yield
        finally:
            handle.remove()


def sources(network: nn.Module) -> list[Source]:
    """The attention modules, gates and routers of a network, in the order of their names in it."""
    found: list[Source] = []
    gates: set[nn.Module] = set()
    for name, module in network.named_modules():
        if module in gates:
            continue
        if isinstance(module, Blend):
            if module.router is not None:
                found.append(Source(f"{name} (router)", "router", module))
            found.append(Source(name, "attention", module))
        elif hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module):
            found.append(Source(name, "attention", module))
        elif isinstance(module, Change) and module.slot == "gate":
            found.append(Source(name, "gate", module.mechanism))
            gates |= set(module.modules())
        elif isinstance(module, _TIMM_GATES):
            found.append(Source(name, "gate", module))
            gates |= set(module.modules())
    return found


@contextmanager
def readable(network: nn.Module) -> Iterator[None]:
    """Inside it, attention computes its probabilities; fused kernels have none."""
    layers: list[Any] = [source.module for source in sources(network) if source.kind == "attention"]
    before = [layer.fused_attn for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        yield
    finally:
        for layer, fused in zip(layers, before, strict=True):
            layer.fused_attn = fused


@contextmanager
def _routed(blend: Any, replace: Replace) -> Iterator[None]:
    shares = blend.shares
    blend.shares = lambda tokens: replace(shares(tokens))
    try:
        yield
    finally:
        del blend.shares


def _scaled(x: Tensor, out: Tensor, replace: Replace) -> Tensor:
    """x times the factors out / x after `replace`; a place with x = 0 passes whatever its factor is."""
    x = x.double()
    factors = (out.double() / x.where(x != 0, 1.0)).where(x != 0, 1.0)
    return (x * replace(factors)).to(out.dtype)
