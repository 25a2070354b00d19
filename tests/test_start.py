"""The initial weights of a run, for images of other channels than those of their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import PretrainConfig
from pretrain.core.configlib import ConfigError
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from pretrain.start import build_objective, start_weights
from tests.objectives.tiny import HORIZON, SMALL

SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def started(release: Path, channels: int, **init: Any) -> tuple[torch.Tensor, list[str]]:
    """The first layer of a run that starts from the release, and what it says."""
    numbers = (0.5,) * channels
    values = {
        "run_dir": "run",
        "objective": {"name": "mae", **SMALL["mae"]},
        "model": {"name": "vit_tiny", **SHAPE, "in_chans": channels},
        "data": {"shards": "shards", "mean": numbers, "std": numbers},
        "optim": {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2},
        "init": {"release": str(release), **init},
    }
    config = PretrainConfig.model_validate(values)
    objective = build_objective(config, HORIZON)
    said = start_weights(objective, config)
    return objective.backbone.state_dict()["patch_embed.proj.weight"], said


def test_pretraining_starts_from_weights_of_other_channels_by_the_stated_rule(tmp_path: Path):
    torch.manual_seed(0)
    vit = ViT((32, 32), 8, 3, 24, 2, 2)
    numbers: dict[str, Any] = {"mean": (0.4,) * 3, "std": (0.2,) * 3}
    write_release(tmp_path / "rgb", vit, objective="mae", extra_state={}, record={}, **numbers)
    weight = vit.state_dict()["patch_embed.proj.weight"]
    with pytest.raises(ConfigError, match="for 3 channels, the images have 5: channels_from=mean, repeat or zero"):
        started(tmp_path / "rgb", 5)
    for rule in ("mean", "repeat"):
        found, said = started(tmp_path / "rgb", 6, channels_from=rule)
        torch.testing.assert_close(found.sum(1), weight.sum(1))
        assert f"3 channels became 6 (channels_from: {rule})" in "\n".join(said)
    found, _ = started(tmp_path / "rgb", 5, channels_from="zero")
    assert found[:, :3].equal(weight) and not found[:, 3:].any()
    same, _ = started(tmp_path / "rgb", 3, channels_from="mean")
    assert same.equal(weight)


def test_a_checkpoint_is_loaded_as_it_is():
    with pytest.raises(ValueError, match="channels_from: only for release and official"):
        PretrainConfig.model_validate(
            {"run_dir": "r", "objective": {"name": "mae"}, "init": {"checkpoint": "x", "channels_from": "mean"},
             "data": {"shards": "s"}, "optim": {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2}}
        )  # fmt: skip
