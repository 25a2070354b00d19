from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.pages.attention import entry
from pretrain.core.configlib import ConfigError, validate
from pretrain.models.backbones.vit import ViT
from pretrain.models.config import ModelConfig
from pretrain.models.mechanisms import MECHANISMS, settings
from pretrain.models.mechanisms.placed import Change
from tests.models.mechanisms.test_table import SMALLER

SIZE = (64, 64)
PLACES = [
    (name, slot)
    for name, of in MECHANISMS.items()
    for slot in of.slots
    if slot in ("gate", "stage", "mixer") and name != "attention"
]


def vit(given: dict[str, Any]) -> ViT:
    torch.manual_seed(0)
    network = ViT(SIZE, 8, 3, 48, 2, 3, 2.0, attention=[given]).eval()
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.5)
    return network


@pytest.mark.parametrize(("name", "slot"), PLACES)
def test_a_placebo_of_equal_images_is_the_mechanism_and_else_sees_the_next_image(name: str, slot: Any):
    given = {**entry(name, slot), **SMALLER.get(name, {})}
    plain, placebo = vit(given), vit(given | {"placebo": True})
    weights = dict(zip(placebo.state_dict(), plain.state_dict().values(), strict=True))
    placebo.load_state_dict(weights)
    one, two = torch.randn(2, 1, 3, *SIZE).unbind(0)
    equal = torch.cat([one, one])
    torch.testing.assert_close(placebo(equal), plain(equal), atol=2e-4, rtol=1e-3)
    alone = plain(torch.cat([one, two]))[0]
    torch.testing.assert_close(alone, plain(one)[0], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(placebo(torch.cat([one, two]))[0], alone, atol=1e-5)


def test_a_gate_is_given_the_factors_of_the_next_image():
    torch.manual_seed(0)
    change = Change(settings.parse({"kind": "se", "places": "x", "start": "paper", "placebo": True}), 16)
    x = torch.randn(3, 16, 4, 4)
    gates = (change.mechanism(x) / x)[:, :, 1, 1]
    torch.testing.assert_close(change(x), x * gates.roll(-1, 0)[..., None, None])
    change(x).sum().backward()
    assert all(parameter.grad is not None for parameter in change.parameters())
    assert change(torch.zeros_like(x)).eq(0).all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "sk", "places": "layer3.0.conv2", "start": "paper"}, "a gate, a stage, or a mixer"),
        ({"kind": "xca", "places": "blocks.*.attn", "start": "paper"}, "start: identity"),
        ({"kind": "general", "places": "blocks.*.attn", "branches": ["xca"], "choice": "uniform"}, "on no image"),
    ],
)
def test_where_a_placebo_means_nothing_it_is_refused(given: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        validate(ModelConfig, {"name": "vit_tiny", "attention": [given | {"placebo": True}]}, source="a test")
