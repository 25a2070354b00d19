"""When a run goes back, and when it does not: the decisions, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.core.distributed import World
from pretrain.doctor.diagnosis import Diagnosis
from pretrain.engine.checkpoint import commit
from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.config import EngineConfig
from pretrain.engine.protocol import StepResult
from pretrain.engine.session.preempt import STOP
from pretrain.nonfinite.recovery import Recovery, RewindError
from pretrain.nonfinite.rewinds import FILE, SkippedPositions
from pretrain.run import PretrainRun

NOTHING: Any = None


def recovery(folder: Path, *, known: dict[str, Any] | None = None) -> Recovery:
    """Goes back after two broken steps within ten; the sample at position 10 * step is to blame for each."""
    engine = EngineConfig.model_validate({"max_nonfinite_steps": 2, "nonfinite_window": 10})
    made = Recovery(
        SimpleNamespace(run_dir=str(folder), engine=engine),  # type: ignore[arg-type]
        NOTHING,
        NOTHING,
        SimpleNamespace(names=lambda positions: [str(p) for p in positions]),  # type: ignore[arg-type]
        SkippedPositions(folder),
        Checkpoints(folder / "checkpoints"),
        world=World(0, 1, 0, torch.device("cpu")),
        fingerprint="",
        start_step=4,
        known=known or {},
        say=lambda said: None,
    )
    made._capture = lambda step, result: SimpleNamespace(culprits=(10 * (step + 1),))  # type: ignore[method-assign]
    return made


def broken(*, requests: int = 0) -> StepResult:
    return StepResult(losses={"loss": float("nan")}, grad_norm=1.0, lr=1.0, weight_decay=0.0, requests=requests)


def test_broken_steps_from_before_a_resume_count(tmp_path: Path):
    before = recovery(tmp_path)
    before(5, broken())
    known = json.loads(json.dumps(before.about(6)))
    with pytest.raises(RewindError):
        recovery(tmp_path, known=known)(14, broken())
    (rewind,) = json.loads((tmp_path / FILE).read_text())["rewinds"]
    assert rewind["positions"] == [50, 140]


def test_a_run_that_is_asked_to_stop_saves_and_stops_instead_of_going_back(tmp_path: Path):
    stopped = recovery(tmp_path)
    stopped(5, broken())
    stopped(6, broken(requests=STOP))
    assert not (tmp_path / FILE).exists()
    about = stopped.about(6)
    assert not about["healthy"] and about["non_finite_steps"] == {"5": [50], "6": [60]}
    assert stopped.about(7)["healthy"] and not stopped.about(8, alarms=["loss_flat"])["healthy"]


@pytest.mark.parametrize("requests", [0, STOP])
def test_an_alarm_takes_a_run_back_unless_it_is_asked_to_stop(requests: int):
    def doctor(step: int, result: StepResult) -> list[Diagnosis]:
        return [Diagnosis(step, "loss_flat", "")]

    asked: list[int] = []
    doctor.settings = SimpleNamespace(reaction="rewind")  # type: ignore[attr-defined]
    doctor.suspects = lambda step: (3, [24])  # type: ignore[attr-defined]
    run: Any = SimpleNamespace(doctor=doctor, log=None)
    run.recovery = SimpleNamespace(go_back=lambda step, positions, **_: asked.extend([step, *positions]))
    PretrainRun._examine(run, 4, broken(requests=requests))
    assert asked == ([] if requests else [4, 24])


def test_the_healthy_checkpoint_behind_an_unhealthy_one_stays_after_a_resume(tmp_path: Path):
    root = tmp_path / "checkpoints"
    for step, healthy in ((2, True), (4, False)):
        temp = commit.begin(root, step, "x")
        commit.seal(temp, commit.step_folder(root, step), step=step, files=[], about={"healthy": healthy})
    resumed = Checkpoints(root)
    found = resumed.find_latest()
    assert found is not None and found.step == 4 and resumed.protected == 2
    commit.remove_after(root, 2)
    resumed = Checkpoints(root)
    assert resumed.find_latest() is not None and resumed.protected == 2
    assert Checkpoints(tmp_path / "none").find_latest() is None
