"""The log of a run: every step once, also after a kill and a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.engine.session.log import RunLog, progress_line


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_drops_the_rows_it_will_write_again_and_a_row_cut_by_a_kill(tmp_path: Path):
    first = RunLog(tmp_path, start_step=0, total_steps=10, tensorboard=False)
    for step in range(1, 7):
        first.scalars(step, {"loss": 1.0 / step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    second = RunLog(tmp_path, start_step=4, total_steps=10, tensorboard=False)
    second.scalars(5, {"loss": 0.0})
    second.close()
    assert logged(tmp_path) == [1, 2, 3, 4, 5]


def test_what_is_kept_of_the_log_reaches_the_disk_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    calls, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(Path(b).name), rename(a, b)))
    RunLog(tmp_path, start_step=1, total_steps=2, tensorboard=False).close()
    assert calls == [f".metrics.jsonl.{os.getpid()}.tmp", "metrics.jsonl", tmp_path.name] and logged(tmp_path) == [1]


@pytest.mark.parametrize("start_step", [0, 2])
def test_events_of_steps_that_are_taken_again_are_dropped_from_tensorboard(tmp_path: Path, start_step: int):
    """From step 0 too: a run killed before its first checkpoint, or one that goes back to its start."""
    for begin, steps, value in ((0, range(6), 1.0), (start_step, range(start_step + 1, 5), 2.0)):
        log = RunLog(tmp_path, start_step=begin, total_steps=10)
        for step in steps:
            log.scalars(step, {"loss": value})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    expected = [(step, 1.0 if step <= start_step else 2.0) for step in range(5)]
    assert [(event.step, event.value) for event in events] == expected


def test_the_progress_line_says_what_a_person_asks():
    values = {"loss": 0.81234, "lr": 1.2e-3, "images_per_second": 412.3, "data_wait": 0.031}
    line = progress_line(120, 500, values, seconds_left=3725)
    assert line == "step 120/500  loss 0.8123  lr 1.20e-03  412 img/s  data 3%  left 1:02:05"


def test_the_time_left_is_by_the_steps_and_not_by_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = iter([100.0, 102.0, 104.0])  # the first step came 100 s after the start, then one every 0.2 s
    log = RunLog(tmp_path, start_step=0, total_steps=100, tensorboard=False)
    monkeypatch.setattr("pretrain.engine.session.log.time.monotonic", lambda: next(times))
    for step in (1, 11, 21):
        log.scalars(step, {"loss": 1.0})
    log.close()
    shown = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition("  left ")[2] for line in shown] == ["", "0:00:18", "0:00:16"]


def test_pictures_are_left_as_png_too(tmp_path: Path):
    log = RunLog(tmp_path, start_step=0, total_steps=1, tensorboard=False)
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    log.pictures(1, {"input | masked": image})
    log.close()
    with Image.open(tmp_path / "pictures" / "input-masked.png") as shown:
        assert shown.size == (5, 4) and shown.getpixel((4, 3)) == tuple(image[:, 3, 4].tolist())
