"""The page of a run, and of runs compared: from any folder, safe with any text, and seen in a real browser."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from launch.cli import main
from pretrain.engine.session.film import FRAMES, add_frames, drop_frames, frames
from pretrain.report import compare
from pretrain.report.online import OnlinePage
from pretrain.report.page import render, write_page
from pretrain.report.recorded import read_run
from tests.browser import CHROMIUM, laid_out
from tests.report.recorded_runs import write_run

WIDTHS = (400, 1300, 2000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return render(read_run(run))


def test_a_page_loads_nothing_and_runs_nothing(page: str):
    assert not re.findall(r"<(script|link|iframe|object|form)|@import|url\(", page)
    assert all(link.startswith("data:image/") for link in re.findall(r'(?:src|href)="([^"]*)', page))


def test_the_verdicts_are_on_the_time_line_in_words_and_in_the_charts_by_number(page: str):
    assert "The doctor raised 1 alarm" in page and "9.1 is &lt;3&gt; times" in page
    line = re.findall(r'<span class="when">step (\d+)</span>', page)
    assert line == ["40", "60", "100"], "resumed, the alarm, stopped"
    assert page.count('<text class="mark"') == page.count('class="chart"')


def test_damaged_lines_and_pictures_are_skipped_and_counted(run: Path, page: str):
    assert "metrics.jsonl: 3 damaged or half-written lines skipped" in page
    assert "00000099.png cannot be shown" in page and page.count("<img") == 3
    assert len(read_run(run).rows) == 101


def test_time_and_cost_are_those_of_the_logged_speed(run: Path, page: str):
    assert read_run(run).seconds == (20.0, 5.0)  # 100 steps of 32 images at 160 a second, a quarter of it waiting
    assert "25% waiting for data" in page and "2 x cpu" in page and "3200" in page


def test_a_value_that_was_measured_once_is_no_chart(page: str):
    titles = re.findall(r"<h3>([^<]*)</h3>", page)
    assert "loss" in titles and "kNN accuracy of frozen features" in titles
    assert not {"parts of the loss", "images per second", "time spent waiting for data"} & set(titles)


def test_a_folder_with_little_in_it_has_a_page(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("optim: [")
    text = render(read_run(tmp_path))
    assert "not valid YAML" in text and "The doctor was not on" in text
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": "x", "lr": {}}\n')
    assert 'class="chart"' not in render(read_run(tmp_path))


def test_the_differences_of_configurations_come_first_then_the_curves(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other", lr=2e-3, alarm=False)
    text = compare.render([read_run(run), read_run(other)])
    assert re.findall(r"<h2>([^<]*)", text) == ["Where their configurations differ", "Their numbers", "Their curves"]
    assert '<td class="text">optim.lr</td><td class="text">0.001</td><td class="text">0.002</td>' in text
    assert text.count("optim.") == 1, "keys with equal values are not listed"
    drawn = text.partition("</style>")[2]
    assert drawn.count("#1f77dc") == drawn.count("#2caf3c") > 3


def test_runs_are_named_by_what_tells_their_paths_apart():
    assert compare.distinct([Path("/a/x/0/run"), Path("/a/y/0/run")]) == ["x", "y"]
    assert compare.distinct([Path("/a/run"), Path("/a/run")]) == ["1. run", "2. run"]


def test_the_command_writes_a_page_and_names_what_is_no_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0 and (run / "report" / "index.html").is_file()
    assert main(["report", str(run), str(run)]) == 0 and Path("comparison.html").is_file()
    task = tmp_path / "task"
    task.mkdir()
    (task / "config.yaml").write_text("task: {name: detection}")
    assert main(["report", str(task)]) == 2 and "a fine-tuning run" in capsys.readouterr().err
    assert not (task / "report").exists()
    assert main(["report", str(tmp_path / "none")]) == 2 and "not a run folder" in capsys.readouterr().err


def test_a_fault_of_the_page_is_said_once_and_ends_nothing(tmp_path: Path):
    said: list[str] = []
    online = OnlinePage(tmp_path / "none", said.append, start_step=0)
    for step in (1, 2):
        online.add(step, {"x": torch.zeros(2)})
        online.write(last=True)
    assert len(said) == 1 and "could not be written" in said[0]
    (tmp_path / "odd" / "pictures" / "film" / "x" / "00000005.png").mkdir(parents=True)  # no file to remove
    OnlinePage(tmp_path / "odd", said.append, start_step=2)
    assert len(said) == 2


def test_a_page_is_not_written_again_at_once_but_at_the_end(run: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[Path] = []
    monkeypatch.setattr("pretrain.report.online.write_page", lambda folder: written.append(write_page(folder)))
    online = OnlinePage(run, print, start_step=0)
    for _ in range(3):
        online.write()
    assert len(written) == 1
    online.write(last=True)
    assert len(written) == 2


def test_a_film_stays_short_and_spread_and_loses_what_a_resumed_run_repeats(tmp_path: Path):
    for step in range(1, 41):
        add_frames(tmp_path, step, {"a | b": torch.zeros(3, 4, 4, dtype=torch.uint8)})
    folder = tmp_path / "pictures" / "film" / "a-b"
    steps = list(frames(folder))
    assert len(steps) == FRAMES and steps[0] == 1 and steps[-1] == 40
    assert max(b - a for a, b in pairwise(steps)) <= 10
    drop_frames(tmp_path, 20)
    assert frames(folder) and max(frames(folder)) <= 20


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no chromium here")
def test_a_browser_shows_the_whole_page_in_any_window(run: Path, page: str, tmp_path: Path):
    assert CHROMIUM is not None, "install chromium"
    other = write_run(tmp_path / "with a very long name that nobody would want to read in a table", lr=2e-3)
    compared = compare.render([read_run(run), read_run(other)])
    for width in WIDTHS:
        wide, alarms = laid_out(page, tmp_path, width=width, count=".timeline li.alarm")
        assert wide <= width and alarms == 1
        wide, drawn = laid_out(compared, tmp_path, width=width, count=".chart svg[role=img]")
        assert wide <= width and drawn == compared.count('class="chart"') > 3
