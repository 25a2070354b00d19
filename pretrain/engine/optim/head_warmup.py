"""Continued pretraining: new heads train on a frozen backbone before both are trained together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.core.trainable import ParamGroup


@dataclass(frozen=True)
class HeadWarmup:
    """For the first `steps` steps only parameters whose names start with one of `prefixes` are trained."""

    prefixes: tuple[str, ...] = ()
    steps: int = 0


def freeze_backbone(groups: Sequence[ParamGroup], warmup: HeadWarmup) -> list[ParamGroup]:
    """`groups` with the parameters outside the heads in separate groups, frozen during the warm-up.

    Raises:
        ValueError: no parameter belongs to a head, so nothing would be trained.
    """
    if warmup.steps == 0:
        return list(groups)
    result: list[ParamGroup] = []
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for is_head in (True, False):
            part = [pair for pair in pairs if pair[0].startswith(warmup.prefixes) == is_head]
            if part:
                kept: ParamGroup = group.copy()
                kept["names"], kept["params"] = [name for name, _ in part], [param for _, param in part]
                if not is_head:
                    kept["name"] = f"trunk_{group['name']}"
                    kept["frozen_steps"] = max(group["frozen_steps"], warmup.steps)
                result.append(kept)
    if not any(name.startswith(warmup.prefixes) for group in groups for name in group["names"]):
        raise ValueError("init.head_warmup_steps: no head has parameters, so nothing would be trained; set it to 0")
    return result
