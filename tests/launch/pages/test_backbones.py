"""Every cell of the table objective x backbone trains for a step on tiny sizes, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from launch.pages.backbones import NO_CLASS_TOKEN, WORKS, page, rows, settings, verdict
from pretrain.config import PretrainConfig
from pretrain.models.backbones.families import CONV
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.base import Horizon
from pretrain.probes.features import backbone_features
from pretrain.start import build_objective
from tests.objectives.released import reads
from tests.objectives.tiny import batch, small_settings

pytestmark = pytest.mark.slow

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}
STAGES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
# The tiny model of each row; 32 px, 8 px per token.
MODELS: dict[str, dict[str, Any]] = {
    "own ViT": {"name": "vit_tiny", **TINY, "mlp_ratio": 2.0},
    "own ViT, no class token": {"name": "vit_tiny", **TINY, "mlp_ratio": 2.0, "class_token": False},
    "own ViT of clips": {"name": "vit_tiny", **TINY, "mlp_ratio": 2.0, "num_frames": 4},
    "own ViT of clips, no class token": {
        **{"name": "vit_tiny", **TINY, "mlp_ratio": 2.0, "num_frames": 4, "class_token": False}
    },
    CONV: {"name": CONV, "embed_dim": 16},
    "timm/ ViT": {"name": "timm/vit_tiny_patch16_224", "args": {**TINY, "patch_size": 8}},
    "timm/ BEiT": {"name": "timm/beit_base_patch16_224", "args": {**TINY, "patch_size": 8}},
    "timm/ EVA and RoPE": {"name": "timm/vit_small_patch16_dinov3", "args": {**TINY, "patch_size": 8}},
    "timm/ Swin": {"name": "timm/swin_tiny_patch4_window7_224", "args": STAGES},
    "timm/ Swin v2": {"name": "timm/swinv2_tiny_window8_256", "args": STAGES},
    "timm/ Hiera": {
        "name": "timm/hiera_tiny_224",
        "args": {
            "embed_dim": 8,
            "stages": [1, 1],
            "q_pool": 1,
            "mask_unit_size": [2, 2],
            "mask_unit_attn": [True, False],
        },
    },
    "timm/ XCiT": {"name": "timm/xcit_nano_12_p8_224", "args": {**TINY, "depth": 1}},
    "timm/ ConvNeXt": {
        "name": "timm/convnext_atto",
        "args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "output_stride": 8},
    },
    "timm/ any other": {
        "name": "timm/resnet18",
        "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    },
}
ROWS = {row.title: row for row in rows()}
CELLS = [(name, row.title) for name in OBJECTIVES for row in rows()]
VERDICTS = {(name, row.title): verdict(name, row) for name in OBJECTIVES for row in rows()}


def configured(name: str, title: str, **changes: Any) -> PretrainConfig:
    size = (32, 32)
    section = {"name": name, **small_settings(name), **reads(name, size, 3), **changes}
    model = {"img_size": size, **({} if title.startswith("timm/") else {"patch_size": 8}), **MODELS[title]}
    return PretrainConfig.model_validate(
        {
            "run_dir": "unused",
            "objective": section,
            "model": model,
            "data": {"shards": "unused"},
            "optim": {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2},
        }
    )


def trains(config: PretrainConfig) -> None:
    """One step forward and backward, with drop path where the objective has it, and a second after the update."""
    of = build_objective(config, Horizon(total_steps=2, steps_per_epoch=1)).train()
    of.begin()
    grouped = [name for group in of.param_groups() for name in group["names"]]
    assert sorted(grouped) == sorted(name for name, p in of.named_parameters() if p.requires_grad)
    shape: Any = config.model
    losses = of(batch(of, shape), 0)
    assert losses["loss"].isfinite()
    losses["loss"].backward()
    reached = [parameter.grad for parameter in of.parameters() if parameter.grad is not None]
    assert reached and any(bool(gradient.any()) for gradient in reached)
    of.after_step(1)
    assert of(batch(of, shape, seed=1), 1)["loss"].isfinite()
    assert of.pictures(batch(of, shape), 1, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert backbone_features(of.backbone.eval(), torch.randn(2, 3, 32, 32))
    assert of.backbone.forward_cls(torch.randn(2, 3, 32, 32)).shape == (2, config.model.embed_dim)


@pytest.mark.parametrize(("name", "title"), CELLS)
def test_a_cell_holds(name: str, title: str):
    expected, row = VERDICTS[name, title], ROWS[title]
    if expected == WORKS:
        trains(configured(name, title))
    elif expected == NO_CLASS_TOKEN:
        with pytest.raises(ValidationError, match=r"model\.class_token: true"):
            configured(name, title)
    elif expected.startswith("no: "):
        lacking, model = expected.removeprefix("no: "), MODELS[title]["name"]
        with pytest.raises(ValidationError, match=rf"model\.name: {name} on {model}: it lacks {lacking}; use "):
            configured(name, title)
    else:
        required = settings(name, row)
        for key in required.keys() - {"patch_embed_lr_mult"}:  # each is named in the error when it alone is wrong
            others = {other: value for other, value in required.items() if other != key}
            problem = r"local crops are 16 x 16 px, but timm/\w+ takes" if key == "local_crops_number" else key
            with pytest.raises(ValidationError, match=problem):
                configured(name, title, **others)
        trains(configured(name, title, **required))


def test_every_row_has_a_tiny_model_and_every_objective_works_somewhere():
    assert {row.title for row in rows()} == MODELS.keys()
    for name in OBJECTIVES:
        assert WORKS in {VERDICTS[name, row.title] for row in rows()}, name


def test_a_page_without_the_markers_of_the_table_is_refused():
    with pytest.raises(ValueError, match="the page has no lines <!-- table -->"):
        page("# Backbones\n")
