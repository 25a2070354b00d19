"""Every mechanism of the table, in a network that is trained."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from launch.pages.attention import entry as usual_entry
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_strict
from pretrain.models.layers.mixer import Mixer
from pretrain.models.mechanisms import ATTENTION, MECHANISMS, Slot, class_of
from pretrain.models.mechanisms.contract import ConvMechanism, MapMechanism
from pretrain.models.mechanisms.mixers import Blend
from pretrain.models.mechanisms.placement import added_names
from pretrain.objectives import OBJECTIVES, build
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch

WIDE = Shape(size=(64, 64))
SMALLER: dict[str, dict[str, Any]] = {
    "general": {"branches": ["xca", "lka", "none"]},
    "hamburger": {"inner_dim": 32, "num_bases": 8},
    "ema_unit": {"num_bases": 8},
    "external": {"num_slots": 8},
}
CASES = [(name, slot) for name, entry in MECHANISMS.items() for slot in entry.slots if name != ATTENTION]


def entry(name: str, slot: Slot, **more: Any) -> dict[str, Any]:
    return {**usual_entry(name, slot), **SMALLER.get(name, {}), **more}


def network(slot: Slot, *attention: dict[str, Any]) -> Backbone:
    torch.manual_seed(0)
    if slot == "conv":
        return TimmBackbone("test_resnet", (64, 64), attention=attention)
    return ViT((64, 64), 8, 3, 32, 2, 2, 2.0, attention=attention)


def objective_of(slot: Slot, backbone: Backbone) -> Any:
    name = "dino" if slot in ("conv", "front") else "simmim"
    return build(name)(OBJECTIVES[name](**SMALL[name]), backbone, HORIZON)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_class_has_the_signature_of_its_slots(name: str):
    found, slots = class_of(name), MECHANISMS[name].slots
    parameters = inspect.signature(found).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    assert takes_any or name == "general" or set(MECHANISMS[name].options) <= set(parameters)
    if "conv" in slots:
        assert issubclass(found, ConvMechanism)
    elif issubclass(found, Mixer):
        assert slots == ("mixer",)
        assert list(inspect.signature(found.forward).parameters) == list(inspect.signature(Mixer.forward).parameters)
    else:
        assert issubclass(found, MapMechanism) and next(iter(parameters)) == "dim"


@pytest.mark.parametrize(("name", "slot"), [case for case in CASES if case[1] not in ("conv", "front")])
def test_it_starts_exactly_as_the_network_without_it(name: str, slot: Slot):
    plain, placed = network(slot).eval(), network(slot, entry(name, slot)).eval()
    load_strict(placed, plain.state_dict(), allow_missing=added_names(placed))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(placed(images), plain(images))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slot"), CASES)
def test_it_trains_all_its_weights_and_evaluates_alike_twice(name: str, slot: Slot):
    objective = objective_of(slot, network(slot, entry(name, slot)))
    given, losses = batch(objective, WIDE), []
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), 3e-3)
    torch.manual_seed(1)
    for step in range(6):
        loss = objective(given, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert [name for name, p in trained.items() if p.grad is None] == []
        optimizer.step()
        objective.after_step(step + 1)
        losses.append(loss.item())
    still = [n for n in before if torch.equal(before[n], trained[n]) and ".prefix." not in n]
    assert not [n for n in still if ".placed." in n or ".branches." in n or ".conv2." in n]
    assert slot in ("conv", "front") or losses[-1] < losses[0]
    objective.eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(objective.backbone.forward_cls(images), objective.backbone.forward_cls(images))


@pytest.mark.parametrize(("name", "slot"), CASES)
def test_a_release_rebuilds_it(name: str, slot: Slot):
    backbone = network(slot, entry(name, slot, start="paper"))
    described = backbone.release_model()
    again = {"timm": TimmBackbone, "vit": ViT}[described.pop("class")](**described)
    again.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.eval().forward_cls(images), backbone.eval().forward_cls(images))


@pytest.mark.parametrize("name", [name for name, slot in CASES if MECHANISMS[name].reads == "set" and slot != "conv"])
def test_what_reads_a_set_does_not_see_the_order_of_the_patches(name: str):
    if name == "general":
        pytest.skip("its branches decide")
    slot = MECHANISMS[name].slots[0]
    backbone = network(slot, entry(name, slot, start="paper")).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, order = torch.randn(1, 3, 64, 64), torch.randperm(64)[None, :20]
    in_order, shuffled = backbone(images, keep=order), backbone(images, keep=order.flip(1))
    torch.testing.assert_close(shuffled[:, 1:].flip(1), in_order[:, 1:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shuffled[:, 0], in_order[:, 0], rtol=1e-3, atol=1e-4)


def test_the_general_block_learns_its_choice():
    for choice in ("soft", "hard", "uniform"):
        objective = objective_of("mixer", network("mixer", entry("general", "mixer", choice=choice)))
        attention: Any = objective.backbone.blocks[0].attn
        assert isinstance(attention, Blend) and list(attention.branches) == ["xca", "lka"]
        tokens = torch.randn(5, 7, 32)
        shares = attention.eval().shares(tokens)
        torch.testing.assert_close(shares.sum(1), torch.ones(5))
        if choice == "uniform":
            torch.testing.assert_close(shares, torch.full((5, 3), 1 / 3))
            assert attention.router is None
        if choice == "hard":
            assert set(shares.detach().flatten().round(decimals=5).tolist()) <= {0.0, 1.0}
