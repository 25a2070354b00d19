"""A release without the branches of general blocks that add almost nothing, and what dropping them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import State
from pretrain.models.mechanisms.pruning import pruned_entries, pruned_state, unused_branches
from pretrain.models.mechanisms.routing import observed_routing
from pretrain.models.release.folder import backbone_of


@torch.no_grad()
def pruned(
    backbone: ImageEncoder,
    heads: Mapping[str, Tensor],
    images: Tensor,
    *,
    copies: Sequence[str],
    threshold: float,
    bound: float,
) -> tuple[ImageEncoder, State, dict[str, Any]]:
    """The backbone and the heads without the branches whose mean p |g| over the images is below `threshold`.

    Args:
        images: normalized [n, C, H, W]. copies: prefixes of copies of the backbone in `heads`; they lose the same ones.
        bound: largest |f' - f| / |f| of the tokens f of an image.

    Returns:
        The backbone, the heads, and what was done, for the record.

    Raises:
        ValueError: the backbone has no branches, or the tokens of an image change by more than `bound`.
    """
    backbone.eval()
    with observed_routing(backbone) as routing:
        before = backbone(images)
    if not isinstance(backbone, ViT) or not routing:
        raise ValueError("--prune: the backbone has no branches beside its attention; leave it out")
    dropped = unused_branches(routing, threshold)
    names = {name: of.branches[: len(of.strengths)] for name, of in routing.items()}
    model = backbone.release_model()
    model["attention"] = pruned_entries(backbone.attention, dropped, backbone.depth)
    smaller = backbone_of(model).eval()
    smaller.load_state_dict(pruned_state(backbone.state_dict(), dropped, names))
    change = float(((smaller(images) - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).max())
    listed = [f"{block} {names[block][i]}" for block, numbers in dropped.items() for i in numbers]
    said = ", ".join(listed) or "none"
    if not change <= bound:
        raise ValueError(
            f"--prune: without {said} the tokens of an image change by {change:.3g} of their norm, more than "
            f"{bound:g}; lower --prune, or raise --prune-bound; nothing was written"
        )
    state = dict(heads)
    for copy in copies:
        own = {name.removeprefix(copy): state.pop(name) for name in list(state) if name.startswith(copy)}
        state |= {copy + name: tensor for name, tensor in pruned_state(own, dropped, names).items()} if own else {}
    facts = {
        "below": threshold,
        "dropped": listed,
        "images": len(images),
        "largest change of tokens": change,
        "bound": bound,
    }
    return smaller, state, facts


def pruning_report(facts: Mapping[str, Any]) -> str:
    """The facts of `pruned` as a line."""
    change, bound = facts["largest change of tokens"], facts["bound"]
    return (
        f"dropped {', '.join(facts['dropped']) or 'no branch'} (mean p |g| below {facts['below']:g} on "
        f"{facts['images']} images): the tokens of an image change by at most {change:.3g} of their norm "
        f"(bound {bound:g})"
    )
