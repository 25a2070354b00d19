"""Checks that all ranks have equal weights: a rank with faulty memory or arithmetic drifts without any error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.core import distributed, heartbeat

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that a change of any one sum changes the sum of sums


class ReplicasDifferError(RuntimeError):
    """The weights of some ranks differ. hosts, ranks: those that differ from the majority, if there is one."""

    def __init__(self, message: str, *, hosts: list[str], ranks: list[int]):
        super().__init__(message)
        self.hosts, self.ranks = hosts, ranks


@torch.no_grad()
def sums_of_bits(parameters: Mapping[str, Tensor]) -> Tensor:
    """int64 [len(parameters)] on the CPU: the bits of each tensor, summed as integers modulo 2^64.

    The sum does not depend on the order of additions, and a change of one element always changes it.
    """
    sums = [
        (value if value.is_contiguous() else value.contiguous())
        .view(-1)
        .view(_WORDS[value.element_size()])
        .sum(dtype=torch.int64)
        for value in parameters.values()
    ]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def check_replicas(module: nn.Module, step: int, device: torch.device) -> None:
    """Compare the parameters of all ranks bit by bit; each rank sends one number.

    Not for ZeRO-3, where each rank has different partitions.

    Raises:
        ReplicasDifferError: on every rank; it names the ranks and hosts that differ, and the first tensors.
    """
    if distributed.is_alone():
        return
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    sums = sums_of_bits(parameters)
    whole = (sums * (torch.arange(len(sums)) * 2 + 1) * _FACTOR).sum().view(1)
    everyone: list[int] = cast(Any, distributed.all_gather(whole.to(device))).tolist()
    if len(set(everyone)) == 1:
        return
    rows = distributed.all_gather_object((heartbeat.host_name(), cast(Any, sums).tolist()))
    raise describe(step, list(parameters), rows)


def describe(step: int, names: Sequence[str], rows: Sequence[tuple[str, list[int]]]) -> ReplicasDifferError:
    """The error that describes which tensors differ on which ranks.

    Args:
        rows: (host, one sum for each of `names`) by rank, not all equal.
    """
    counts = Counter(tuple(sums) for _, sums in rows)
    (most, count), *_ = counts.most_common()
    known = count * 2 > len(rows)
    odd = [rank for rank, (_, sums) in enumerate(rows) if tuple(sums) != most] if known else list(range(len(rows)))
    hosts = sorted({rows[rank][0] for rank in odd})
    columns = zip(*(sums for _, sums in rows), strict=True)
    tensors = [name for name, column in zip(names, columns, strict=True) if len(set(column)) > 1]
    listed = ", ".join(tensors[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")
    who = f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} on {', '.join(hosts)}"
    if known:
        said = f"the weights of {who} differ from those of the other {count} ranks"
    else:
        said = f"the weights of {who} differ; there is no majority to show which are correct"
    message = f"step {step}: {said} ({listed}); this step was not saved: exclude that host and restart"
    return ReplicasDifferError(message, hosts=hosts if known else [], ranks=odd if known else [])
