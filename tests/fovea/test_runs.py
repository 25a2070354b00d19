"""Runs from Python: the same as the commands, errors as exceptions, folders that can be read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import fovea
from pretrain.core.configlib import load_config
from tests import runs
from tests.finetune.small_tasks import small_task

pytestmark = pytest.mark.slow

TINY = ("optim.total_steps=4", "optim.warmup_steps=1", "data.num_workers=0", "log.tensorboard=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fovea.Run:
    path = runs.write_config(tmp_path_factory.mktemp("runs"), "mae")
    return fovea.pretrain(load_config(fovea.PretrainConfig, path), TINY)


def test_a_configuration_object_with_overrides_runs_to_its_release(run: fovea.Run):
    assert run.done and run.release == run.folder / "release"
    assert run.config["optim"]["total_steps"] == 4
    assert fovea.load(run.folder, device="cpu").embed_dim == 48
    assert fovea.pretrain(run.config).done, "a finished run is opened"


def test_metrics_are_rows_and_columns_of_the_same(run: fovea.Run):
    rows, table = run.metrics(), run.columns()
    assert [row["step"] for row in rows] == table["step"] == [1, 2, 3, 4]
    assert table["loss"] == [row["loss"] for row in rows]
    assert {len(column) for column in table.values()} == {4}
    assert all(math.isnan(v) == ("loss" not in row) for v, row in zip(table["loss"], rows, strict=True))


def test_wrong_input_is_raised_before_anything_runs(run: fovea.Run, tmp_path: Path):
    with pytest.raises(fovea.ConfigError, match=r"optim\.lrr: unknown key"):
        fovea.pretrain({**run.config, "run_dir": str(tmp_path / "x")}, ["optim.lrr=1"])
    with pytest.raises(fovea.ConfigError, match="configuration: 1 problem"):
        fovea.pretrain(run.config, ["data.shards=/nowhere"])
    with pytest.raises(fovea.ConfigError, match="not a run folder"):
        fovea.Run(tmp_path)
    assert not (tmp_path / "x").exists()


def test_a_run_that_cannot_continue_is_an_error_with_the_status_of_the_command(run: fovea.Run):
    with pytest.raises(fovea.RunError, match="another run_dir") as found:
        fovea.pretrain(run.config, ["optim.lr=0.5"])
    assert found.value.status == 2


def test_a_mapping_or_an_object_is_not_changed_by_overrides(run: fovea.Run):
    values = run.config
    with pytest.raises(fovea.ConfigError):
        fovea.pretrain(values, ["data.shards=/nowhere"])
    assert values == run.config


def test_a_fine_tuned_task_predicts_arrays_and_draws_them(tmp_path: Path):
    from finetune.release import write_release

    release = write_release(tmp_path / "release", small_task("classification"), {"source": {"title": "a test"}})
    predictor = fovea.load_task(release, device="cpu")
    photos = [sample.image() for sample in fovea.open_shards(runs.SHARDS / "val")[:3]]
    found = predictor.predict(photos, batch_size=2)
    assert [p.as_json(0, predictor.classes)["id"] for p in found] == [0] * 3
    assert predictor.draw(photos[0], found[0]).dtype == "uint8"
    assert predictor.name == "classification" and len(predictor.predict(photos[0])) == 1
