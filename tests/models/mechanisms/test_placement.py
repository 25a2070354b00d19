from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.core.configlib import ConfigError, validate
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.config import ModelConfig
from pretrain.models.importers import Weights
from pretrain.models.layers.sync_batch_norm import synchronized
from pretrain.models.mechanisms import ATTENTION, MECHANISMS, settings
from pretrain.models.mechanisms.mixers import Blend
from pretrain.models.mechanisms.placement import mechanisms_of
from pretrain.models.mechanisms.states import MechanismStates
from pretrain.models.release.folder import TIMM, read_release, write_release
from pretrain.objectives import OBJECTIVES, build
from tests.models.mechanisms.toys import TOYS
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch

SIZE = (24, 32)
ENTRIES = {
    "gate on the MLP": {"kind": "toy_set", "places": "blocks.*.mlp"},
    "gate on the attention": {"kind": "toy_set", "places": "blocks.1.attn"},
    "gate on the block": {"kind": "toy_set", "places": "blocks.*"},
    "stage of the grid": {"kind": "toy_grid", "places": "blocks.0"},
    "mixer of tokens": {"kind": "toy_mixer", "places": "blocks.*.attn"},
    "mixer of maps": {"kind": "toy_set", "places": "blocks.*.attn", "slot": "mixer"},
    "mixer of the grid": {"kind": "toy_grid", "places": "blocks.*.attn", "slot": "mixer"},
}


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in TOYS.items():
        monkeypatch.setitem(MECHANISMS, name, entry)


def vit(*attention: dict[str, Any], **changes: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(SIZE, 8, 3, 16, 2, 2, 2.0, attention=attention, **changes)


def model(*attention: dict[str, Any], **changes: Any) -> ModelConfig:
    return validate(ModelConfig, {"name": "vit_tiny", "attention": list(attention), **changes}, source="a test")


@pytest.mark.parametrize("name", ENTRIES)
def test_with_start_identity_the_network_is_exactly_the_one_without(name: str):
    plain, placed, images = vit().eval(), vit(ENTRIES[name]).eval(), torch.randn(2, 3, *SIZE)
    report = placed.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys and not report.unexpected_keys
    assert torch.equal(placed(images), plain(images))
    torch.testing.assert_close(placed.forward_cls(images), plain.forward_cls(images))
    for parameter in placed.parameters():
        if not parameter.any():
            parameter.data.fill_(0.5)
    assert not torch.allclose(placed(images), plain(images))


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_the_class_token_alone_is_the_one_of_the_complete_pass(name: str, start: str):
    backbone, images = vit(ENTRIES[name] | {"start": start}).eval(), torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(backbone.forward_cls(images), backbone(images)[:, 0])
    torch.testing.assert_close(backbone.layers(images, [1])[0], backbone.layers(images, [0, 1])[1])


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("start", ["identity", "paper"])
def test_every_weight_of_a_mechanism_is_trained(name: str, start: str):
    config = OBJECTIVES["simmim"](**SMALL["simmim"])
    objective = build("simmim")(config, vit(ENTRIES[name] | {"start": start}), HORIZON)
    given, losses = batch(objective, Shape()), []
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-2)
    before = {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}
    for step in range(8):
        loss = objective(given, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
        optimizer.step()
        objective.after_step(step + 1)
        losses.append(loss.item())
    after = dict(objective.named_parameters())
    added = [n for n in before if ".placed." in n or ".branches." in n or "attn.proj." in n]
    read = [n for n in added if ".prefix." not in n]  # SimMIM reads no class token
    assert losses[-1] < losses[0] and read and all(not torch.equal(before[n], after[n]) for n in read)


def test_a_set_sees_the_kept_tokens_and_the_grid_needs_all_patches():
    images, keep = torch.randn(2, 3, *SIZE), torch.tensor([[0, 3], [1, 2]])
    for name, entry in ENTRIES.items():
        backbone = vit(entry | {"start": "paper"})
        if "grid" not in name:
            assert backbone(images, keep=keep).shape == (2, 3, 16)
            continue
        with pytest.raises(ValueError, match="toy_grid reads the grid of all patches; a part of them cannot be enc"):
            backbone(images, keep=keep)


def test_objectives_refuse_by_name_what_a_mechanism_takes_from_them():
    needs = OBJECTIVES["mae"].needs
    grid = model({"kind": "toy_grid", "places": "blocks.0"})
    expected = "model.attention: mae needs keep, but with toy_grid it reads the grid of all patches; use one of "
    assert (grid.lacking("mae", needs) or "").startswith(expected)
    assert grid.lacking("simmim", OBJECTIVES["simmim"].needs) is None
    assert model({"kind": "toy_set", "places": "blocks.0"}).lacking("mae", needs) is None
    last = model({"kind": "toy_grid", "places": "blocks.*.mlp"}, depth=4)
    reason = last.lacking("dino", OBJECTIVES["dino"].needs) or ""
    assert "only the class token is read" in reason and reason.endswith("set places: blocks.[0-2].mlp")
    fixed = model({"kind": "toy_grid", "places": "blocks.[0-2].mlp"}, depth=4)
    assert fixed.lacking("dino", OBJECTIVES["dino"].needs) is None and not fixed.problems()


BAD = {
    "places: no module is called 'block.0.mlp'; the nearest name is 'blocks.0.mlp'": {"places": "block.0.mlp"},
    "no mechanism is called 'toy_sett' (did you mean toy_set?)": {"kind": "toy_sett"},
    "reduction 7 does not divide 192 channels": {"reduction": 7},
    "reductoin: unknown key (did you mean reduction?)": {"reductoin": 7},
    "toy_mixer: places: blocks.*: it stands in place of attention; set places: blocks.*.attn": {
        "kind": "toy_mixer",
        "places": "blocks.*",
    },
    "places: images: it changes tokens; set places: blocks.*.mlp": {"places": "images"},
    "slot: toy_set is no stage; it is a gate or a mixer": {"slot": "stage"},
    "a grid of 1 x 1 has no neighbours": {"kind": "toy_grid", "places": "blocks.0"},
}


@pytest.mark.parametrize("expected", BAD)
def test_an_entry_that_cannot_be_placed_is_refused_before_training(expected: str):
    entry = {"kind": "toy_set", "places": "blocks.*.mlp"} | BAD[expected]
    size = {"img_size": 16} if entry["kind"] == "toy_grid" else {}
    try:
        problems = "\n".join(model(entry, **size).problems())
    except ConfigError as error:
        problems = str(error)
    assert expected in problems


def test_a_mechanism_twice_at_a_place_is_refused():
    twice = [{"kind": "toy_set", "places": "blocks.*.mlp"}, {"kind": "toy_set", "places": "blocks.1.mlp"}]
    (problem,) = model(*twice).problems()
    assert "places: blocks.1.mlp has toy_set already" in problem
    two = [{"kind": "toy_mixer", "places": "blocks.*.attn"}, {"kind": "toy_set", "places": "blocks.1.attn"}]
    assert not model(*two).problems()
    (problem,) = model(two[0], two[1] | {"slot": "mixer"}).problems()
    assert "blocks.1.attn has toy_mixer already" in problem


def test_a_mixer_without_relative_positions_does_not_replace_attention_that_has_them():
    entry = {"kind": "toy_mixer", "places": "blocks.*.attn", "start": "paper"}
    for changes in ({"pos_embed": "rope"}, {"rel_pos_bias": "shared"}):
        with pytest.raises(ValueError, match="toy_mixer adds no relative positions and rotates nothing"):
            vit(entry, **changes)
        (problem,) = model(entry, **changes).problems()
        assert problem.startswith("model.attention: toy_mixer adds no relative positions")
        beside = vit(entry | {"start": "identity"}, **changes)
        assert isinstance(beside.blocks[0].attn, Blend)


@pytest.mark.parametrize(
    ("branches", "says"),
    [(["none"], "at least one besides none"), (["xca", "none", "xca"], "xca is given twice")],
)
def test_branches_of_a_general_block_are_some_and_different(branches: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        settings.parse({"kind": "general", "places": "blocks.*.attn", "branches": branches})


def test_blends_weigh_their_branches_and_none():
    entry = {"kind": "toy_mixer", "places": "blocks.*.attn"}
    attention: Any = vit(entry).blocks[0].attn
    tokens = torch.randn(3, 5, 16)
    assert torch.equal(attention.shares(tokens), torch.ones(3, 1))


def test_a_release_keeps_the_mechanisms_and_is_not_said_to_be_timms(tmp_path: Path):
    entries = [ENTRIES["mixer of the grid"], ENTRIES["gate on the MLP"] | {"bias": False}]
    backbone, images = vit(*entries).eval(), torch.randn(2, 3, *SIZE)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    write_release(tmp_path / "out", backbone, objective="simmim", extra_state={}, record={})
    assert not (tmp_path / "out" / TIMM).exists()
    assert "timm has no class like this backbone with toy_grid, toy_set" in (tmp_path / "out/README.md").read_text()
    release = read_release(tmp_path / "out")
    assert release.model["attention"][1] == {**entries[1], "start": "identity", "reduction": 2}
    assert torch.equal(release.build().eval()(images), backbone(images))


def test_an_objective_with_mechanisms_starts_from_a_release_without():
    config = OBJECTIVES["dino"](**SMALL["dino"])
    plain, placed = (build("dino")(config, vit(*entries), HORIZON) for entries in ((), (ENTRIES["gate on the MLP"],)))
    report = placed.load_weights(Weights("dino", plain.backbone.state_dict(), {}))
    assert all(".placed." in name or name.startswith(placed.head_prefixes) for name in report.missing)
    images = torch.randn(2, 3, *SIZE)
    assert torch.equal(placed.backbone.eval()(images), plain.backbone.eval()(images))  # type: ignore[operator]


SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
TIMM_PLACES = {"test_resnet": "layer[34].*", "test_convnext": "stages.*", "swin_tiny_patch4_window7_224": "layers.1"}


@pytest.mark.parametrize("name", TIMM_PLACES)
@pytest.mark.parametrize("kind", ["toy_set", "toy_grid"])
def test_modules_of_timms_models_take_mechanisms_under_their_names(name: str, kind: str):
    def built(*attention: dict[str, Any]) -> TimmBackbone:
        torch.manual_seed(0)
        arguments = SWIN if name.startswith("swin") else {}
        return TimmBackbone(name, (64, 96), attention=attention, **arguments).eval()

    entry, images = {"kind": kind, "places": TIMM_PLACES[name]}, torch.randn(2, 3, 64, 96)
    plain, placed = built(), built(entry)
    report = placed.load_state_dict(plain.state_dict(), strict=False)
    assert not report.unexpected_keys and all(".placed." in key for key in report.missing_keys)
    assert torch.equal(placed.forward_cls(images), plain.forward_cls(images))
    trained = built(entry | {"start": "paper"})
    before, follower = trained.forward_cls(images), copy.deepcopy(trained)
    for parameter in follower.parameters():
        parameter.data.zero_()
    assert torch.equal(trained.forward_cls(images), before) and not torch.equal(before, plain.forward_cls(images))
    assert trained.release_model()["attention"] == [{**entry, **trained.attention[0].arguments()}]


def test_a_mechanism_on_a_batch_norm_stays_where_its_statistics_become_those_of_all_ranks():
    entry = {"kind": "toy_set", "places": "layer[34].*.bn2", "start": "paper"}
    backbone = TimmBackbone("test_resnet", (64, 64), attention=(entry,)).eval()
    names, images = list(backbone.state_dict()), torch.randn(2, 3, 64, 64)
    before = backbone.forward_cls(images)
    assert list(synchronized(backbone).state_dict()) == names
    torch.testing.assert_close(backbone.forward_cls(images), before)


def test_places_of_a_timm_model_that_cannot_take_a_mechanism_are_named():
    for entry, expected in (
        ({"kind": "toy_set", "places": "layer5"}, "no module is called 'layer5'; the nearest name is 'layer4'"),
        ({"kind": "toy_mixer", "places": "layer4"}, "toy_mixer: a mixer stands in our own vision transformer only"),
        ({"kind": "toy_set", "places": "layer3", "reduction": 7}, "reduction 7 does not divide 256 channels"),
    ):
        (problem,) = model(entry, name="timm/resnet18", img_size=64).problems()
        assert problem.startswith("model.attention: toy_") and expected in problem


def test_the_attention_is_the_default_and_its_names_stay():
    assert next(iter(MECHANISMS)) == ATTENTION and model().attention == ()
    assert "attention" not in vit().release_model() and "blocks.1.attn.qkv.weight" in vit().state_dict()


def test_a_state_moves_with_taken_steps_of_trained_mechanisms_only(monkeypatch: pytest.MonkeyPatch):
    backbone, told = vit(ENTRIES["gate on the block"]), []
    first, second = mechanisms_of(backbone)
    second.requires_grad_(False)
    for number, mechanism in enumerate((first, second)):
        monkeypatch.setattr(mechanism, "after_step", lambda number=number: told.append((number, "taken")))
        monkeypatch.setattr(mechanism, "discard_pending", lambda number=number: told.append((number, "dropped")))
    states = MechanismStates(backbone)
    states.settle(taken=True)
    states.settle(taken=False)
    assert told == [(0, "taken"), (1, "dropped"), (0, "dropped"), (1, "dropped")]
