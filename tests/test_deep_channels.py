"""Images that are not 8-bit RGB from shards to a graph: 13 channels of 12 bits, and 16-bit gray, by the real commands.

The stored values, and so the mean and standard deviation of every channel, are known: each end must have them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from finetune.config import DataSource
from finetune.data.reading import Reading
from finetune.export.command import main as export
from finetune.predict import main as predict
from finetune.release import open_task
from finetune.tasks import open_examples
from pretrain.data.__main__ import main as data
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.show import examine
from tests.runs import finish

pytestmark = [pytest.mark.processes, pytest.mark.slow]

SIDE, BANDS, IMAGES = 32, 13, 12
SCENE_RANGE = tuple((10.0 * band, 4095.0 - 20 * band) for band in range(BANDS))
GRAY_RANGE = (0.0, 4095.0)
OPTIM: dict[str, Any] = {"lr": 1e-3, "global_batch_size": 4, "total_steps": 2, "warmup_steps": 1}
LOG: dict[str, Any] = {"every_steps": 1, "pictures_every_steps": 2, "tensorboard": False}


def in_range(values: np.ndarray, value_range: Any) -> np.ndarray:
    """Values [..., C] to [0, 1], by the definition of `data.range`, in float64."""
    low, high = np.atleast_2d(np.array(value_range, float)).T
    return ((values - low) / (high - low)).clip(0, 1)


def statistics(values: np.ndarray, value_range: Any) -> tuple[list[float], list[float]]:
    pixels = in_range(values, value_range)
    return pixels.mean((0, 1, 2)).tolist(), pixels.std((0, 1, 2)).tolist()


def plain(value_range: Any) -> list[Any]:
    """As JSON holds it."""
    return json.loads(json.dumps(value_range))


def run(folder: Path, name: str, command: str, config: dict[str, Any]) -> Path:
    """The finished run `folder/name`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plain({"run_dir": str(folder / name), "optim": OPTIM, "log": LOG, **config})))
    status, said = finish(path, command=(command,))
    assert status == 0, said
    return folder / name


def pretrained(folder: Path, shards: Path, channels: int, value_range: Any, mean: list[float], std: list[float]) -> str:
    shape = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": channels}
    numbers = {"range": value_range, "mean": mean, "std": std, "num_workers": 0, "shards": str(shards)}
    mae = {"name": "mae", "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    config = {"objective": mae, "model": {"name": "vit_tiny", **shape}, "data": numbers}
    return str(run(folder, "pretrained", "pretrain", config) / "release")


def finetuned(folder: Path, task: dict[str, Any], release: str, source: dict[str, Any], **more: Any) -> Path:
    config = {"task": task, "model": {"release": release}, "evaluate": {"pictures": 1, "batch_size": 4, **more}}
    return run(folder, task["name"], "finetune", {**config, "data": {"train": source, "val": source, "num_workers": 0}})


def graph(release: Path, out: Path, images: np.ndarray) -> list[np.ndarray]:
    """The outputs of the exported ONNX for pixels [n, H, W, C] in 0 to 1."""
    assert export([str(release), str(out), "--onnx"]) == 0
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    given = np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32))
    assert session.get_inputs()[0].shape[1] == images.shape[3]
    return [np.asarray(found) for found in session.run(None, {"images": given})]


def normalized(release: Path, source: dict[str, Any], section: Any = None) -> np.ndarray:
    """[n, C, H, W] of a set as the task of a release normalizes them for prediction."""
    task, record = open_task(release)
    how = Reading(task.bare_backbone.in_chans, "auto", tuple(map(tuple_of, record["range"])))  # type: ignore[arg-type]
    examples = open_examples(task.config, DataSource(**source), classes=None, reading=how)
    transform = task.eval_transform()
    images = [transform(examples[place])["image"] for place in range(len(examples))]
    return task.normalize(torch.stack(images)).numpy()


def tuple_of(pair: Any) -> Any:
    return tuple(pair) if isinstance(pair, list) else pair


def check_record(release: str | Path, value_range: Any, mean: list[float], std: list[float]) -> None:
    record = json.loads((Path(release) / "fovea.json").read_text())
    assert record["range"] == plain(value_range)
    np.testing.assert_allclose(record["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(record["std"], std, rtol=1e-6)


def test_13_channels_of_12_bits_have_equal_statistics_from_shards_to_onnx(tmp_path: Path):
    rng = np.random.default_rng(0)
    level = np.linspace(800, 3000, BANDS)  # every channel has a mean and a spread of its own
    scenes = rng.normal(level, level / 6, (IMAGES, SIDE, SIDE, BANDS)).clip(0, 4095).astype(np.uint16)
    scenes[::2, :, : SIDE // 2] //= 2  # every second image is dark at the left
    masks = np.zeros((IMAGES, SIDE, SIDE), np.uint8)
    masks[:, :, SIDE // 2 :] = 1
    for number, (scene, mask) in enumerate(zip(scenes, masks, strict=True)):
        folder = tmp_path / "scenes" / ("dark", "light")[number % 2]
        for place in (folder, tmp_path / "masks"):
            place.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number:02d}.npy", scene)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number:02d}.png")
    mean, std = statistics(scenes, SCENE_RANGE)
    expected = ((in_range(scenes, SCENE_RANGE) - mean) / std).transpose(0, 3, 1, 2)

    assert data(["write", str(tmp_path / "scenes"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    dataset = Dataset.open(tmp_path / "shards")
    shown = examine(dataset, value_range=SCENE_RANGE).mean_std(BANDS)
    np.testing.assert_allclose(shown, (mean, std), rtol=1e-4)
    release = pretrained(tmp_path, tmp_path / "shards", BANDS, SCENE_RANGE, mean, std)
    check_record(release, SCENE_RANGE, mean, std)
    settings: dict[str, Any] = {"in_chans": BANDS, "mean": mean, "std": std, "value_range": SCENE_RANGE}
    images, labels = next(iter(EvalImages(dataset, (SIDE, SIDE), batch_size=IMAGES, resize=SIDE, **settings)))
    reader = Reader(dataset)
    order = [int(reader.key(0, place)[-2:]) for place in range(IMAGES)]
    np.testing.assert_allclose(images, expected[order], atol=2e-5)
    assert labels.tolist() == [number % 2 for number in order]

    source = {"images": str(tmp_path / "shards")}
    classified = finetuned(
        tmp_path,
        {"name": "classification", "augment": {"whole": True, "color_jitter": 0.2, "erase": 0.5}},
        release,
        source,
        picture_channels=[3, 2, 1],
    )
    check_record(classified / "release", SCENE_RANGE, mean, std)
    np.testing.assert_allclose(normalized(classified / "release", source), expected[order], atol=2e-5)
    (logits,) = graph(classified / "release", tmp_path / "graph", in_range(scenes, SCENE_RANGE))
    exported = json.loads((tmp_path / "graph" / "export.json").read_text())["input"]
    assert exported["range"] == plain(SCENE_RANGE) and "13 channels" in exported["values"]
    files = [str(path) for path in sorted((tmp_path / "scenes").rglob("*.npy"), key=lambda path: path.stem)]
    assert predict([str(classified), *files, "--out", str(tmp_path / "predicted")]) == 0
    rows = json.loads((tmp_path / "predicted" / "predictions.json").read_text())
    probabilities = torch.from_numpy(logits).softmax(1).max(1).values
    assert len(rows) == IMAGES
    for row, most in zip(rows, probabilities.tolist(), strict=True):
        assert max(row["probabilities"].values()) == pytest.approx(most, abs=1e-4)

    for path in (tmp_path / "scenes").rglob("*.npy"):
        path.rename(tmp_path / "scenes" / path.name)
    source = {"images": str(tmp_path / "scenes"), "masks": str(tmp_path / "masks")}
    (tmp_path / "masks" / "classes.json").write_text('["land", "sea"]')
    task = {"name": "segmentation", "head": {"name": "linear"}, "crop": SIDE, "slide": False}
    segmented = finetuned(tmp_path, task, release, source)
    check_record(segmented / "release", SCENE_RANGE, mean, std)
    scene_files = sorted(int(path.stem) for path in (tmp_path / "scenes").glob("*.npy"))
    np.testing.assert_allclose(normalized(segmented / "release", source), expected[scene_files], atol=2e-5)
    (scores,) = graph(segmented / "release", tmp_path / "graph2", in_range(scenes, SCENE_RANGE))
    assert predict([str(segmented), str(tmp_path / "scenes"), "--out", str(tmp_path / "maps"), "--no-pictures"]) == 0
    for number in range(IMAGES):
        found = np.asarray(Image.open(tmp_path / "maps" / "maps" / f"{number:02d}.png"))
        sure = np.abs(scores[number, 0] - scores[number, 1]) > 1e-3
        assert sure.mean() > 0.9 and np.array_equal(found[sure], scores[number].argmax(0)[sure])


def test_a_gray_16_bit_detector_has_equal_statistics_from_shards_to_onnx(tmp_path: Path):
    rng = np.random.default_rng(1)
    films = rng.integers(200, 900, (IMAGES, SIDE, SIDE, 1)).astype(np.uint16)
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "stone"}]}
    (tmp_path / "films").mkdir()
    for number, film in enumerate(films):
        film[8:20, 4:16] = 3000 + 16 * number
        Image.fromarray(film[..., 0]).save(tmp_path / "films" / f"{number:02d}.png")
        id = number + 1
        coco["images"].append({"id": id, "file_name": f"{number:02d}.png", "width": SIDE, "height": SIDE})
        box = {"bbox": [4, 8, 12, 12], "area": 144, "iscrowd": 0}
        coco["annotations"].append({"id": id, "image_id": id, "category_id": 1, **box})
    (tmp_path / "stones.json").write_text(json.dumps(coco))
    mean, std = statistics(films, GRAY_RANGE)
    expected = ((in_range(films, GRAY_RANGE) - mean) / std).transpose(0, 3, 1, 2)

    assert data(["write", str(tmp_path / "films"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    release = pretrained(tmp_path, tmp_path / "shards", 1, GRAY_RANGE, mean, std)
    check_record(release, GRAY_RANGE, mean, std)
    source = {"images": str(tmp_path / "films"), "annotations": str(tmp_path / "stones.json")}
    head = {"name": "detr", "num_queries": 6, "width": 16, "depth": 1, "num_heads": 2}
    task = {"name": "detection", "head": head, "size": SIDE, "scale": [0.8, 1.2], "photometric": True}
    detector = finetuned(tmp_path, task, release, source)
    check_record(detector / "release", GRAY_RANGE, mean, std)
    np.testing.assert_allclose(normalized(detector / "release", source), expected, atol=2e-5)

    outputs = graph(detector / "release", tmp_path / "graph", in_range(films, GRAY_RANGE))
    made, _ = open_task(detector / "release")
    with torch.no_grad():
        own = made.outputs(torch.from_numpy(expected.astype(np.float32)))
    for ours, theirs in zip(own, outputs, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-3)
    assert predict([str(detector), str(tmp_path / "films"), "--out", str(tmp_path / "found")]) == 0
    assert (tmp_path / "found" / "pictures" / "00.png").exists()
