"""`fovea doctor`, its page, and what a run does about an alarm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.checkpoint.commit import checkpoints, read_manifest
from pretrain.nonfinite.rewinds import FILE
from pretrain.online.examine import rules_table
from tests.planted import write_shards
from tests.runs import ROOT, finish, rows, write_config

COLD = ("objective.teacher_temp=1e-8", "objective.warmup_teacher_temp=1e-8", "data.num_workers=0")
QUIET = ("log.pictures_every_steps=0", "log.tensorboard=false")


def test_the_page_shows_the_rules_as_they_are():
    assert rules_table() in (ROOT / "docs" / "doctor.md").read_text(), "print them: fovea doctor --rules"


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["doctor", "release"])
def test_a_run_copied_without_its_records_is_refused_by_the_name_of_what_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    shutil.copy(ROOT / "configs" / "debug" / "mae.yaml", tmp_path / "config.yaml")
    words = [command, str(tmp_path)] + ([str(tmp_path / "out")] if command == "release" else [])
    assert main(words) == 2
    assert "data.json" in capsys.readouterr().err
    (tmp_path / "data.json").write_text('{"fingerprint": "f", "num_samples": 960}')
    (tmp_path / "environment.jsonl").write_text('{"world_si')
    assert main(words) == 2
    assert "environment.jsonl: missing or empty" in capsys.readouterr().err


def test_steps_that_were_not_finite_are_told_with_the_command_that_looks_into_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(ROOT / "configs" / "debug" / "mae.yaml", tmp_path / "config.yaml")
    (tmp_path / "data.json").write_text('{"fingerprint": "f", "num_samples": 960}')
    (tmp_path / "environment.jsonl").write_text('{"world_size": 1}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert main(["doctor", str(tmp_path)]) == 0
    for name in ("step-00000009-rewind-1", "step-00000007"):
        (tmp_path / "captures" / name).mkdir(parents=True)
    assert main(["doctor", str(tmp_path)]) == 1
    first = f"{tmp_path}/captures/step-00000007"
    assert "step 7: not_finite: 2 captured steps had no finite loss" in capsys.readouterr().out
    assert main(["replay", str(tmp_path)]) == 2
    assert f"those of this run: {first}, " in capsys.readouterr().err


@pytest.mark.processes
def test_an_unknown_rule_is_refused_with_the_known_ones(tmp_path: Path):
    status, said = finish(write_config(tmp_path, "mae"), "doctor.off=[few_dimension]")
    assert status == 2 and "no rule few_dimension; the rules are learning_rate_too_high" in said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A DINO run with a teacher of almost no temperature that was told to stop at an alarm."""
    folder = tmp_path_factory.mktemp("stopped")
    status, said = finish(write_config(folder, "dino"), *COLD, "doctor.reaction=stop", "doctor.every_steps=4")
    return folder / "run", status, said


@pytest.mark.processes
def test_an_alarm_stops_the_run_unsaved_when_asked_to(stopped: tuple[Path, int, str]):
    run, status, said = stopped
    assert status == 1 and "Traceback" not in said
    alarms = [json.loads(line) for line in (run / "doctor.jsonl").read_text().splitlines()]
    assert alarms[0]["rule"] == "teacher_one_hot" and alarms[0]["step"] < 24
    assert f"stopped at step {alarms[0]['step']} by an alarm (doctor.reaction=stop)" in said
    assert "raise objective.teacher_temp" in (run / "log.txt").read_text()
    saved = [int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*")]
    assert max(saved) < alarms[0]["step"]


@pytest.mark.processes
def test_the_log_of_a_run_leads_to_the_verdict_of_the_run(
    stopped: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]
):
    run, _, _ = stopped
    alarm = json.loads((run / "doctor.jsonl").read_text().splitlines()[0])
    assert main(["doctor", str(run), "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == alarm


@pytest.mark.processes
def test_tensorboard_and_the_metrics_hold_measurements_and_the_alarm(stopped: tuple[Path, int, str]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _, _ = stopped
    measured = [row for row in rows(run) if "doctor/rankme" in row]
    assert [row["step"] for row in measured] == [4, 8, 12][: len(measured)] and measured
    assert {"doctor/weight_change", "doctor/average_distance", "doctor/attention_entropy"} <= measured[0].keys()
    assert any(name.startswith("doctor/grad/student.backbone.blocks.") for name in measured[0])
    tags = EventAccumulator(str(run / "tensorboard")).Reload().Tags()
    assert "alarm/teacher_one_hot" in tags["scalars"] and "alarm/text_summary" in tags["tensors"]


def alarms(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "doctor.jsonl").read_text().splitlines()]


@pytest.mark.processes
def test_two_ranks_go_back_together_from_an_alarm_and_pass_over_the_images_of_that_step(tmp_path: Path):
    """One picture makes the weights leap, in each of two epochs; skipped, the run ends well."""
    shards = write_shards(tmp_path / "shards")
    options = [f"data.shards={shards}", "data.num_workers=0", "optim.global_batch_size=8", "optim.total_steps=12"]
    options += ["checkpoint.every_steps=2", "doctor.reaction=rewind", "doctor.every_steps=1", *QUIET]
    planted = ("tests.planted_leap", "pretrain")
    status, said = finish(write_config(tmp_path, "mae"), *options, processes=2, command=planted)
    assert status == 0, said
    run = tmp_path / "run"
    rewinds = json.loads((run / FILE).read_text())["rewinds"]
    assert len(rewinds) == 2 and all(rewind["finished"] for rewind in rewinds)
    for rewind in rewinds:
        assert 0 <= rewind["to"] < rewind["at"] and rewind["to"] % 2 == 0
        assert rewind["positions"] == list(range((rewind["at"] - 1) * 8, rewind["at"] * 8))
        told = f"step {rewind['at']}: alarm learning_rate_too_high (doctor.reaction=rewind)"
        assert told in said and f"rewinding from step {rewind['at']} to step {rewind['to']}" in said
    assert [int(folder.name.removeprefix("step-")) for folder in checkpoints(run / "checkpoints")] == [
        12,
        10,
        8,
        6,
        4,
        2,
    ]
    assert main(["doctor", str(run)]) == 0 and alarms(run) == []


@pytest.mark.processes
def test_an_alarm_that_comes_back_after_every_rewind_ends_the_run(tmp_path: Path):
    options = [*COLD, *QUIET, "doctor.reaction=rewind", "doctor.every_steps=4", "engine.max_rewinds=1"]
    status, said = finish(write_config(tmp_path, "dino"), *options)
    assert status == 1 and "Traceback" not in said
    (rewind,) = json.loads((tmp_path / "run" / FILE).read_text())["rewinds"]
    assert rewind["to"] <= rewind["at"] - 4
    assert f"step {rewind['at']}: ALARM teacher_one_hot: teacher assignments one-hot" in said
    assert "no more rewinds after 1 (engine.max_rewinds)" in said


@pytest.mark.processes
def test_two_ranks_stop_together_at_an_alarm(tmp_path: Path):
    options = [*COLD, *QUIET, "doctor.reaction=stop", "doctor.every_steps=3"]
    status, said = finish(write_config(tmp_path, "dino"), *options, processes=2)
    (alarm,) = alarms(tmp_path / "run")
    assert status == 1 and alarm["rule"] == "teacher_one_hot"
    assert said.count(f"stopped at step {alarm['step']} by an alarm (doctor.reaction=stop)") == 2, "once by each rank"


@pytest.mark.processes
def test_a_checkpoint_saved_while_an_alarm_stands_is_none_to_go_back_to(tmp_path: Path):
    options = [*COLD, *QUIET, "doctor.every_steps=4", "checkpoint.every_steps=6"]
    status, said = finish(write_config(tmp_path, "dino"), *options, "optim.total_steps=18")
    assert status == 0, said
    run = tmp_path / "run"
    about = {manifest.step: manifest.about for manifest in map(read_manifest, checkpoints(run / "checkpoints"))}
    assert 6 < alarms(run)[0]["step"] <= 12
    assert {step: facts["healthy"] for step, facts in about.items()} == {6: True, 12: False, 18: False}
    assert about[12]["alarms"] == ["teacher_one_hot"]
    assert Checkpoints(run / "checkpoints").newest_healthy() == 6
