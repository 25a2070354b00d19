"""`fovea predict`: every task says what it sees, in files that others read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from finetune.predict import find_images, main, read_ids
from finetune.predictions import Classes, ClassMap
from finetune.predictor import Predictor
from finetune.release import open_task, write_release
from finetune.tasks.base import Task
from tests.data.photos import ramps, stored
from tests.finetune.small_tasks import CLASSES, small_task

PIXELS = {"crop": 32, "resize": 32}
QUERIES = {"name": "detr", "num_queries": 6, "width": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (40, 60)), ("b.png", (64, 32)), ("deep/a.jpg", (33, 47))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(task: Task, tmp_path: Path, *arguments: object) -> Path:
    release = write_release(tmp_path / "release", task, {"source": {"title": "a test"}})
    out = tmp_path / "out"
    assert main([str(release), *map(str, arguments), "--out", str(out), "--device", "cpu", "--batch-size", "2"]) == 0
    return out


def predictions(out: Path) -> list[dict]:
    return json.loads((out / "predictions.json").read_text())


def test_classification_names_the_likely_classes_of_every_image(photos: Path, tmp_path: Path):
    out = run(small_task("classification"), tmp_path, photos)
    rows = predictions(out)
    assert [row["id"] for row in rows] == ["a.jpg", "b.png", "deep/a.jpg"]
    for row in rows:
        assert set(row["probabilities"]) == set(CLASSES) and abs(sum(row["probabilities"].values()) - 1) < 1e-4
        assert row["class"] == max(row["probabilities"], key=row["probabilities"].__getitem__)
    assert sorted(p.relative_to(out / "pictures").as_posix() for p in out.rglob("*.png")) == [
        "a.png", "b.png", "deep/a.png",
    ]  # fmt: skip


def test_a_release_without_its_weights_is_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    release = write_release(tmp_path / "release", small_task("classification"), {"source": {"title": "a test"}})
    for name in ("model.safetensors", "MANIFEST.json"):
        (release / name).unlink()
    record = json.loads((release / "fovea.json").read_text())
    del record["manifest"]  # as version 0.1.0 wrote it
    (release / "fovea.json").write_text(json.dumps(record))
    assert main([str(release), str(photos), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{release}: a release without its weights, model.safetensors" in said and "--out" not in said


def test_predictions_do_not_depend_on_other_images_of_the_batch(photos: Path, tmp_path: Path):
    task = small_task("classification")
    together = predictions(run(task, tmp_path / "1", photos))
    alone = predictions(run(task, tmp_path / "2", photos / "b.png", "--no-pictures"))
    assert alone[0]["probabilities"] == pytest.approx(together[1]["probabilities"], abs=2e-6)
    assert not (tmp_path / "2" / "out" / "pictures").exists()


def test_detections_load_with_the_tools_of_coco(photos: Path, tmp_path: Path):
    classes = Classes(CLASSES, category_ids=(0, 7, 90))
    out = run(small_task("detection", classes=classes, size=64, head=QUERIES), tmp_path, photos)
    truth = COCO(str(out / "images.json"))
    found = truth.loadRes(str(out / "predictions.json"))
    assert truth.getImgIds() == [1, 2, 3] and {row["category_id"] for row in predictions(out)} <= {0, 7, 90}
    assert len(found.getAnnIds()) == len(predictions(out)) > 0
    for row in predictions(out):
        image = truth.imgs[row["image_id"]]
        x, y, width, height = row["bbox"]
        assert -1e-3 <= x <= x + width <= image["width"] + 1e-2 and -1e-3 <= y <= y + height <= image["height"] + 1e-2


@pytest.mark.parametrize(("record", "shape"), [({"orientation": "exif"}, (24, 40)), ({}, (40, 24))])
def test_photos_are_read_as_those_of_the_training(record: dict, shape: tuple[int, int], tmp_path: Path):
    photo = tmp_path / "turned.png"
    photo.write_bytes(stored(ramps(24, 40), 6))
    task = small_task("segmentation", head={"name": "linear"}, **PIXELS)
    release = write_release(tmp_path / "release", task, record)
    assert main([str(release), str(photo), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    with Image.open(tmp_path / "out" / "maps" / "turned.png") as image:
        assert np.asarray(image).shape == shape
    predictor = Predictor(*open_task(release))
    (prediction,) = predictor.predict(photo)
    assert isinstance(prediction, ClassMap) and prediction.classes.shape == shape
    assert predictor.draw(photo, prediction).shape[0] >= shape[0]


def test_ids_are_those_of_the_annotation_file_and_other_images_are_skipped(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"id": 42, "file_name": "b.png"}, {"id": 7, "file_name": "deep/a.jpg"}]
    (tmp_path / "val.json").write_text(json.dumps({"images": rows}))
    out = run(small_task("detection", size=64, head=QUERIES), tmp_path, photos, "--ids", tmp_path / "val.json")
    assert {row["id"] for row in json.loads((out / "images.json").read_text())["images"]} == {42, 7}
    assert "a.jpg: --ids has no image of this name, or several files have it; skipped" in capsys.readouterr().err


def test_a_class_map_is_a_png_of_class_numbers_in_the_image_s_size(photos: Path, tmp_path: Path):
    out = run(small_task("segmentation", head={"name": "linear"}, **PIXELS), tmp_path, photos)
    for name, size in (("a", (40, 60)), ("b", (64, 32)), ("deep/a", (33, 47))):
        with Image.open(out / "maps" / f"{name}.png") as image:
            assert image.mode == "P" and set(np.unique(np.asarray(image))) <= {0, 1, 2}
            assert np.asarray(image).shape == size
    row = predictions(out)[0]
    assert row["id"] == "a.jpg" and sum(row["fraction"].values()) == pytest.approx(1, abs=1e-4)


def test_depth_is_a_png_of_millimetres(photos: Path, tmp_path: Path):
    out = run(small_task("depth", crop=32), tmp_path, photos / "a.jpg")
    with Image.open(out / "maps" / "a.png") as image:
        millimetres = np.asarray(image)
    assert millimetres.shape == (40, 60) and millimetres.max() > 255
    assert millimetres.min() / 1000 == pytest.approx(predictions(out)[0]["metres"]["min"], abs=1e-3)


def test_a_damaged_image_is_named_and_the_others_are_predicted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:100])
    out = run(small_task("classification"), tmp_path, photos)
    assert [row["id"] for row in predictions(out)] == ["a.jpg", "deep/a.jpg"]
    said = capsys.readouterr()
    assert "b.png: " in said.err and "skipped" in said.err and "2 of 3" in said.out


def test_the_exit_status_is_1_if_no_image_can_be_decoded(tmp_path: Path):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8 no")
    release = write_release(tmp_path / "release", small_task("classification"), {})
    assert main([str(release), str(tmp_path / "x.jpg"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1


@pytest.mark.parametrize("wrong", ["nowhere", "photos/*.webp", "empty"])
def test_an_argument_that_matches_no_image_is_an_error(
    wrong: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path), str(tmp_path / wrong), "--out", str(tmp_path / "out")]) == 2
    assert wrong in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_is_no_task_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), str(photos), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_files_folders_and_patterns_name_each_image_once(photos: Path):
    found = find_images([str(photos / "*.jpg"), str(photos), str(photos / "deep" / ".." / "a.jpg")])
    assert [path.relative_to(photos).as_posix() for path in found] == ["a.jpg", "b.png", "deep/a.jpg"]


def test_a_link_is_an_image_by_its_own_name(photos: Path, tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (photos / "a.jpg").rename(tmp_path / "blobs" / "6f1d")
    for name in ("a.jpg", "again.jpg"):
        (photos / name).symlink_to(tmp_path / "blobs" / "6f1d")
    out = run(small_task("classification"), tmp_path, photos)
    assert [row["id"] for row in predictions(out)] == ["a.jpg", "again.jpg", "b.png", "deep/a.jpg"]


def test_an_id_is_never_used_for_two_images(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ids, task = tmp_path / "val.json", small_task("detection", size=64, head=QUERIES)
    for number, (known, expected) in enumerate([("a.jpg", ["a.jpg"]), ("deep/a.jpg", ["deep/a.jpg"])]):
        ids.write_text(json.dumps({"images": [{"id": 7, "file_name": known}, {"id": 8, "file_name": "b.png"}]}))
        out = run(task, tmp_path / str(number), photos, "--ids", ids)
        rows = json.loads((out / "images.json").read_text())["images"]
        assert [row["file_name"] for row in rows] == sorted([*expected, "b.png"])
        assert "a.jpg: --ids has no image of this name, or several files have it; skipped" in capsys.readouterr().err
    (photos / "a.jpg").unlink()
    for number, known in enumerate(("a.jpg", "C:\\photos\\deep\\A.jpg", "deep/%61.jpg"), start=2):
        ids.write_text(json.dumps({"images": [{"id": "7", "file_name": known}]}))
        out = run(task, tmp_path / str(number), photos, "--ids", ids)  # one file has a name that this one means
        assert [row["id"] for row in json.loads((out / "images.json").read_text())["images"]] == [7]


def test_arrays_are_images_as_in_training(photos: Path, tmp_path: Path):
    np.save(photos / "c.npy", np.zeros((40, 50, 3), np.uint8))
    out = run(small_task("classification"), tmp_path, photos / "c.npy", photos / "b.png")
    assert [row["id"] for row in predictions(out)] == ["c.npy", "b.png"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(["--device", "gpu"], "device gpu: "), (["--out", "photos/b.png"], "not a folder to write to")],
)
def test_an_unknown_device_or_folder_is_refused(
    wrong: list[str], said: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    release = write_release(tmp_path / "release", small_task("classification"), {})
    assert main([str(release), str(photos), "--out", "out", *wrong]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_a_checkpoint_cannot_predict(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "task.json").write_text("{}")
    assert main([str(tmp_path / "run"), str(photos), "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_two_images_of_one_file_name_have_no_id(tmp_path: Path):
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}]}))
    with pytest.raises(ValueError, match="1 file names are used by more than one image"):
        read_ids(path)
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}))
    with pytest.raises(ValueError, match="1 ids are used by more than one image"):
        read_ids(path)
