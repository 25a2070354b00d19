"""The source of a backbone is recognized by its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.config import ModelSource
from finetune.locate import locate
from pretrain.core.configlib import ConfigError


def folder(path: Path, name: str, content: object = None) -> Path:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(json.dumps(content or {}))
    return path


def test_each_kind_of_path_gives_its_source(tmp_path: Path):
    release = folder(tmp_path / "release", "fovea.json")
    run = folder(tmp_path / "run", "release/fovea.json")
    hub = folder(tmp_path / "hub", "config.json", {"model_type": "vit"})
    local = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 96, "num_classes": 0, "depth": 3}}
    timm = folder(tmp_path / "timm", "config.json", local)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    assert locate(release) == ModelSource(release=str(release))
    assert locate(run) == ModelSource(release=str(run / "release"))
    assert locate(hub) == ModelSource(huggingface=str(hub))
    assert locate(file) == ModelSource(official=str(file))
    assert locate(file, timm="resnet18") == ModelSource(timm="resnet18", weights=str(file))
    assert locate("resnet18", random=True) == ModelSource(timm="resnet18", random=True)
    given = ModelSource(timm="vit_tiny_patch16_224", weights=str(timm), img_size=96, args={"depth": 3})
    assert locate(timm) == given


def test_options_are_keys_of_the_section(tmp_path: Path):
    release = folder(tmp_path / "release", "fovea.json")
    assert locate(release, img_size=(64, 96), args=None).size == (64, 96)
    with pytest.raises(ConfigError, match="img_size"):
        locate(release, img_size=-1)


def test_sources_without_weights_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file or folder; nothing is downloaded"):
        locate("resnet18")
    with pytest.raises(ConfigError, match=r"no fovea.json and no config.json"):
        locate(tmp_path)
    with pytest.raises(ConfigError, match="a run without a release yet"):
        locate(folder(tmp_path / "run", "config.yaml"))
