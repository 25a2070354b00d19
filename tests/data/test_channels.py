"""The names of channels go from the data to releases, and another order is refused everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.__main__ import check as check_task
from finetune.predict import main as predict
from finetune.release import write_release as write_task
from pretrain.__main__ import check
from pretrain.core.configlib import ConfigError
from pretrain.data.__main__ import main as data_command
from pretrain.data.channels import difference, names_beside
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from tests.finetune.small_tasks import small_task

NAMES = ("B02", "B03", "B04", "B08")


def images(folder: Path) -> Path:
    for name in ("sea", "land"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            np.save(folder / name / f"{number}.npy", np.full((32, 32, 4), number * 9, np.uint8))
    return folder


def pretraining(shards: Path, **more: Any) -> dict[str, Any]:
    numbers = {"mean": [0.5] * 4, "std": [0.2] * 4}
    model = {"name": "vit_tiny", "img_size": 32, "patch_size": 8, "in_chans": 4}
    return {
        "run_dir": str(shards.parent / "run"),
        "objective": {"name": "mae"},
        "model": model,
        "data": {"shards": str(shards), **numbers, **more},
        "optim": {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2},
    }


def test_names_beside_the_shards_reach_a_run_and_contradictions_are_named(tmp_path: Path):
    folder, shards = images(tmp_path / "images"), tmp_path / "shards"
    assert data_command(["write", str(folder), str(shards), "--channels", ",".join(NAMES), "--workers", "1"]) == 0
    assert names_beside(str(shards)) == names_beside(str(shards / "train-000000.tar")) == NAMES
    config, _, _ = check(pretraining(shards), world_size=1)
    assert config.data.channels == NAMES
    with pytest.raises(ConfigError, match="another order: channel 0 is B02, not B08 as in data"):
        check(pretraining(shards, channels=["B08", "B03", "B04", "B02"]), world_size=1)
    for wrong, reason in ((NAMES[:3], "3 names for model.in_chans 4"), (("a", "a", "b", "c"), "a twice")):
        with pytest.raises(ConfigError, match=reason):
            check(pretraining(shards, channels=list(wrong)), world_size=1)
    assert data_command(["write", str(folder), str(shards), "--channels", "a,b,c,d", "--workers", "1"]) == 2
    (shards / "channels.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="expected a list of names"):
        check(pretraining(shards), world_size=1)


def test_a_task_takes_the_names_of_its_source_and_refuses_another_order(tmp_path: Path):
    folder = images(tmp_path / "images")
    numbers: dict[str, Any] = {"mean": (0.4,) * 4, "std": (0.2,) * 4}
    vit = ViT((32, 32), 8, 4, 24, 2, 2)
    write_release(tmp_path / "backbone", vit, objective="mae", extra_state={}, record={"channels": NAMES}, **numbers)
    values = {
        "run_dir": str(tmp_path / "run"),
        "task": {"name": "classification", "augment": {"whole": True, "color_jitter": 0}},
        "model": {"release": str(tmp_path / "backbone")},
        "data": {"train": {"images": str(folder)}, "val": {"images": str(folder)}},
        "optim": {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2, "warmup_steps": 1},
    }
    assert check_task(values, world_size=1).config.data.channels == NAMES
    (folder / "channels.json").write_text(json.dumps(NAMES[::-1]))
    with pytest.raises(ConfigError, match="another order: channel 0 is B08, not B02 as in"):
        check_task(values, world_size=1)


def test_predict_compares_stated_names_with_those_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = small_task("classification", backbone=None)
    release = write_task(tmp_path / "release", task, {"source": {"title": "x"}, "channels": ["R", "G", "B"]})
    np.save(tmp_path / "a.npy", np.zeros((32, 32, 3), np.uint8))
    command = [
        str(release),
        str(tmp_path / "a.npy"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--no-pictures",
    ]
    assert predict([*command, "--channels", "B,G,R"]) == 2
    assert "the same channels in another order: channel 0 is B, not R as in the training" in capsys.readouterr().err
    assert predict([*command, "--channels", "R,G,B"]) == 0
    (tmp_path / "channels.json").write_text('["R", "G", "N"]')
    assert predict(command) == 2
    assert "channels R, G, N, not R, G, B as in the training" in capsys.readouterr().err
    assert difference(("a",), ("a",)) is None
