"""`fovea export --budget`: the largest release that is fast enough, by numbers that can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.export import budget
from finetune.export.budget import Candidate, Latency, Score, choose, table
from finetune.export.command import main, val_source
from finetune.release import write_release
from tests.finetune.small_tasks import small_task


def candidate(name: str, milliseconds: float, parameters: int, score: Score | None = None) -> Candidate:
    return Candidate(
        name, (32, 32), parameters, 1.0, Latency(milliseconds, milliseconds - 0.1, milliseconds + 0.1, 50), score
    )


def test_the_best_number_within_the_budget_is_chosen():
    rows = [
        candidate("small", 3.0, 10, Score("top1", 0.7, "99 of val")),
        candidate("wide", 5.0, 90, Score("top1", 0.6, "99 of val")),
        candidate("large", 9.0, 200, Score("top1", 0.9, "99 of val")),
    ]
    assert choose(rows, 6.0) == (rows[0], "top1")
    assert choose(rows, 10.0) == (rows[2], "top1")
    assert choose(rows, 1.0)[0] is None


@pytest.mark.parametrize("other", [None, Score("top5", 0.9, "99 of val"), Score("top1", 0.9, "7 of others")])
def test_parameters_decide_where_numbers_cannot_be_compared(other: Score | None):
    rows = [candidate("a", 3.0, 10, other), candidate("b", 3.0, 20, Score("top1", 0.6, "99 of val"))]
    assert choose(rows, 6.0) == (rows[1], "parameters")


def test_the_table_says_which_are_within_the_budget():
    lines = table([candidate("slow", 8.0, 20), candidate("fast", 3.0, 10)], 5.0)
    assert "yes" in lines[1] and lines[1].endswith("fast") and " no " in lines[2] and lines[2].endswith("slow")


@pytest.mark.slow
def test_releases_are_measured_and_the_largest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(budget, "WARM_UP", 0)
    small = write_release(tmp_path / "small", small_task("classification", vit={"depth": 1}), {})
    large = write_release(tmp_path / "large", small_task("classification"), {})
    assert main(["--budget", "100000", str(small), str(large)]) == 0
    assert f"largest within 100000 ms, by parameters: {large}" in capsys.readouterr().out
    assert main(["--budget=1e-9", str(small)]) == 1
    assert "none is within 1e-09 ms; the fastest takes" in capsys.readouterr().err


def test_no_release_and_no_budget_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--budget", "5", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--budget", "-3", str(tmp_path)])
    assert "milliseconds above 0, such as 20" in capsys.readouterr().err


def test_the_validation_set_of_a_run_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "home" / "run" / "release").mkdir(parents=True)
    start = {"folder": str(tmp_path / "home")}
    (tmp_path / "home" / "run" / "environment.jsonl").write_text(json.dumps(start) + "\n")
    monkeypatch.chdir(tmp_path)
    record = {"recipe": {"data": {"val": {"images": "photos", "annotations": str(tmp_path / "a.json")}}}}
    source, _ = val_source(tmp_path / "home" / "run" / "release", record, [])
    assert source.images == str(tmp_path / "home" / "photos") and source.annotations == str(tmp_path / "a.json")
    assert val_source(tmp_path / "elsewhere", record, ["images=other"])[0].images == "other"
