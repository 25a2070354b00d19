"""Runs, checkpoints and releases that version 0.1.0 wrote (tests/fixtures/v0.1.0) still open, resume and predict.

The runs there were cut back to step 4 of 8, as if killed; `expected.json` holds what 0.1.0 went on to compute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.predict import main as predict
from pretrain.core.configlib import read_values
from pretrain.models.release.folder import read_release
from pretrain.release import from_run
from tests.runs import ROOT, finish, losses

OLD = ROOT / "tests" / "fixtures" / "v0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(OLD / name, folder / name))


@pytest.mark.processes
def test_a_pretraining_run_of_0_1_0_resumes_with_its_list_of_skipped_positions(tmp_path: Path):
    run = copied("run", tmp_path)
    status, said = finish(run / "config.yaml", f"run_dir={run}")
    assert status == 0, said
    assert "resumed from" in said
    assert losses(run) == pytest.approx({int(step): loss for step, loss in EXPECTED["losses"].items()}, abs=1e-4)
    skipped = [json.loads(line)["position"] for line in (run / "bad_samples.rank0.jsonl").read_text().splitlines()]
    assert sorted(skipped) == [9, 36]
    assert read_values(run / "config.yaml")["data"]["orientation"] == "stored"


@pytest.mark.processes
def test_a_fine_tuning_run_of_0_1_0_resumes(tmp_path: Path):
    run = copied("finetuned", tmp_path)
    status, said = finish(run / "config.yaml", f"run_dir={run}", command=("finetune",))
    assert status == 0, said
    assert "resumed from" in said
    assert losses(run) == pytest.approx({int(step): x for step, x in EXPECTED["finetune_losses"].items()}, abs=1e-4)
    assert read_values(run / "config.yaml")["data"]["orientation"] == "stored"


def test_a_release_of_0_1_0_has_the_same_features():
    ramp = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        features = read_release(OLD / "run" / "release").build().eval()(ramp)
    torch.testing.assert_close(features[0, :, :4], torch.tensor(EXPECTED["features"]), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_0_1_0_can_be_released(tmp_path: Path):
    from_run(OLD / "run", tmp_path / "release")
    assert (tmp_path / "release" / "model.safetensors").exists()
    assert read_release(tmp_path / "release").record["orientation"] == "stored"


def test_a_task_release_of_0_1_0_predicts_the_same(tmp_path: Path):
    assert predict([str(OLD / "finetuned" / "release"), str(OLD / "ramp.png"), "--out", str(tmp_path)]) == 0
    old, new = (json.loads((folder / "predictions.json").read_text()) for folder in (OLD, tmp_path))
    assert (new[0]["label"], new[0]["class"]) == (old[0]["label"], old[0]["class"])
    assert new[0]["probabilities"] == pytest.approx(old[0]["probabilities"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), [("run", "pretrain"), ("finetuned", "finetune")])
def test_a_finished_run_that_lost_its_checkpoints_is_not_trained_again(name: str, command: str, tmp_path: Path):
    run = copied(name, tmp_path)
    shutil.rmtree(run / "checkpoints")
    (run / "DONE").write_text("step 8")
    before = (run / "metrics.jsonl").read_text()
    status, said = finish(run / "config.yaml", f"run_dir={run}", command=(command,))
    assert status == 3 and "Restore the checkpoints" in said, said
    assert (run / "metrics.jsonl").read_text() == before
