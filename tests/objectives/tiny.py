"""Objectives small enough for a test, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pretrain.data.views.maskdraw import BatchPosition, draw
from pretrain.data.views.specs import Mask, Noise, stacks
from pretrain.models.backbones.families import vit_provides
from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.tokenizers.dvae import ConvEncoder
from pretrain.objectives import OBJECTIVES, build
from pretrain.objectives.base import Horizon, Objective
from tests.objectives.released import reads

DEBUG = Path(__file__).parents[2] / "configs" / "debug"
# Settings smaller than those of the debug configuration.
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2},
    "dino": {
        "out_dim": 32,
        "head_hidden_dim": 16,
        "head_bottleneck_dim": 8,
        "local_crops_number": 2,
        "local_crops_size": 16,
        "warmup_teacher_temp_epochs": 2,
        "teacher_temp": 0.07,
    },
}
SMALL["ibot"] = SMALL["dino"] | {
    "patch_out_dim": 32,
    "pred_ratio": (0.0, 0.3),
    "pred_ratio_var": (0.0, 0.2),
    "teacher_patch_temp": 0.08,
}
SMALL["dinov2"] = SMALL["dino"] | {"separate_patch_head": True, "patch_out_dim": 24, "patch_hidden_dim": 16}
SMALL["videomae"] = SMALL["mae"] | {"mask_ratio": 0.75}
SMALL["mocov3"] = {"hidden_dim": 16, "projection_dim": 8}
SMALL["simmim"] = {"mask_cell": 8}
SMALL["ijepa"] = {"predictor_embed_dim": 8, "predictor_depth": 2, "target_scale": (0.25, 0.3), "min_keep": 0}
SMALL["capi"] = {
    "num_clusters": 12,
    "predictor_depth": 2,
    "predicted_ratio": 0.6,
    "momentum_teacher": 0.9,
    "drop_path_rate": 0.0,
}
SMALL["lejepa"] = {
    "sigreg_weight": 0.1,
    "num_slices": 24,
    "embedding_dim": 16,
    "projector_dims": (16, 8),
    "local_crops_number": 2,
    "local_crops_size": 16,
    "color_jitter": (0.4, 0.4, 0, 0),
    "grayscale_prob": 0,
}
SMALL["data2vec"] = {
    "num_mask_patches": 3,
    "min_mask_patches_per_block": 1,
    "max_mask_patches_per_block": 3,
    "exact_mask_count": True,
    "num_target_layers": 2,
}
SMALL["data2vec2"] = {
    "clone_batch": 2,
    "mask_ratio": 0.6,
    "mask_length": 1,
    "decoder_dim": 16,
    "decoder_layers": 2,
    "decoder_groups": 4,
    "average_top_k_layers": 2,
}
SMALL["beit"] = {
    "num_masking_patches": 3,
    "min_mask_patches_per_block": 1,
    "max_mask_patches_per_block": 2,
    "color_jitter": (0.4, 0.4, 0, 0),
}
SMALL["beit2"] = SMALL["beit"] | {"early_layers": 1, "head_layers": 2}
SMALL["dvae"] = {"num_tokens": 64, "codebook_dim": 16}
SMALL["distill"] = {"adaptor_dim": 16, "color_jitter": (0.4, 0.4, 0, 0), "grayscale_prob": 0, "statistics_steps": 4}
SMALL["vqkd"] = {
    "num_codes": 12,
    "code_dim": 4,
    "kmeans_init": False,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
OF_CLIPS = {name for name, config in OBJECTIVES.items() if "clip" in config.needs}
HORIZON = Horizon(total_steps=8, steps_per_epoch=2)


@dataclass(frozen=True)
class Shape:
    size: tuple[int, int] = (24, 32)
    patch_size: int = 8
    in_chans: int = 3
    drop_path_rate: float = 0.0
    num_blocks: int = 2
    embed_dim: int = 16
    num_frames: int | None = 4
    class_token: bool = True
    rotates: bool = False
    provides: frozenset[str] = vit_provides(class_token=True)


def small_settings(name: str) -> dict[str, Any]:
    """Those of SMALL, or else of the debug configuration."""
    return SMALL[name] if name in SMALL else yaml.safe_load((DEBUG / f"{name}.yaml").read_text())["objective"]


def objective(name: str, shape: Shape | None = None, *, registers: int = 0, **changes: Any) -> Objective:
    shape = shape or Shape()
    config = OBJECTIVES[name](**small_settings(name) | reads(name, shape.size, shape.in_chans) | changes)
    torch.manual_seed(0)  # after the releases that a configuration reads, which draw too
    pos_embed = "rope" if any(key.startswith("rope_") for key in changes) else None
    return build(name)(config, backbone(name, shape, registers=registers, pos_embed=pos_embed), HORIZON)


def backbone(name: str, shape: Shape | None = None, *, registers: int = 0, pos_embed: Any = None) -> Any:
    """A backbone that objective `name` works on; `pos_embed`: of a ViT, where it is not the usual one."""
    shape = shape or Shape()
    if name == "dvae":
        return ConvEncoder(shape.size, shape.patch_size, shape.in_chans, 32)
    if name in OF_CLIPS:
        sizes = {"in_chans": shape.in_chans, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
        return VideoViT(shape.size, shape.patch_size, num_frames=4, num_registers=registers, **sizes)
    pos_embed = pos_embed or ("learned" if name == "dino" else "sincos")
    return ViT(
        shape.size, shape.patch_size, shape.in_chans, 16, 2, 2, 2.0, num_registers=registers, pos_embed=pos_embed
    )


def batch(of: Objective, shape: Shape | None = None, *, images: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """What the loader would give for the objective's views: pixels, uniform noise, masks."""
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(seed)
    specs = of.config.views(shape)
    result = {}
    for name, entry in stacks(specs).items():
        pixels = torch.randn if entry[0][1].normalize else torch.rand
        size = (images, sum(view.num_images for _, view in entry), shape.in_chans, *entry[0][1].size)
        result[name] = pixels(size, generator=generator)
    noises = {s.name: torch.rand(images, *s.shape, generator=generator) for s in specs if isinstance(s, Noise)}
    noises |= {
        s.name: noises[s.name][:1].expand_as(noises[s.name]) for s in specs if isinstance(s, Noise) and s.of_step
    }
    at = BatchPosition(seed=seed, positions=np.arange(images), first=0, global_batch=images, epoch_length=images)
    masks = [draw(spec, at) for spec in specs if isinstance(spec, Mask)]
    return result | noises | {name: torch.from_numpy(array) for drawn in masks for name, array in drawn.items()}


def part(of: dict[str, Tensor], which: slice) -> dict[str, Tensor]:
    """A micro-batch of a batch."""
    return {name: value[which] for name, value in of.items()}
