from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from pretrain.core.configlib import ConfigError, validate
from pretrain.models.backbones.vit import ViT
from pretrain.models.config import ModelConfig
from pretrain.models.layers.attention import Attention, Block
from pretrain.models.layers.mixer import Layout, Mixer
from pretrain.models.mechanisms import ATTENTION, MECHANISMS, mixer_class
from pretrain.models.release.folder import TIMM, read_release, write_release
from pretrain.objectives import OBJECTIVES, build
from tests.models.mechanisms.toys import TOYS
from tests.objectives.tiny import HORIZON, SMALL, Shape, batch

SIZE = (24, 32)


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in TOYS.items():
        monkeypatch.setitem(MECHANISMS, name, entry)


def vit(mixer: str, **changes: object) -> ViT:
    torch.manual_seed(0)
    return ViT(SIZE, 8, 3, 16, 2, 2, 2.0, mixer=mixer, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*MECHANISMS, *TOYS])
def test_every_mixer_of_the_table_has_the_signature_of_the_contract(name: str):
    found = mixer_class(name)
    assert issubclass(found, Mixer)
    assert inspect.signature(found.forward) == inspect.signature(Mixer.forward)
    block = Block(16, 2, mixer=found)
    assert {"attn.proj.weight", "attn.proj.bias"} <= block.state_dict().keys()


def test_attention_is_the_first_entry_and_the_default():
    assert next(iter(MECHANISMS)) == ATTENTION and mixer_class(ATTENTION) is Attention
    assert ModelConfig().mixer == ATTENTION
    assert "mixer" not in vit(ATTENTION).release_model()
    assert "blocks.1.attn.qkv.weight" in vit(ATTENTION).state_dict()


@pytest.mark.parametrize(("mixer", "objective"), [("toy_set", "mae"), ("toy_set", "simmim"), ("toy_grid", "simmim")])
def test_a_vit_with_another_mixer_trains(mixer: str, objective: str):
    config = OBJECTIVES[objective](**SMALL[objective])
    of = build(objective)(config, vit(mixer), HORIZON)
    given, parameters = batch(of, Shape()), [p for p in of.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, 1e-2), []
    for step in range(8):
        loss = of(given, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if not step:
            mixed = [p for name, p in of.named_parameters() if ".attn.proj." in name and p.requires_grad]
            assert mixed and all(p.grad is not None and p.grad.any() for p in mixed)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_mae_refuses_a_mixer_of_the_grid_by_name():
    model, needs = ModelConfig(name="vit_tiny", mixer="toy_grid"), OBJECTIVES["mae"].needs
    assert "keep" not in model.provides and "keep" in ModelConfig(name="vit_tiny", mixer="toy_set").provides
    refusal = "model.mixer: mae on toy_grid: it lacks keep, it reads all patches; use attention, toy_set"
    assert model.lacking("mae", needs) == refusal
    assert model.lacking("simmim", OBJECTIVES["simmim"].needs) is None
    images, keep = torch.randn(2, 3, *SIZE), torch.tensor([[0, 3], [1, 2]])
    with pytest.raises(ValueError, match="toy_grid reads the grid of all patches; a part of them cannot be encoded"):
        vit("toy_grid")(images, keep=keep)
    assert vit("toy_set")(images, keep=keep).shape == (2, 3, 16)


def test_the_class_token_alone_is_the_one_of_the_complete_pass():
    images = torch.randn(2, 3, *SIZE)
    for mixer in TOYS:
        backbone = vit(mixer).eval()
        torch.testing.assert_close(backbone.forward_cls(images), backbone(images)[:, 0])
        assert backbone.last_attention(images) is None


def test_a_mixer_without_relative_positions_is_not_combined_with_them():
    for changes in ({"pos_embed": "rope"}, {"rel_pos_bias": "shared"}):
        with pytest.raises(ValueError, match="toy_set adds no relative positions and rotates nothing"):
            vit("toy_set", **changes)
        (problem,) = ModelConfig(name="vit_tiny", mixer="toy_set", **changes).problems()
        assert problem.startswith("model.mixer: toy_set adds no relative positions")


def test_an_unknown_mixer_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no mixer is called 'atention' \(did you mean attention\?\)"):
        validate(ModelConfig, {"mixer": "atention"}, source="a test")
    (problem,) = ModelConfig(name="conv_encoder", patch_size=8, mixer="toy_set").problems()
    assert problem.startswith("model.mixer: 'toy_set' is no setting of conv_encoder")


def test_a_release_keeps_the_mixer_and_is_not_said_to_be_timms(tmp_path: Path):
    backbone, images = vit("toy_grid").eval(), torch.randn(2, 3, *SIZE)
    write_release(tmp_path / "out", backbone, objective="simmim", extra_state={}, record={})
    assert not (tmp_path / "out" / TIMM).exists()
    assert "no toy_grid in place of the attention" in (tmp_path / "out" / "README.md").read_text()
    release = read_release(tmp_path / "out")
    assert release.model is not None and release.model["mixer"] == "toy_grid"
    assert torch.equal(release.build().eval()(images), backbone(images))


def test_a_layout_of_some_samples_keeps_their_patches():
    layout = Layout((2, 2), 1, torch.tensor([[0], [1], [2]]))
    assert layout.of_samples(torch.tensor([2, 0])).keep.tolist() == [[2], [0]]  # type: ignore[union-attr]
    assert Layout((2, 2), 1).of_samples(torch.tensor([1])).keep is None
