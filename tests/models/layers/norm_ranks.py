"""What the ranks do in the tests of batch norm over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.core.distributed import World, all_gather
from pretrain.models.layers.sync_batch_norm import synchronized

BATCH = 6


def network() -> nn.Sequential:
    """Two batch norms, one over pixels; drawn anew but always the same."""
    torch.manual_seed(4)
    layers: list[Any] = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False))
    with torch.no_grad():
        layers[1].weight.normal_(1.0, 0.2)
        layers[1].bias.normal_()
    return net.double()  # so that differences are not rounding


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 + torch.randn(BATCH, 3, 6, 7, generator=generator, dtype=torch.float64)


def outcome(net: nn.Module, share: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Output, gradients of parameters and input, statistics after one training pass with a mean loss."""
    share = share.clone().requires_grad_()
    out = net(share)
    (out * target).square().mean().backward()
    assert share.grad is not None
    result = {"out": out.detach(), "input": share.grad}
    result |= {f"grad.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return result | {f"state.{name}": value for name, value in net.state_dict().items()}


def target() -> Tensor:
    return torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def both_halves(world: World, out: Path) -> Any:
    """Each rank takes its share of the batch; everything it saw goes to a file."""
    piece = slice(world.rank * BATCH // 2, (world.rank + 1) * BATCH // 2)
    result = outcome(synchronized(network()), images()[piece], target()[piece])
    save_file({name: value.contiguous() for name, value in result.items()}, out / f"rank{world.rank}.safetensors")
    norm = synchronized(nn.BatchNorm2d(3))
    low = norm(images()[piece].bfloat16()).detach()
    cast = [str(low.dtype), float(low.float().mean())]
    gathered = all_gather(torch.full((2, 3), float(world.rank)))
    tiny = synchronized(nn.BatchNorm1d(2))
    try:  # one value on each rank is two in all
        tiny(torch.full((1, 2), float(world.rank)))
        alone = "no error"
    except ValueError as error:
        alone = str(error)
    return {
        "bf16": cast,
        "gathered": gathered[:, 0].tolist(),
        "one each": alone,
    }
