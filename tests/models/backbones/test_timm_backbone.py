from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath

from pretrain.models.backbones.timm_backbone import TimmBackbone, facts
from pretrain.models.config import ModelConfig
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.teachers.ema import EMA

pytestmark = pytest.mark.slow

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}
STAGES = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {**TINY, "patch_size": 8},
    "vit_medium_patch16_reg4_gap_256": {**TINY, "patch_size": 8},
    "beit_base_patch16_224": {**TINY, "patch_size": 8},
    "eva02_tiny_patch14_224": {**TINY, "patch_size": 8},
    "vit_small_patch16_dinov3": {**TINY, "patch_size": 8},
    "swin_tiny_patch4_window7_224": STAGES,
    "swinv2_tiny_window8_256": STAGES,
    "hiera_tiny_224": {
        "embed_dim": 8, "stages": [1, 1], "q_pool": 1, "mask_unit_size": [2, 2], "mask_unit_attn": [True, False],
    },
    "xcit_nano_12_p8_224": {**TINY, "depth": 1},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "output_stride": 8},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
}  # fmt: skip
every = pytest.mark.parametrize("name", MODELS)
LAYERED = [name for name in MODELS if name.startswith(("vit", "beit", "eva"))]
MASKED = [name for name in MODELS if name != "resnet18"]


def tiny(name: str, **changes: Any) -> TimmBackbone:
    torch.manual_seed(0)
    backbone = TimmBackbone(name, (32, 32), **MODELS[name] | changes)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone.eval()


def images(side: int = 32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, side, side)


@every
def test_one_vector_is_what_timm_gives_for_the_image(name: str, tmp_path: Path):
    backbone = tiny(name)
    out = write_release(tmp_path / "release", backbone, objective="dino", extra_state={}, record={})
    other = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    torch.testing.assert_close(other(images()), backbone.forward_cls(images()), atol=1e-5, rtol=1e-5)
    own = read_release(out).build().eval()
    torch.testing.assert_close(own.forward_cls(images()), backbone.forward_cls(images()))
    assert backbone.forward_cls(images()).shape == (2, backbone.embed_dim)


@pytest.mark.parametrize("name", MASKED)
def test_tokens_are_prefix_and_grid_and_normalized(name: str):
    backbone = tiny(name)
    rows, columns = backbone.grid_size
    tokens = backbone(images())
    assert tokens.shape == (2, backbone.num_prefix_tokens + rows * columns, backbone.embed_dim)
    if backbone.class_token:
        assert torch.equal(backbone.forward_cls(images()), tokens[:, 0])


@pytest.mark.parametrize("name", MASKED)
def test_pixels_under_the_mask_never_reach_it_and_the_token_does(name: str):
    backbone = tiny(name)
    token = torch.randn(1, 1, backbone.mask_dim, requires_grad=True)
    everything = torch.ones(2, 16, dtype=torch.bool)
    blind = backbone(images(), mask=everything, mask_token=token)
    assert torch.equal(blind, backbone(images() * 2 + 1, mask=everything, mask_token=token))
    some = everything.clone()
    some[:, 5:] = False
    out = backbone(images(), mask=some, mask_token=token)
    assert not torch.allclose(out, backbone(images()))
    out.square().sum().backward()
    assert token.grad is not None and token.grad.any()
    nothing = backbone(images(), mask=~everything, mask_token=token)
    torch.testing.assert_close(nothing, backbone(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_mask_of_larger_cells_covers_what_they_cover(name: str):
    backbone, token = tiny(name), torch.randn(1, 1, tiny(name).mask_dim)
    cells = torch.tensor([[True, False, False, True], [False, True, False, False]])
    patches = cells.unflatten(1, (2, 2)).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    assert torch.equal(
        backbone(images(), mask=cells, mask_token=token), backbone(images(), mask=patches, mask_token=token)
    )
    with pytest.raises(ValueError, match="a mask of 5 positions does not divide the stem's grid"):
        backbone(images(), mask=torch.ones(2, 5, dtype=torch.bool), mask_token=token)


@pytest.mark.parametrize("name", LAYERED)
def test_layers_are_raw_and_stop_at_the_last_that_is_asked_for(name: str):
    backbone = tiny(name)
    first, last = backbone.layers(images(), [0, 1])
    torch.testing.assert_close(backbone.model.norm(last), backbone(images()))
    ran: list[int] = []
    backbone.model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(backbone.layers(images(), [0])[0], first) and not ran
    torch.testing.assert_close(backbone.intermediate(images(), 2)[1], backbone(images()))
    with pytest.raises(ValueError, match="indices must ascend within 0 to 1, got"):
        backbone.layers(images(), [2])


def test_a_plain_vit_encodes_a_part_of_its_patches():
    backbone, order = tiny("vit_tiny_patch16_224"), torch.randperm(16).expand(2, -1)
    whole, kept = backbone(images()), backbone(images(), keep=order)
    torch.testing.assert_close(kept[:, 0], whole[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept[:, 1:], whole[:, 1:][:, order[0]], atol=1e-5, rtol=1e-5)
    assert backbone(images(), keep=order[:, :3]).shape == (2, 4, 16)


@every
def test_other_sizes_are_taken_or_refused_as_the_family_says(name: str):
    backbone = tiny(name)
    if backbone.family.other_sizes:
        assert backbone.forward_cls(images(16)).shape == (2, backbone.embed_dim)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            backbone.forward_cls(images(16))


@every
def test_stochastic_depth_is_off_in_the_average_and_on_in_its_source(name: str):
    backbone, many = tiny(name), images().repeat(8, 1, 1, 1)
    average = EMA(backbone).average
    average.set_drop_path(0.0)
    backbone.set_drop_path(0.5)
    backbone.train(), average.train()
    rates = [module.drop_prob for module, _ in backbone._shares]
    assert max(rates) == pytest.approx(0.5) and sorted(rates) == rates
    assert all(module.drop_prob == 0 for module, _ in average._shares)
    if name != "resnet18":  # batch statistics move
        assert torch.equal(average.forward_cls(images()), average.forward_cls(images()))
        torch.manual_seed(3)
        first = backbone.forward_cls(many)
        assert not torch.equal(backbone.forward_cls(many), first)
        torch.manual_seed(3)
        assert torch.equal(backbone.forward_cls(many), first)


@every
def test_no_hook_is_left_behind(name: str):
    backbone = tiny(name)
    if "mask" in backbone.provides:
        backbone(images(), mask=torch.ones(2, 16, dtype=torch.bool), mask_token=torch.zeros(1, 1, backbone.mask_dim))
    if "layers" in backbone.provides:
        backbone.layers(images(), [0])
    assert not any(module._forward_hooks for module in backbone.modules())
    assert copy.deepcopy(backbone).forward_cls(images()).equal(backbone.forward_cls(images()))


def test_facts_are_those_of_the_model_and_need_no_memory():
    found = facts("vit_giant_patch14_dinov2", img_size=(28, 28), in_chans=3)
    assert found == {"patch_size": 14, "embed_dim": 1536, "depth": 40, "class_token": True}
    assert facts("resnet50", img_size=(64, 64), in_chans=4)["embed_dim"] == 2048


def test_a_configuration_takes_width_and_stride_from_the_model():
    config = ModelConfig.model_validate({"name": "timm/swin_tiny_patch4_window7_224", "args": STAGES, "img_size": 32})
    assert (config.patch_size, config.embed_dim, config.num_patches, config.class_token) == (8, 32, 16, False)
    assert ModelConfig.model_validate(config.model_dump()) == config
    assert TimmBackbone(**config.timm_arguments()).embed_dim == 32


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"name": "timm/resnet19"}, r"timm has no model 'resnet19' \(did you mean resnet18\?\)"),
        ({"name": "timm/resnet18", "embed_dim": 64}, "embed_dim: 64, but timm/resnet18 has 512; change it by model"),
        ({"name": "timm/convnext_atto", "args": {"wide": 1}}, "timm/convnext_atto cannot be built with .*'wide'"),
        ({"name": "vit_teeny"}, "unknown size 'vit_teeny'; one of vit_tiny, .*, or timm/NAME"),
    ],
)
def test_models_that_are_not_there_are_named(model: dict, problem: str):
    with pytest.raises(ValueError, match=problem):
        ModelConfig.model_validate(model)


def test_stochastic_depth_rises_over_the_blocks_or_is_uniform_in_all_but_the_first():
    vit = TimmBackbone("vit_tiny_patch16_224", (32, 32), drop_path_rate=0.4, depth=3, embed_dim=24, num_heads=2)
    rates = [module.drop_prob for module in vit.modules() if isinstance(module, DropPath)]  # attention, then MLP
    assert rates == pytest.approx([0.2, 0.2, 0.4, 0.4])
    vit.set_drop_path(0.3, uniform=True)
    assert [module.drop_prob for module in vit.modules() if isinstance(module, DropPath)] == [0.3] * 4


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"])
def test_blocks_of_attention_and_mlp_at_once_are_refused_by_name(name: str):
    with pytest.raises(ValueError, match=rf"timm/{name}: its Parallel\w+Block has no attention and MLP one after"):
        ModelConfig.model_validate({"name": f"timm/{name}"})


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"name": "timm/convnext_atto", "pos_embed": "rope"}, "model.pos_embed: 'rope' is no setting of timm/"),
        ({"name": "timm/vit_tiny_patch16_224", "num_heads": 6}, "model.num_heads: 6 is no setting of timm/vit_tiny"),
        ({"name": "conv_encoder", "depth": 3}, "model.depth: 3 is no setting of conv_encoder; leave it out"),
        ({"name": "conv_encoder", "drop_path_rate": 0.1}, "model.drop_path_rate: 0.1 is no setting of conv_encoder"),
        ({"name": "conv_encoder", "class_token": True}, "model.class_token: true, but conv_encoder has none"),
        ({"name": "vit_tiny", "args": {"depths": [1]}}, "model.args: are for timm models; give"),
        ({"name": "conv_encoder", "patch_size": 12, "img_size": 24}, "12, but conv_encoder only halves its input"),
        ({"name": "vit_tiny", "pos_embed": "rope", "num_heads": 32}, "32 heads of 192 have 6"),
        ({"name": "vit_tiny", "rope": {"base": 50}}, "model.rope: is read with model.pos_embed=rope only"),
        ({"name": "vit_tiny", "ffn_multiple": 64}, "model.ffn_multiple: is read with model.ffn=swiglu only"),
        ({"name": "vit_tiny", "class_token": False, "cls_norm": True}, "the model has no class token"),
        ({"name": "timm/vit_tiny_patch16_224", "norm_layer": "rms"}, "model.norm_layer: 'rms' is no setting of timm/"),
    ],
)
def test_settings_of_another_kind_of_backbone_are_named(model: dict, problem: str):
    found = ModelConfig.model_validate(model).problems()
    assert any(problem in text for text in found), found


def test_what_a_family_does_not_provide_is_refused():
    with pytest.raises(ValueError, match=r"timm/resnet18 \(any other\) does not provide 'patches'"):
        tiny("resnet18")(images())
    with pytest.raises(ValueError, match=r"\(Swin\) does not provide 'keep'"):
        tiny("swin_tiny_patch4_window7_224")(images(), keep=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="has no stochastic depth"):
        TimmBackbone("vgg11", (32, 32), drop_path_rate=0.1)
