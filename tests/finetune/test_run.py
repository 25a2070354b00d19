"""The whole command on real photos: what it leaves, that a killed run ends as an undisturbed one, and 2 ranks as 1."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.release import open_task
from tests.finetune.runs import STEPS, make_release, results, write_config
from tests.runs import data_workers, finish, hashes, kill_all, losses, reached, rows, start, wait_until

pytestmark = pytest.mark.processes

COMMAND = ("finetune",)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one rank, in a folder with the release it began from."""
    folder = tmp_path_factory.mktemp("finetune")
    make_release(folder / "backbone")
    status, said = finish(write_config(folder, "run"), command=COMMAND)
    assert status == 0, said
    return folder / "run"


def test_modes_of_all_files_follow_the_umask(undisturbed: Path):
    (undisturbed.parent / "new").touch()
    wanted = (undisturbed.parent / "new").stat().st_mode
    both = (*undisturbed.rglob("*"), *(undisturbed.parent / "backbone").rglob("*"))
    assert not [str(path) for path in both if path.is_file() and path.stat().st_mode != wanted]


def test_a_run_writes_numbers_with_their_protocol_a_report_and_a_release(undisturbed: Path):
    assert (undisturbed / "DONE").read_text() == f"step {STEPS}\n"
    found = results(undisturbed)
    assert found["step"] == STEPS and found["primary"]["name"] == "top1" and "32 x 32" in found["protocol"]
    assert [row["step"] for row in rows(undisturbed) if "val/top1" in row] == [6, STEPS]
    assert len(json.loads((undisturbed / "data.json").read_text())["data.train"]["fingerprint"]) == 64
    page = (undisturbed / "report" / "index.html").read_text()
    assert "What predictions depend on" in page and "relevance: " in page and "2 images and 10 steps only" in page
    assert found["protocol"] in page and page.count("<img") >= 4
    said = (undisturbed / "log.txt").read_text()
    assert "matched" in said and f"measured: {found['protocol']}" in said


def test_the_release_is_the_average_and_opens_as_the_run_does(undisturbed: Path):
    task, record = open_task(undisturbed / "release")
    assert record["metrics"]["values"] == results(undisturbed)["values"]
    state = load_file(undisturbed / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    for name, tensor in task.state_dict().items():
        assert torch.allclose(tensor, state[f"ema.average.{name}"], atol=1e-6), name
    assert record["orientation"] == "exif" == open_task(undisturbed)[1]["orientation"]
    assert record["source"]["kind"] == "release" and record["recipe"]["optim"]["ema_decay"] == 0.9


def test_a_run_without_a_release_opens_from_its_newest_checkpoint(undisturbed: Path, tmp_path: Path):
    unfinished = shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("release"))
    images = torch.randn(2, 3, 32, 32)
    own, released = (open_task(path)[0] for path in (unfinished, undisturbed))
    with torch.no_grad():
        ours, theirs = (task.predict({"image": images}) for task in (own, released))
    assert all(abs(a.probabilities - b.probabilities).max() < 1e-5 for a, b in zip(ours, theirs, strict=True))  # type: ignore[attr-defined]


def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(undisturbed: Path):
    folder = undisturbed.parent
    config, killed = write_config(folder, "killed", workers=1), folder / "killed"
    process = start(config, command=COMMAND)
    try:
        wait_until(lambda: reached(killed) >= 7, process)
    finally:
        kill_all(process)
    assert not (killed / "DONE").exists(), "the run was over before it could be killed"
    status, said = finish(config, command=COMMAND)
    assert status == 0 and "resumed from" in said, said
    assert hashes(killed, STEPS) == hashes(undisturbed, STEPS)
    assert losses(killed) == losses(undisturbed), "every step stands in the log once, with the same loss"
    measured = [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows(killed) if "val/top1" in row]
    assert measured == [
        {k: v for k, v in row.items() if k.startswith("val/")} for row in rows(undisturbed) if "val/top1" in row
    ]
    assert load_file(killed / "release" / "model.safetensors").keys()
    assert results(killed) == results(undisturbed)


def test_a_run_that_waits_in_its_evaluation_follows_a_request_to_stop_and_saves(undisturbed: Path):
    folder = undisturbed.parent
    config, stopped = write_config(folder, "stopped", workers=1), folder / "stopped"
    rare = ("checkpoint.every_steps=100", "evaluate.batch_size=1")
    process = start(config, *rare, command=COMMAND)
    workers: list[int] = []
    try:
        wait_until(lambda: len(data_workers(process.pid)) > 1, process)  # those of the evaluation at step 6
        workers = data_workers(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 85, process.said
    finally:
        kill_all(process)
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    assert (stopped / "PREEMPTED").read_text() == "step 6\n", process.said
    assert not any("val/top1" in row for row in rows(stopped))
    status, said = finish(config, *rare, command=COMMAND)
    assert status == 0 and "resumed from" in said, said
    assert [row["step"] for row in rows(stopped) if "val/top1" in row] == [6, STEPS]
    assert hashes(stopped, STEPS) == hashes(undisturbed, STEPS)


def test_two_ranks_train_and_measure_the_same_as_one(undisturbed: Path):
    folder = undisturbed.parent
    config, two = write_config(folder, "two"), folder / "two"
    status, said = finish(config, processes=2, command=COMMAND)
    assert status == 0, said
    assert losses(two) == pytest.approx(losses(undisturbed), abs=1e-5)
    by_two = results(two)
    status, said = finish(config, "--evaluate", "evaluate.batch_size=4", command=COMMAND)
    assert status == 0, said
    assert results(two) == by_two, "every number, by class and in the confusion matrix, bitwise"


def test_a_run_does_not_resume_with_another_configuration_or_other_data(undisturbed: Path):
    status, said = finish(
        undisturbed.with_suffix(".yaml"), "optim.layer_decay=0.5", "data.val.limit=20", command=COMMAND
    )
    assert status == 2 and "Traceback" not in said
    assert "optim.layer_decay: the run was started with 0.75, now 0.5" in said
    assert "data.val: the data differ (fingerprint " in said


def test_a_run_is_not_evaluated_on_photos_read_in_another_way(undisturbed: Path):
    status, said = finish(undisturbed.with_suffix(".yaml"), "--evaluate", "data.orientation=stored", command=COMMAND)
    assert status == 2 and "data.orientation: the run was trained with exif, now stored" in said
