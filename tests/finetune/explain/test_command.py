"""`fovea explain`: the command, its files, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.explain.command import main
from finetune.release import write_release
from tests.browser import CHROMIUM, screenshot
from tests.finetune import runs
from tests.finetune.explain.planted import shortcut_task, write_photos
from tests.finetune.small_tasks import small_task

pytestmark = pytest.mark.slow

FAST = ["--method", "rollout", "--method", "relevance", "--limit", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a release of a classifier that learned a shortcut, of a backbone, and photos."""
    folder = tmp_path_factory.mktemp("explain")
    write_release(folder / "release", shortcut_task(), {"source": {"title": "a shortcut"}})
    runs.make_release(folder / "backbone")
    write_photos(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    assert main([str(folder / "release"), str(folder / "photos"), "--out", str(folder / "out"), *FAST]) == 0
    return folder / "out"


def record(out: Path) -> dict:
    return json.loads((out / "explain.json").read_text())


def test_every_number_stands_beside_those_of_three_baselines(out: Path):
    rows = {row["name"]: row for row in record(out)["maps"]}
    assert set(rows) == {"rollout", "relevance", "random", "centre", "edges"}
    for name, row in rows.items():
        for key in ("deletion", "insertion", "gap"):
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"] and row[key]["count"] == 4, (name, key)
    assert rows["relevance"]["sanity"]["passes"] and rows["relevance"]["lead"]["count"] == 4
    assert rows["edges"]["lead"] is None
    for name in ("explain.csv", "explain.md"):
        assert all(key in (out / name).read_text() for key in rows)
    assert len(list((out / "pictures").iterdir())) == 4 and len(list((out / "attention").iterdir())) == 2


def test_the_same_seed_gives_the_same_numbers(folder: Path, out: Path, tmp_path: Path):
    assert main([str(folder / "release"), str(folder / "photos"), "--out", str(tmp_path / "again"), *FAST]) == 0
    assert record(tmp_path / "again") == record(out)
    other = [*FAST, "--seed", "1"]
    assert main([str(folder / "release"), str(folder / "photos"), "--out", str(tmp_path / "again"), *other]) == 0
    assert record(tmp_path / "again")["maps"] != record(out)["maps"]


def test_a_backbone_of_random_weights_is_explained_and_does_not_pass(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = folder / "of_backbone"
    assert main([str(folder / "backbone"), str(folder / "photos"), "--out", str(out), *FAST]) == 0
    assert capsys.readouterr().out.count("sanity does not pass: the network's weights cannot be told") == 2
    assert not any(row["sanity"]["passes"] for row in record(out)["maps"] if row["sanity"])


def test_the_planted_shortcut_is_on_the_page(out: Path):
    (found,) = [place for place in record(out)["shortcuts"] if place["shortcut"]]
    assert found["name"] == "tagged" and found["rows"] == [24, 32] and found["relevance"] > 0.5
    assert "Does one place decide for a class?" in (out / "index.html").read_text()
    assert record(out)["measure"] == "right answers" and record(out)["slices"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer", "blocks.7.attn"], "--layer blocks.7.attn: no such attention layer; this one has blocks.0.attn, "),
        (["--layer", "2"], "--layer 2: no such attention layer"),
        (["--method", "magic"], "--method magic: unknown; one of attention, rollout, relevance, occlusion"),
        (["--annotations", "none.json"], "none.json"),
        (["--device", "cuda:99"], "device cuda:99"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
):
    given = [str(folder / "release"), str(folder / "photos"), "--out", str(tmp_path / "out"), *more]
    assert main(given) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_files_are_never_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.txt").write_text("kept")
    assert main([str(folder / "release"), str(folder / "photos"), "--out", str(tmp_path), *FAST]) == 2
    assert "holds other files" in capsys.readouterr().err and (tmp_path / "mine.txt").read_text() == "kept"


def test_depth_has_no_class_to_explain(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = small_task("depth", crop=32)
    write_release(tmp_path / "depth", task, {"source": {}})
    assert main([str(tmp_path / "depth"), str(folder / "photos")]) == 2
    assert "task depth: its answer is no class" in capsys.readouterr().err


def test_an_image_that_cannot_be_decoded_is_named(folder: Path, tmp_path: Path):
    photos = shutil.copytree(folder / "photos", tmp_path / "photos")
    (photos / "plain" / "0.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert main([str(folder / "release"), str(photos), "--out", str(out), *FAST]) == 0
    assert "0.png" in record(out)["undecodable"][0]["name"] and len(record(out)["images"]) == 3
    assert "0.png" in (out / "index.html").read_text()


def test_names_of_files_are_escaped_on_the_page(folder: Path, tmp_path: Path):
    (tmp_path / "some").mkdir()
    shutil.copy(folder / "photos" / "plain" / "0.png", tmp_path / "some" / "<b>x\u202e & y.png")
    out = tmp_path / "out"
    assert main([str(folder / "release"), str(tmp_path / "some"), "--out", str(out), *FAST]) == 0
    text = (out / "index.html").read_text()
    assert "<b>x" not in text and "&lt;b&gt;x\\u202e &amp; y" in text


@pytest.mark.processes
def test_help_imports_no_torch():
    code = "import sys, finetune.explain.command; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no chromium here")
def test_a_browser_shows_the_page(out: Path, tmp_path: Path):
    assert CHROMIUM is not None, "install chromium"
    pixels = screenshot((out / "index.html").as_uri(), tmp_path, size=(1500, 2400))
    glow = (pixels[..., 0] > 220) & (pixels[..., 1] > 100) & (pixels[..., 2] < 90)  # the bright end of the maps
    assert glow.sum() > 4 * 5 * 200  # four images with five maps each
    assert (pixels < 100).all(-1).sum() > 5000  # text
