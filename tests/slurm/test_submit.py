"""What is shown is what is submitted, and SLURM accepts every batch script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.slurm import scheduler
from launch.slurm.command import main
from launch.slurm.jobs import find_run
from launch.slurm.template import folder, read_template, render
from pretrain.data.shards.dataset import Dataset
from tests.runs import LONG, ROOT, SHARDS
from tests.slurm.cluster import Cluster, FakeRun, wait_until

pytestmark = pytest.mark.slurm

HERE = ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2"]


@pytest.mark.parametrize("name", ["pretrain.sbatch", "finetune.sbatch", "data.sbatch"])
def test_slurm_accepts_the_batch_scripts_as_they_are_for_this_cluster_s_nodes(cluster: Cluster, name: str):
    flags = [] if name == "data.sbatch" else HERE
    command = ["sbatch", "--test-only", *flags, str(folder() / name), "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def test_the_dry_run_prints_exactly_what_is_submitted(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = FakeRun(tmp_path)
    flags = [*run.flags(nodes=2, minutes="5"), "--sbatch", "hold"]
    assert main(["pretrain", str(run.config), *run.overrides, *flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    job = run.submit("--sbatch", "hold")
    held = subprocess.run(["scontrol", "write", "batch_script", job, "-"], capture_output=True, text=True, timeout=LONG)
    assert held.stdout.rstrip("\0\n") in shown
    assert shown.splitlines()[0] == f"# sbatch --parsable JOB.sbatch {run.config} {' '.join(run.overrides)}"
    assert main(["cancel", job]) == 0, "a waiting job ends at once"
    wait_until(lambda: scheduler.states([job])[job].state == "CANCELLED", "cancelled")


def test_shards_indexed_by_an_array_of_jobs_are_one_data_set(cluster: Cluster, tmp_path: Path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (SHARDS / "train").glob("*.tar"):
        shutil.copy(path, shards)
    script = tmp_path / "data.sbatch"
    options = {"array": "0-2", "cpus-per-task": "1", "time": "5", "output": f"{tmp_path}/%A-%a.log"}
    script.write_text(render(read_template("data"), options=options, settings={"PYTHON": [sys.executable]}))
    array = scheduler.submit(script, ["index", str(shards)], options=["--chdir", str(ROOT)])
    after = ["--array=0", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--chdir", str(ROOT)]
    gather = scheduler.submit(script, ["gather", str(shards)], options=after)
    cluster.wait(gather, "COMPLETED")
    assert Dataset.open(shards).fingerprint == Dataset.open(SHARDS / "train").fingerprint


def test_lists_written_by_an_array_of_jobs_are_one_data_set(cluster: Cluster, tmp_path: Path):
    lists, shards = tmp_path / "lists", tmp_path / "shards"
    (tmp_path / "photos").mkdir()
    lists.mkdir()
    for number in range(9):
        pixels = np.full((32, 32, 3), 28 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    for name, numbers in (("a", range(4)), ("b", range(4, 8)), ("c", [8])):
        rows = [f"{tmp_path}/photos/{number}.png,{number % 2}" for number in numbers]
        (lists / f"{name}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    script = tmp_path / "data.sbatch"
    options = {"array": "0-1", "cpus-per-task": "1", "time": "5", "output": f"{tmp_path}/%A-%a.log"}
    script.write_text(render(read_template("data"), options=options, settings={"PYTHON": [sys.executable]}))
    given = ["write", str(lists), str(shards), "--size", "16"]
    array = scheduler.submit(script, given, options=["--chdir", str(ROOT)])
    after = ["--array=0", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--chdir", str(ROOT)]
    cluster.wait(scheduler.submit(script, ["gather", str(shards)], options=after), "COMPLETED")
    dataset = Dataset.open(shards)
    assert dataset.num_samples == 9 and {name[0] for name in dataset.names} == {"a", "b", "c"}
    for wrong in (["--array=1", "--chdir", str(ROOT)], ["--array=0,2", "--chdir", str(ROOT)]):
        again = scheduler.submit(script, given, options=wrong)
        cluster.wait(again, "FAILED")
        assert "an array with gaps would omit files" in (tmp_path / f"{again}-{wrong[0][-1]}.log").read_text()


def test_a_run_folder_with_spaces_and_overrides_with_quotes_reach_the_ranks(cluster: Cluster, tmp_path: Path):
    run = FakeRun(tmp_path, steps=5, name="it's a 50%t {run}")
    run.overrides += ["objective={name: mae, mask_ratio: 0.5}", 'log.every_steps="1" # it\'s one']
    job = run.submit(nodes=1)
    cluster.wait(job, "COMPLETED")
    run.assert_weights_as_undisturbed()
    assert find_run(job) == run.run_dir and "done at step 5" in run.log
    assert "starts at step 0" in (run.run_dir / "slurm" / f"{job}.0" / "rank-0.log").read_text()


def test_test_only_asks_slurm_and_submits_nothing(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = FakeRun(tmp_path)
    command = ["pretrain", str(run.config), *run.overrides, "--test-only", "--cpus-per-task", "1", "--time", "5"]
    assert main([*command, "--nodes", "2", "--gpus-per-node", "2"]) == 0
    assert "to start at" in capsys.readouterr().out
    assert main([*command, "--nodes", "8", "--gpus-per-node", "1"]) == 1
    assert "not available" in capsys.readouterr().err
    assert not run.run_dir.exists()
