"""The page of a run: whole in one file, safe with any text, and seen in a real browser."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from finetune.metrics.metric import Scores
from finetune.report import curves, tables
from finetune.report.page import Drawn, Page, render
from finetune.report.write import board_pictures, write_report
from tests.browser import CHROMIUM, screenshot

NAMES = ("apple", "<b>pear</b> & co", "plum")
CONFUSION = np.array([[8, 1, 1], [5, 5, 0], [0, 0, 0]])
BLUE = (10, 60, 240)


def scores() -> Scores:
    per_class = [
        {"name": NAMES[0], "images": 10, "top1": 0.8},
        {"name": NAMES[1], "images": 10, "top1": 0.5},
        {"name": NAMES[2], "images": 0, "top1": None},
    ]
    recall = np.linspace(0, 1, 11)
    series = {"box, IoU 0.50": {"apple": {"recall": recall, "precision": 1 - recall}}}
    return Scores({"top1": 0.65, "top5": 1.0}, "20 images", per_class, CONFUSION, series)


def page() -> Page:
    drawn = [Drawn(f"val/{i}.jpg", 0.1 * i, np.full((200, 300, 3), BLUE, np.uint8)) for i in range(2)]
    rows = [{"step": i, "loss": 2.0 - i / 100, "lr": 1e-3} for i in range(60)] + [{"step": 60, "val/top1": 0.6}]
    return Page(
        "grocery", "a run", scores(), NAMES, worst=drawn, best=drawn[:1], rows=rows,
        findings={"train": ["a.json: 3: <script>alert(1)</script>"]},
        facts={"commit": "abc", "configuration": "seed: 0\nrun_dir: x"}, warnings=["the control"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def text() -> str:
    return render(page())


class Links(HTMLParser):
    """Everything a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_needs_no_other_file(text: str):
    links = Links()
    links.feed(text)
    assert links.found and all(link.startswith("data:image/") for link in links.found)
    assert not links.tags & {"script", "link", "iframe", "object", "form"}
    assert "@import" not in text and "url(" not in text


def test_text_of_users_is_escaped(text: str):
    assert "<b>pear</b>" not in text and "&lt;b&gt;pear&lt;/b&gt; &amp; co" in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_worst_class_comes_first_and_one_without_images_last():
    assert [row["name"] for row in tables.worst_first(scores())] == [NAMES[1], NAMES[0], NAMES[2]]


def test_the_most_frequent_mistake_comes_first_and_right_answers_are_none():
    assert tables.mistakes(CONFUSION, NAMES) == [
        (NAMES[1], NAMES[0], 5, 10),
        (NAMES[0], NAMES[1], 1, 10),
        (NAMES[0], NAMES[2], 1, 10),
    ]


def test_many_numbers_of_two_kinds_become_a_table():
    coco = {f"{kind}_{name}": 0.1 for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small", "ar100")}
    found = tables.grouped(coco)
    assert (
        found is not None
        and found[0] == ["ap", "ap50", "ap75", "ap_small", "ar100"]
        and list(found[1]) == ["box", "mask"]
    )
    assert tables.grouped({"top1": 0.1, "top5": 0.2}) is None
    assert tables.grouped({f"d_{i}": 0.1 for i in range(9)} | {"e_0": 0.1}) is None


def test_a_report_is_replaced_completely_and_contains_each_picture(tmp_path: Path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "worst-09-old.png").touch()
    assert write_report(folder, page()) == folder / "index.html"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best-01-val_0.jpg.png", "index.html", "worst-01-val_0.jpg.png", "worst-02-val_1.jpg.png",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("error:No artists", "ignore:Glyph")
@pytest.mark.parametrize(
    "name",
    ["$_{a$", "_background_", "caf\udce9", "two\nlines", "\x07", "\U00020000" * 90],
    ids=["formula", "hidden label", "no UTF-8", "lines", "control", "long"],
)
def test_classes_and_files_of_any_name_have_a_page(name: str, tmp_path: Path):
    drawn = [Drawn(f"val/{name}.jpg", 0.5, np.zeros((20, 30, 3), np.uint8))]
    series = {"box, IoU 0.50": {name: {"recall": np.linspace(0, 1, 3), "precision": np.ones(3)}}}
    found = Scores({"top1": 0.5}, "4 images", [{"name": name, "top1": 0.5}], np.ones((2, 2), int), series)
    path = write_report(tmp_path / "report", Page("a run", "of it", found, (name, "other"), worst=drawn))
    assert "By class" in path.read_text(encoding="utf-8") and len(list(path.parent.glob("worst-01-*.png"))) == 1


def test_tensorboard_gets_every_picture_and_figure():
    shown = board_pictures(page())
    assert list(shown) == ["worst/01", "worst/02", "best/01", "confusion", "box, IoU 0.50"]
    assert all(picture.shape[0] == 3 and str(picture.dtype) == "torch.uint8" for picture in shown.values())


@pytest.mark.parametrize("classes", [1, 3, 150])
def test_a_confusion_matrix_of_any_size_is_drawn(classes: int):
    counts = np.eye(classes, dtype=np.int64) * 10**6
    picture = curves.pixels(curves.confusion_figure(counts, [f"class {i}" for i in range(classes)]))
    assert 300 < picture.shape[0] < 2000 and picture.std() > 5


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no chromium here")
def test_a_browser_shows_the_pictures_and_the_numbers_of_the_page(tmp_path: Path):
    assert CHROMIUM is not None, "install chromium"
    path = write_report(tmp_path / "report", page())
    pixels = screenshot(path.as_uri(), tmp_path)
    blue = (np.abs(pixels - BLUE) < 12).all(-1)
    assert 0.9 < blue.sum() / (3 * 200 * 300) < 1.1  # two worst, one best, at their own size
    card = np.array([31, 119, 220])
    assert (np.abs(pixels - card) < 3).all(-1).sum() > 3000  # the primary number's card
    assert (pixels[blue.any(axis=1).nonzero()[0].max() :] < 100).all(-1).sum() > 2000  # text below the pictures


def test_the_page_is_small_enough_to_send(text: str):
    assert len(re.findall("<img", text)) == 5  # three pictures, two figures
    assert len(re.findall('class="chart"', text)) == 2  # loss and learning rate; the one evaluation is no curve
    assert len(text) < 500_000
