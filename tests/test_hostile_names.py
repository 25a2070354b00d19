"""Names that a terminal, a log, a card or a page would act on, from photos to predictions: all of them are shown."""

from __future__ import annotations

import csv
import os
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from finetune.export.command import main as export
from finetune.predict import main as predict
from pretrain.core.text import has_control_characters
from pretrain.data.__main__ import main as data
from pretrain.release import main as release
from tests.finetune.runs import make_release
from tests.runs import finish

PHOTOS = ["\x1b[31mred\x07.png", "\u202egnp.png", "two\nlines: all is well.png", "c1\x9b31m.png"]
CLASSES = ["</td><script>alert(1)</script>|x", "[y](javascript:alert(1))", "\x1b]0;title\x07`z`\u202e"]
CONFIG = """
run_dir: {folder}/run
task: {{name: classification}}
model: {{release: {folder}/backbone}}
data:
  train: {{images: {folder}/list.csv}}
  val: {{images: {folder}/list.csv}}
  num_workers: 0
optim: {{lr: 1e-3, total_steps: 2, global_batch_size: 4, warmup_steps: 0}}
evaluate: {{every_steps: 2, batch_size: 4, pictures: 2}}
"""


def is_plain(text: str) -> bool:
    return not has_control_characters(text.replace("\n", "").replace("\t", ""))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos with such names, one of them broken, and one with bytes that are not UTF-8."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*PHOTOS, os.fsdecode(b"caf\xe9.png")]:
        Image.fromarray(rng.integers(0, 255, (40, 44, 3), np.uint8)).save(folder / name)
    (folder / "broken\x1b[2J\nfine.png").write_bytes(b"no image")
    (folder / "other.\x1b[2J").write_bytes(b"x")
    return folder


def test_photos_to_shards_and_a_damaged_shard(photos: Path, tmp_path: Path, capsys):
    shards = tmp_path / "shards"
    assert data(["write", str(photos), str(shards), "--workers", "1"]) == 0
    with tarfile.open(shards / "other-000000.tar", "w") as tar:  # of another writer, whose members keep the names
        for name in PHOTOS:
            tar.add(photos / name, name)
            tar.add(photos / name, name.removesuffix(".png") + ".\x1b[2J")
    assert data(["index", str(shards), "--workers", "1"]) == 0
    assert data(["show", str(shards), "--out", str(tmp_path / "sheet.png")]) == 0
    content = bytearray((shards / "other-000000.tar").read_bytes())
    for at in range(700, len(content), 1024):  # damages in names and pixels
        content[at] ^= 1
    (shards / "other-000000.tar").write_bytes(content)
    assert data(["verify", str(shards), "--workers", "1"]) == 1
    data(["index", str(shards), "--force", "--workers", "1"])
    said = capsys.readouterr()
    assert is_plain(said.out + said.err), ascii(said)
    assert r"skipped broken\x1b[2J\nfine.png: " in said.out and r"sample two\nlines: all is well" in said.out
    (skipped,) = (shards / "skipped.txt").read_text("utf-8").splitlines()
    assert skipped.startswith("broken\\x1b[2J\\nfine.png\t") and is_plain(skipped)


@pytest.mark.processes
def test_photos_to_a_report_a_card_and_predictions(photos: Path, tmp_path: Path, capsys):
    make_release(tmp_path / "backbone")
    with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "class_name"])
        rows.writerows((f"photos/{name}", CLASSES[i % 3]) for i, name in enumerate(PHOTOS))
        rows.writerow(["photos/gone\x1b[2J.png", CLASSES[0]])
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    status, said = finish(config, "data.max_lost_fraction=0.5", command=("finetune",))
    assert status == 0, said
    run = tmp_path / "run"
    for text in (said, (run / "log.txt").read_text("utf-8")):
        assert is_plain(text) and "gone\\x1b[2J.png" in text, ascii(text)

    page = (run / "report" / "index.html").read_text("utf-8")
    assert is_plain(page) and "<script" not in page and "&lt;script&gt;alert(1)" in page
    tags: set[str] = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            assert all(not name.startswith("on") for name, _ in attrs)

    Tags().feed(page)
    assert not tags & {"script", "iframe", "object", "a", "form"}

    card = (run / "release" / "README.md").read_text("utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(card)
    kinds = {child.type for token in tokens for child in (token, *(token.children or ()))}
    assert is_plain(card) and not kinds & {"html_inline", "html_block", "link_open", "image"}, kinds
    assert "alert(1)" in card and "\\x1b" in card

    out = tmp_path / "out"
    assert predict([str(run / "release"), str(photos), "--out", str(out), "--device", "cpu"]) == 0
    assert export([str(run / "release"), str(tmp_path / "exported")]) == 0
    assert release(["verify", str(run / "release"), str(tmp_path / "exported")]) == 0
    shown = capsys.readouterr()
    assert is_plain(shown.out + shown.err) and r"broken\x1b[2J\nfine.png: " in shown.err
    for file in (out / "predictions.json", tmp_path / "exported" / "export.json", run / "results.json"):
        assert is_plain(file.read_text("utf-8"))
