"""What was written is what is opened: a manifest in every release and export, compared at every opening."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fovea
from finetune.export.command import main as export
from finetune.predict import main as predict
from finetune.release import open_task
from finetune.release import write_release as write_task
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_official
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.release.manifest import NotFiniteError
from pretrain.models.teachers.feature_teacher import open_teacher
from pretrain.probes.__main__ import main as probe
from pretrain.release import main as release
from tests.finetune.small_tasks import small_task

FILES = {
    "backbone": ("model.safetensors", "heads.safetensors", "fovea.json", "config.json"),
    "task": ("model.safetensors", "fovea.json", "config.json"),
}


def write_backbone(folder: Path) -> Path:
    torch.manual_seed(0)
    vit = ViT((32, 32), 8, embed_dim=24, depth=2, num_heads=3, pos_embed="learned")
    return write_release(folder, vit, objective="mae", extra_state={"decoder.x": torch.ones(2)}, record={})


WRITERS: dict[str, Callable[[Path], Path]] = {
    "backbone": write_backbone,
    "task": lambda folder: write_task(folder, small_task("classification"), {"source": {"title": "a test"}}),
}
OPENERS: dict[str, Callable[[Path], Any]] = {"backbone": read_release, "task": open_task}


def flip(path: Path, bit: int = 3) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


def broken(kind: str, folder: Path, value: float) -> None:
    """A weight of an existing release becomes `value`, with a manifest that fits."""
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[-1]
    state[name].view(-1)[0] = value
    save_file(state, folder / "model.safetensors")
    (folder / "MANIFEST.json").unlink()
    facts = json.loads((folder / "fovea.json").read_text())
    del facts["manifest"]
    (folder / "fovea.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_one_changed_bit_of_any_file_is_refused_by_name_and_hash(kind: str, name: str, tmp_path: Path):
    folder = WRITERS[kind](tmp_path / "r")
    OPENERS[kind](folder)
    flip(folder / name)
    with pytest.raises(ValueError) as refused:
        OPENERS[kind](folder)
    message = str(refused.value)
    assert message.startswith(f"{folder}: damaged: {name} has changed since it was written: sha256 "), message
    assert "the manifest records" in message and "copy it again" in message and "\n" not in message


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_a_missing_file_is_named(kind: str, name: str, tmp_path: Path):
    folder = WRITERS[kind](tmp_path / "r")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"damaged: {name}: No such file"):
        OPENERS[kind](folder)


@pytest.mark.parametrize("kind", FILES)
def test_a_manifest_that_was_changed_or_removed_is_named(kind: str, tmp_path: Path):
    folder = WRITERS[kind](tmp_path / "r")
    flip(folder / "MANIFEST.json", bit=0)
    with pytest.raises(ValueError, match=r"damaged: MANIFEST\.json"):
        OPENERS[kind](folder)
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(ValueError, match=r"damaged: MANIFEST\.json is missing"):
        OPENERS[kind](folder)


@pytest.mark.parametrize("kind", FILES)
def test_the_card_may_be_edited_and_files_added_but_none_that_would_be_read(kind: str, tmp_path: Path):
    folder = WRITERS[kind](tmp_path / "r")
    (folder / "README.md").write_text("mine")
    (folder / "LICENSE").write_text("mine")
    OPENERS[kind](folder)
    assert release(["verify", str(folder)]) == 0
    if kind == "task":
        (folder / "heads.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"damaged: heads\.safetensors was added after the release was written"):
            OPENERS[kind](folder)


def test_a_manifest_that_names_files_outside_its_folder_is_refused(tmp_path: Path):
    from pretrain.core.manifest import FileRecord, render

    folder = write_backbone(tmp_path / "r")
    content = render([FileRecord("../secret", 1, "0" * 64)], {"format": 1, "kind": "release"})
    (folder / "MANIFEST.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"lists a file outside its folder: '\.\./secret'"):
        read_release(folder)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_when_opened(kind: str, value: float, tmp_path: Path, capsys):
    folder = WRITERS[kind](tmp_path / "r")
    broken(kind, folder, value)
    with pytest.raises(NotFiniteError, match=r"has 1 of \d+ values that are NaN or infinite"):
        OPENERS[kind](folder)
    assert release(["seal", str(folder)]) == 1
    assert "NaN or infinite" in capsys.readouterr().err and not (folder / "MANIFEST.json").exists()


@pytest.mark.parametrize("kind", FILES)
def test_weights_that_are_not_finite_are_never_written(kind: str, tmp_path: Path):
    folder = WRITERS[kind](tmp_path / "r")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(NotFiniteError, match=r"norm1?\.bias has 1 of \d+ values"):
        if kind == "task":
            task = small_task("classification")
            with torch.no_grad():
                task.bare_backbone.get_parameter("blocks.0.norm1.bias")[0] = float("nan")
            write_task(folder, task, {})
        else:
            backbone = read_release(folder).build()
            with torch.no_grad():
                backbone.get_parameter("norm.bias")[0] = float("nan")
            write_release(folder, backbone, objective="mae", extra_state={}, record={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_of_another_project_with_nan_is_refused(tmp_path: Path):
    state = load_file(write_backbone(tmp_path / "r") / "model.safetensors")
    state["norm.bias"][0] = float("nan")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"the weights cannot be used: norm\.bias has 1 of 24 values"):
        fovea.load(tmp_path / "weights.pth", args={"num_heads": 3}, device="cpu")


def test_every_command_and_function_that_opens_a_backbone_refuses_a_changed_bit(tmp_path: Path, capsys):
    folder = write_backbone(tmp_path / "r")
    flip(folder / "model.safetensors")
    teacher: dict[str, Any] = {"num_heads": None, "size": (32, 32), "grid": (4, 4), "in_chans": 3}
    openings: dict[str, Callable[[], object]] = {
        "fovea.load": lambda: fovea.load(folder, device="cpu"),
        "a file of it": lambda: load_official(folder / "model.safetensors"),
        "as weights of timm": lambda: fovea.load(folder, timm="vit_tiny_patch16_224", device="cpu"),
        "a teacher": lambda: open_teacher(folder, **teacher),
    }
    for name, opening in openings.items():
        with pytest.raises(ValueError, match="has changed since it was written"):
            opening()
            pytest.fail(name)
    assert probe([str(folder), "--train", str(tmp_path), "--val", str(tmp_path)]) == 2
    assert "has changed since it was written" in capsys.readouterr().err


def test_predict_and_export_refuse_a_changed_bit(tmp_path: Path, capsys):
    folder = WRITERS["task"](tmp_path / "r")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    flip(folder / "model.safetensors")
    assert predict([str(folder), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 2
    assert export([str(folder), str(tmp_path / "exported")]) == 2
    assert capsys.readouterr().err.count("has changed since it was written") == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "exported").exists()


def test_verify_gives_a_line_and_a_status_for_each_folder(tmp_path: Path, capsys):
    good, bad = (WRITERS[kind](tmp_path / kind) for kind in FILES)
    assert release(["verify", str(good), str(bad)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said] == [str(good), str(bad)]
    assert all(line.endswith("as they were written") for line in said)
    flip(bad / "model.safetensors")
    assert release(["verify", str(bad), str(good)]) == 1
    both = capsys.readouterr()
    assert both.out.startswith(str(good)) and "has changed since it was written" in both.err
    assert release(["verify", str(tmp_path)]) == 2
    assert "neither a release nor an export" in capsys.readouterr().err


def test_a_change_that_a_person_made_is_accepted_by_seal(tmp_path: Path):
    folder = write_backbone(tmp_path / "r")
    flip(folder / "model.safetensors", bit=0)
    assert release(["verify", str(folder)]) == 1
    assert release(["seal", str(folder)]) == 0
    assert release(["verify", str(folder)]) == 0
    read_release(folder)


def test_a_release_without_hashes_opens_and_says_so_once(tmp_path: Path, capsys):
    from tests.test_older_files import OLD

    folder = Path(shutil.copytree(OLD / "run" / "release", tmp_path / "release"))
    read_release(folder)
    read_release(folder)
    said = capsys.readouterr().err
    assert (
        said == f"{folder}: written without hashes, damage cannot be found; `fovea release seal {folder}` adds them\n"
    )
    assert release(["verify", str(folder)]) == 2
    assert release(["seal", str(folder)]) == 0
    assert release(["verify", str(folder)]) == 0


@pytest.mark.slow
def test_an_export_is_verified_and_never_mixed_with_an_earlier_one(tmp_path: Path, capsys):
    folder = WRITERS["task"](tmp_path / "r")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"of an earlier export")
    assert export([str(folder), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["MANIFEST.json", "export.json", "model.pt2"]
    assert release(["verify", str(out)]) == 0
    flip(out / "model.pt2")
    assert release(["verify", str(out)]) == 1
    assert "model.pt2 has changed since it was written" in capsys.readouterr().err
    assert export([str(folder), str(folder)]) == 2  # a release is no place for an export
    open_task(folder)
