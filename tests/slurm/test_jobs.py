"""On a real SLURM: a job survives preemption, a lost node and its time limit, and ends when it gets nowhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.slurm import main
from tests.slurm.cluster import Cluster, FakeRun, wait_until

LOW, HIGH = ("--partition", "low"), ("-p", "high")


@pytest.fixture(scope="module")
def at_their_limit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeRun]:
    """Two runs that need more than their minute, submitted first: one hears that it is to stop, one is deaf."""
    runs = {
        "hears": FakeRun(tmp_path_factory.mktemp("hears"), steps=500),
        "deaf": FakeRun(tmp_path_factory.mktemp("deaf"), steps=5000),
    }
    runs["deaf"].faults |= {"FAKE_DEAF": "1", "FAKE_STEP_SECONDS": "20"}  # no checkpoint within the limit
    for run in runs.values():
        run.submit("--sbatch", "nodelist=n4", nodes=1, minutes="1")
    return runs


def occupy(nodes: str, seconds: int) -> None:
    """A job of the higher partition that takes these nodes whole."""
    count = str(nodes.count(",") + 1)
    command = [
        "sbatch",
        *HIGH,
        "-N",
        count,
        "-w",
        nodes,
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        f"sleep {seconds}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def test_a_preempted_job_saves_is_requeued_and_ends_as_undisturbed(
    cluster: Cluster, tmp_path: Path, at_their_limit: dict[str, FakeRun]
):
    run = FakeRun(tmp_path, steps=80)
    job = run.submit("--sbatch", "nodelist=n1,n2")
    wait_until(lambda: run.step >= 15, "15 steps")
    occupy("n1,n2", 2)
    cluster.wait(job, "COMPLETED")
    assert run.outcomes == ["preempted", "done"]
    assert run.rows("end")[0]["step"] == run.rows("begin")[1]["step"] >= 15, "it saved within the grace time"
    assert run.step == 80, "every step once"
    run.assert_weights_as_undisturbed()


def test_a_lost_node_is_survived_on_others(cluster: Cluster, tmp_path: Path, at_their_limit: dict[str, FakeRun]):
    run = FakeRun(tmp_path, steps=80)
    job = run.submit("--sbatch", "exclude=n4")
    wait_until(lambda: run.step >= 25, "25 steps")
    (lost,) = set(run.rows("begin")[0]["nodes"][1:])
    cluster.script("crash", lost)
    try:
        cluster.wait(job, "COMPLETED")
    finally:
        cluster.script("boot", lost)
    assert run.outcomes == ["lost", "done"]
    assert run.rows("end")[0]["node"] == lost and lost not in run.rows("begin")[1]["nodes"]
    assert run.rows("begin")[1]["step"] == run.rows("end")[0]["step"] >= 20, "it went on from the newest checkpoint"
    run.assert_weights_as_undisturbed()


def test_a_job_that_fails_twice_at_the_same_step_stops_with_a_message(cluster: Cluster, tmp_path: Path):
    run = FakeRun(tmp_path)
    run.faults["FAKE_CRASH"] = "15:1:99:exit"  # every rank then waits for rank 1, as in a collective
    job = run.submit()
    cluster.wait(job, "FAILED")
    assert run.outcomes == ["failed", "failed"]
    assert "stop: 2 attempts ended at step 10" in run.log and "not started again" in run.log


def test_one_failure_with_progress_is_retried(cluster: Cluster, tmp_path: Path):
    run = FakeRun(tmp_path)
    run.faults["FAKE_CRASH"] = "25:0:1:kill"
    job = run.submit()
    cluster.wait(job, "COMPLETED")
    assert run.outcomes == ["failed", "done"] and "Killed" in run.rows("end")[0]["detail"]
    run.assert_weights_as_undisturbed()


def test_a_node_that_fails_twice_is_excluded(cluster: Cluster, tmp_path: Path):
    run = FakeRun(tmp_path)
    run.faults["FAKE_CRASH_ON"] = "n2:kill"
    job = run.submit("--sbatch", "exclude=n1,n4")  # n2 and n3 are left; the third attempt needs n1 or n4 ...
    wait_until(lambda: len(run.rows("end")) == 2, "two failures")
    assert [row["node"] for row in run.rows("end")] == ["n2", "n2"]
    cluster.wait(job, "COMPLETED")
    assert "n2" not in run.rows("begin")[2]["nodes"]
    run.assert_weights_as_undisturbed()


def test_a_cancelled_run_saves_and_is_resumed_by_one_command(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = FakeRun(tmp_path, steps=70)
    job = run.submit()
    wait_until(lambda: run.step >= 5, "5 steps")
    assert main(["pretrain", str(run.config)]) == 2, "one job at a time"
    assert f"job {job} is RUNNING for this run" in capsys.readouterr().err
    assert main(["cancel", str(run.run_dir)]) == 0
    cluster.wait(job, "FAILED")
    assert run.outcomes == ["stopped"] and run.step < 70
    assert main(["resume", job, "--nodes", "1"]) == 0, "by the job's number, on fewer nodes"
    capsys.readouterr()
    assert main(["logs", str(run.run_dir), "-f"]) == 0
    followed = capsys.readouterr().out
    assert "starts at step" in followed and "done" in followed, "followed to the end"
    run.assert_weights_as_undisturbed()
    assert main(["status", str(run.run_dir)]) == 0
    said = capsys.readouterr().out
    assert "step  70" in said and "DONE" in said and f"job   {job} FAILED" in said and "stopped at step" in said


@pytest.mark.parametrize("fails", [False, True])
def test_a_pipeline_finetunes_once_its_release_is_there_and_never_otherwise(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: bool
):
    run, task = FakeRun(tmp_path, steps=20), tmp_path / "task.yaml"
    task.write_text(
        f"run_dir: {tmp_path / 'task'}\ntask: {{name: classification}}\nmodel: {{release: later}}\n"
        "data: {train: {images: samples/grocery/train}, val: {images: samples/grocery/val}}\n"
        "optim: {lr: 1e-3, global_batch_size: 16, total_steps: 20}\n"
    )
    if fails:
        run.faults["FAKE_CRASH"] = "5:0:99:exit"
    faults = [flag for name, value in run.faults.items() for flag in ("--environment", f"export {name}={value}")]
    job = [
        "--nodes",
        "1",
        "--gpus-per-node",
        "1",
        "--cpus-per-task",
        "1",
        "--no-preflight",
        "--time",
        "5",
        "--margin",
        "30",
    ]
    job += ["--python", str(Path(__file__).parent / "python.sh"), *faults]
    assert main(["pipeline", str(run.config), *run.overrides, "--finetune", str(task), *job]) == 0
    first, second = (line.split()[1] for line in capsys.readouterr().out.splitlines())
    cluster.wait(second, "CANCELLED" if fails else "COMPLETED")
    assert cluster.state(first) == ("FAILED" if fails else "COMPLETED")
    assert (tmp_path / "task" / "DONE").exists() is not fails


def test_a_run_goes_on_after_its_time_limit(cluster: Cluster, at_their_limit: dict[str, FakeRun]):
    run = at_their_limit["hears"]
    cluster.wait(run.job, "COMPLETED", seconds=180)
    assert run.outcomes[-1] == "done" and set(run.outcomes[:-1]) == {"time limit"}
    assert run.step == 500, "every step once"
    run.assert_weights_as_undisturbed()


def test_a_run_that_cannot_save_in_time_is_ended_before_the_limit_and_not_for_ever(
    cluster: Cluster, at_their_limit: dict[str, FakeRun]
):
    run = at_their_limit["deaf"]
    cluster.wait(run.job, "FAILED", seconds=240)
    assert run.outcomes == ["failed", "failed"], "SLURM never had to kill it: a job that timed out is not requeued"
    assert "did not stop in time" in run.log


def test_shellcheck_finds_nothing_in_the_batch_scripts():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted((Path(__file__).parents[2] / "SLURM").iterdir())
    done = subprocess.run(["shellcheck", "--shell=bash", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
