"""Drop branches of general blocks that add almost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.models.importers import State
from pretrain.models.mechanisms.places import block_places
from pretrain.models.mechanisms.routing import Routing
from pretrain.models.mechanisms.settings import GENERAL, NO_BRANCH, Placed


def unused_branches(routing: Mapping[str, Routing], threshold: float) -> dict[str, list[int]]:
    """By block, the numbers of its branches whose mean p |g| is below `threshold`; blocks without one are left out."""
    found = {
        name: [i for i, use in enumerate(of.used.mean(0).tolist()) if use < threshold] for name, of in routing.items()
    }
    return {name: branches for name, branches in found.items() if branches}


def pruned_entries(entries: Sequence[Placed], dropped: Mapping[str, Sequence[int]], depth: int) -> list[dict[str, Any]]:
    """`model.attention` without the dropped branches. Where a router chose them, it chooses "none"; a block without
    branches is the attention alone."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        places = entry.matching(block_places(depth)) if entry.where == "mixer" else []
        if not any(place in dropped for place in places):
            found.append(entry.arguments())
            continue
        blocks_by_kept: dict[tuple[int, ...], list[str]] = {}
        given = [b for b in entry.options.get("branches", (entry.kind,)) if b != NO_BRANCH]
        for place in places:
            kept = tuple(i for i in range(len(given)) if i not in dropped.get(place, ()))
            blocks_by_kept.setdefault(kept, []).append(place.split(".")[1])
        for kept, blocks in blocks_by_kept.items():
            which = blocks[0] if len(blocks) == 1 else f"({'|'.join(blocks)})"
            changed = {**entry.arguments(), "places": f"blocks.{which}.attn"}
            if entry.kind == GENERAL:
                nones = len(entry.options["branches"]) - len(kept)
                changed["branches"] = [given[i] for i in kept] + [NO_BRANCH] * nones
            if kept:
                found.append(changed)
    return found


def pruned_state(
    state: Mapping[str, Tensor], dropped: Mapping[str, Sequence[int]], names: Mapping[str, Sequence[str]]
) -> State:
    """The state of a backbone without the dropped branches.

    Args:
        names: of the branches of each block, in their order.
    """
    found = dict(state)
    for block, numbers in dropped.items():
        kept = [i for i in range(len(names[block])) if i not in numbers]
        gone = tuple(f"{block}.branches.{names[block][i]}." for i in numbers)
        if not kept:
            gone = tuple(f"{block}.{part}" for part in ("branches.", "router.", "strength"))
        found = {name: tensor for name, tensor in found.items() if not name.startswith(gone)}
        if not kept:
            continue
        found[f"{block}.strength"] = found[f"{block}.strength"][kept]
        for name in (f"{block}.router.weight", f"{block}.router.bias"):
            if name in found:
                others = list(range(len(names[block]), len(found[name])))
                found[name] = found[name][torch.tensor([*kept, *numbers, *others])]
    return found
