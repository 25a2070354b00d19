"""A pruned release computes what the branches that it kept compute, and says what the others cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.release.pruned import pruned, pruning_report

GENERAL = {"kind": "general", "places": "blocks.*.attn", "branches": ["external", "none", "xca"]}


def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def backbone(**changes: Any) -> ViT:
    """Both branches are used in block 0, xca alone in block 1, none in block 2."""
    torch.manual_seed(0)
    vit = ViT((16, 16), 8, 3, 16, 3, 2, 2.0, attention=[GENERAL | changes]).eval()
    for index, block in enumerate(vit.blocks):
        attn: Any = block.attn
        if attn.router is not None:
            torch.nn.init.normal_(attn.router.weight, std=0.5)
            torch.nn.init.normal_(attn.router.bias, std=0.1)
        for branch in range(len(attn.strength)):
            is_used = branch == 1 if index == 1 else index == 0
            attn.strength.data[branch] = 0.5 if is_used else 0.0
    return vit


def prune(vit: ViT, **changes: Any) -> Any:
    given: dict[str, Any] = {"copies": (), "threshold": 0.02, "bound": 1e-5}
    return pruned(vit, {}, images(), **given | changes)


@pytest.mark.parametrize("choice", ["soft", "hard", "uniform"])
def test_branches_without_strength_are_dropped_and_the_features_stay(choice: str, tmp_path: Path):
    vit = backbone(choice=choice)
    smaller, _, facts = prune(vit)
    without_strength = ["blocks.1.attn external", "blocks.2.attn external", "blocks.2.attn xca"]
    never_chosen = {"blocks.0.attn external"} if choice == "hard" else set()
    assert set(facts["dropped"]) == {*without_strength, *never_chosen}
    torch.testing.assert_close(smaller(images()), vit(images()))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in vit.parameters())
    places = {entry.places: entry.options["branches"] for entry in smaller.attention}
    if choice == "hard":
        assert places == {"blocks.(0|1).attn": ("xca", "none", "none")}
    else:
        assert places == {"blocks.0.attn": ("external", "xca", "none"), "blocks.1.attn": ("xca", "none", "none")}
    folder = write_release(tmp_path / "release", smaller, objective="mae", extra_state={}, record={"pruned": facts})
    opened = read_release(folder)
    torch.testing.assert_close(opened.build().eval()(images()), vit(images()))
    assert opened.record["pruned"]["dropped"] == facts["dropped"]


def test_without_any_branch_it_is_a_vit_that_timm_opens(tmp_path: Path):
    smaller, _, facts = prune(backbone(), threshold=9.0, bound=9.0)
    assert smaller.attention == () and len(facts["dropped"]) == 6
    assert (write_release(tmp_path / "r", smaller, objective="mae", extra_state={}, record={}) / "config.json").exists()


def test_what_changes_the_features_by_more_than_the_bound_is_refused_with_the_number():
    with pytest.raises(ValueError, match=r"blocks.0.attn external.* change by 0.* more than 1e-05; lower --prune"):
        prune(backbone(), threshold=9.0)
    _, _, facts = prune(backbone(), threshold=9.0, bound=2.0)
    assert 1e-5 < facts["largest change of tokens"] < 2
    assert "change by at most 0." in pruning_report(facts) and "(bound 2)" in pruning_report(facts)


def test_copies_in_the_heads_lose_the_same_branches():
    vit = backbone()
    heads = {f"student.{name}": tensor for name, tensor in vit.state_dict().items()} | {"head": torch.ones(1)}
    smaller, state, _ = pruned(vit, heads, images(), copies=("student.",), threshold=0.02, bound=1e-5)
    assert state.keys() == {f"student.{name}" for name in smaller.state_dict()} | {"head"}


def test_a_mixer_beside_the_attention_is_dropped_too_and_a_plain_backbone_refused():
    torch.manual_seed(0)
    entry = {"kind": "xca", "places": "blocks.*.attn"}
    vit = ViT((16, 16), 8, 3, 16, 2, 2, 2.0, attention=[entry]).eval()
    vit.blocks[1].attn.strength.data.fill_(0.3)  # type: ignore[union-attr]
    smaller, _, facts = prune(vit)
    assert facts["dropped"] == ["blocks.0.attn xca"] and [e.places for e in smaller.attention] == ["blocks.1.attn"]
    with pytest.raises(ValueError, match="no branches beside its attention"):
        prune(ViT((16, 16), 8, 3, 16, 2, 2, 2.0))
