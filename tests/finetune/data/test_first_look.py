"""What is wrong with the data is said by --check, in sentences: not by a run that has waited for its GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from finetune.__main__ import main
from finetune.data.first_look import look
from pretrain.core.configlib import ConfigError
from tests.finetune.planted import Planted

SIZE = (24, 16)  # width, height
SQUARE = {"bbox": [2, 3, 8, 6], "segmentation": [[2, 3, 10, 3, 10, 9, 2, 9]], "area": 48, "iscrowd": 0}


def photos(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (9 * number, 20, 30)).save(folder / name)


def checked(
    root: Path, capsys: pytest.CaptureFixture[str], task: dict[str, Any], **source: Any
) -> tuple[int, str, str]:
    """Exit status, output and errors of `fovea finetune CONFIG --check`."""
    config = {
        "run_dir": str(root / "run"),
        "task": task,
        "model": {"timm": "resnet18", "random": True},
        "data": {"train": source, "val": source},
        "optim": {"lr": 1e-3, "total_steps": 2, "global_batch_size": 2},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    status = main([str(root / "run.yaml"), "--check"])
    out, err = capsys.readouterr()
    return status, out, err


def check_detection(
    root: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], size: tuple[int, int] = SIZE
) -> tuple[int, str, str]:
    images = [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(6)]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cell"}]}
    (root / "a.json").write_text(json.dumps(content))
    photos(root / "images", [f"{i}.png" for i in range(6)])
    task = {"name": "detection", "head": {"name": "mask_rcnn"}}
    return checked(root, capsys, task, images=str(root / "images"), annotations=str(root / "a.json"))


def objects(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": i, "image_id": i % 6, "category_id": 1, **SQUARE, **changes} for i in range(12)]


def test_annotation_ids_that_repeat_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [row | {"id": 0, "bbox": [2, 3, 8, 5 + i / 9]} for i, row in enumerate(objects())]
    status, out, err = check_detection(tmp_path, capsys, rows)
    assert status == 0 and not err and "1 x annotations without own ids" in out and "without objects" not in out


def test_a_set_that_loses_its_objects_stops_with_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = objects()
    for row in rows[1:]:
        row["segmentation"] = []
    status, _, err = check_detection(tmp_path, capsys, rows)
    assert status == 2 and "data.train" in err
    assert "11 of 12 labels cannot be used: 11 x bad mask; the limit is data.max_lost_fraction=0.05" in err


def test_exchanged_width_and_height_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, _, err = check_detection(tmp_path, capsys, objects(), size=(SIZE[1], SIZE[0]))
    assert status == 2 and "6 of 6 examples that were looked at cannot be used" in err
    assert "0.png: the image has 24 x 16 pixels, its annotations 16 x 24; width and height are exchanged" in err


def test_a_coloured_mask_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos(tmp_path / "images", [f"{i}.png" for i in range(3)])
    photos(tmp_path / "masks", [f"{i}.png" for i in range(3)])
    (tmp_path / "classes.json").write_text('["a", "b"]')
    places = {key: str(tmp_path / name) for key, name in
              (("images", "images"), ("masks", "masks"), ("classes", "classes.json"))}  # fmt: skip
    status, _, err = checked(tmp_path, capsys, {"name": "segmentation"}, **places)
    assert status == 2 and "3 of 3 examples" in err and "masks/0.png: a mask of mode RGB" in err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat/0.png", "cat/1.png"], "1 class (cat); a classifier needs at least 2"),
        (["train/cat/0.png", "val/cat/1.png"], "are parts of a data set, not classes; give one of them"),
        (["train/cat/0.png"], "its classes train are parts of a data set"),
    ],
)
def test_images_without_two_classes_are_no_training_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], message: str
):
    photos(tmp_path / "in", names)
    status, _, err = checked(tmp_path, capsys, {"name": "classification"}, images=str(tmp_path / "in"))
    assert status == 2 and message in err and len(err.splitlines()) <= 3


def test_few_unusable_examples_are_listed_and_many_refused():
    for bad, limit, refused in ((1, 0.01, False), (2, 0.01, False), (3, 0.01, True), (3, 0.5, False)):
        examples = Planted(32, broken=tuple(np.linspace(0, 31, 16).astype(int)[:bad].tolist()))
        if refused:
            with pytest.raises(ConfigError, match="3 of 16 examples that were looked at cannot be used"):
                look(examples, limit, source="data.train")
        else:
            look(examples, limit, source="data.train")
        assert examples.findings.counts() == {"unusable example": bad}
