"""`fovea doctor`, its page, and what a run does about an alarm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.doctor import rules_table
from tests.runs import ROOT, finish, rows, write_config


def test_the_page_shows_the_rules_as_they_are():
    assert rules_table() in (ROOT / "docs" / "doctor.md").read_text(), "print them: fovea doctor --rules"


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_an_unknown_rule_is_refused_with_the_known_ones(tmp_path: Path):
    status, said = finish(write_config(tmp_path, "mae"), "doctor.off=[few_dimension]")
    assert status == 2 and "no rule few_dimension; the rules are learning_rate_too_high" in said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A DINO run with a teacher of almost no temperature that was told to stop at an alarm."""
    folder = tmp_path_factory.mktemp("stopped")
    cold = ["objective.teacher_temp=1e-5", "objective.warmup_teacher_temp=1e-5", "data.num_workers=0"]
    status, said = finish(write_config(folder, "dino"), *cold, "doctor.reaction=stop", "doctor.every_steps=4")
    return folder / "run", status, said


def test_an_alarm_stops_the_run_unsaved_when_asked_to(stopped: tuple[Path, int, str]):
    run, status, said = stopped
    assert status == 1 and "Traceback" not in said
    alarms = [json.loads(line) for line in (run / "doctor.jsonl").read_text().splitlines()]
    assert alarms[0]["rule"] == "teacher_one_hot" and alarms[0]["step"] < 24
    assert f"stopped at step {alarms[0]['step']} by an alarm (doctor.reaction=stop)" in said
    assert "raise objective.teacher_temp" in (run / "log.txt").read_text()
    saved = [int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*")]
    assert max(saved) < alarms[0]["step"]


def test_the_log_of_a_run_leads_to_the_verdict_of_the_run(
    stopped: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]
):
    run, _, _ = stopped
    alarm = json.loads((run / "doctor.jsonl").read_text().splitlines()[0])
    assert main(["doctor", str(run), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == alarm


def test_tensorboard_and_the_metrics_hold_measurements_and_the_alarm(stopped: tuple[Path, int, str]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _, _ = stopped
    measured = [row for row in rows(run) if "doctor/rankme" in row]
    assert [row["step"] for row in measured] == [4, 8, 12][: len(measured)] and measured
    assert {"doctor/weight_change", "doctor/average_distance", "doctor/attention_entropy"} <= measured[0].keys()
    assert any(name.startswith("doctor/grad/student.backbone.blocks.") for name in measured[0])
    tags = EventAccumulator(str(run / "tensorboard")).Reload().Tags()
    assert "alarm/teacher_one_hot" in tags["scalars"] and "alarm/text_summary" in tags["tensors"]
