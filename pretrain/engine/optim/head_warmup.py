"""Continued pretraining: fresh heads learn on a trunk that stands still, before both train together."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.core.trainable import ParamGroup


def hold_trunk(groups: Sequence[ParamGroup], head_prefixes: tuple[str, ...], steps: int) -> list[ParamGroup]:
    """`groups` with every parameter outside `head_prefixes` in a group of its own that is frozen for `steps` steps.

    Raises:
        ValueError: no parameter is a head's, so nothing would train.
    """
    if steps == 0:
        return list(groups)
    result: list[ParamGroup] = []
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for is_head in (True, False):
            part = [pair for pair in pairs if pair[0].startswith(head_prefixes) == is_head]
            if part:
                kept: ParamGroup = group.copy()
                kept["names"], kept["params"] = [name for name, _ in part], [param for _, param in part]
                if not is_head:
                    kept["name"] = f"trunk_{group['name']}"
                    kept["frozen_steps"] = max(group["frozen_steps"], steps)
                result.append(kept)
    if not any(name.startswith(head_prefixes) for group in groups for name in group["names"]):
        raise ValueError("init.head_warmup_steps: no parameter is a head's, so nothing would train; set it to 0")
    return result
