"""On a real SLURM: a job survives preemption, a lost node and its time limit, and ends when it gets nowhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.slurm.attempts import read_json_lines
from launch.slurm.command import main
from tests.runs import LONG
from tests.slurm.cluster import Cluster, FakeRun, wait_until

pytestmark = pytest.mark.slurm

LOW, HIGH = ("--partition", "low"), ("-p", "high")


@pytest.fixture(scope="module")
def elsewhere(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeRun]:
    """Runs on n3 and n4 that nobody disturbs, submitted at once; their tests come last and wait for them."""
    runs = {
        "hears": FakeRun(tmp_path_factory.mktemp("hears"), steps=500),
        "deaf": FakeRun(tmp_path_factory.mktemp("deaf"), steps=5000, step_seconds=20),  # no checkpoint within the limit
        "fails": FakeRun(tmp_path_factory.mktemp("fails")),
        "retried": FakeRun(tmp_path_factory.mktemp("retried")),
    }
    runs["deaf"].faults["FAKE_DEAF"] = "1"
    runs["fails"].faults["FAKE_CRASH"] = "15:1:99:exit"  # every rank then waits for rank 1, as in a collective
    runs["retried"].faults["FAKE_CRASH"] = "25:0:1:kill"
    for name in ("hears", "deaf"):
        runs[name].submit("--sbatch", "nodelist=n4", nodes=1, minutes="1")
    for name in ("fails", "retried"):
        runs[name].submit("--sbatch", "nodelist=n3,n4")
    return runs


@pytest.fixture(scope="module")
def pipelines(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, elsewhere: dict[str, FakeRun]
) -> dict[bool, list[str]]:
    """Jobs of pretraining and of finetuning from it, by whether pretraining fails."""
    jobs = {}
    for fails in (False, True):
        folder = tmp_path_factory.mktemp("pipeline")
        run, task = FakeRun(folder, steps=20), folder / "task.yaml"
        task.write_text(
            f"run_dir: {folder / 'task'}\ntask: {{name: classification}}\nmodel: {{release: later}}\n"
            "data: {train: {images: samples/grocery/train}, val: {images: samples/grocery/val}}\n"
            "optim: {lr: 1e-3, global_batch_size: 16, total_steps: 20}\n"
        )
        if fails:
            run.faults["FAKE_CRASH"] = "5:0:99:exit"
        flags = [*run.flags(nodes=1, minutes="5"), "--sbatch", "nodelist=n3"]
        assert main(["pipeline", str(run.config), *run.overrides, "--finetune", str(task), *flags]) == 0
        jobs[fails] = [
            row["job"] for name in ("run", "task") for row in read_json_lines(folder / name / "slurm" / "jobs.jsonl")
        ]
    return jobs


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
    subprocess.run(command, check=True, capture_output=True, timeout=LONG)


def test_a_preempted_job_saves_is_requeued_and_ends_as_undisturbed(
    cluster: Cluster, tmp_path: Path, elsewhere: dict[str, FakeRun], pipelines: dict[bool, list[str]]
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


def test_a_job_whose_ranks_alone_are_signalled_is_requeued(
    cluster: Cluster, tmp_path: Path, elsewhere: dict[str, FakeRun]
):
    run = FakeRun(tmp_path, steps=60)
    with cluster.without("SlurmctldParameters"):  # as most clusters: SIGTERM to the ranks, and no --signal
        job = run.submit("--sbatch", "nodelist=n1,n2")
        wait_until(lambda: run.step >= 15, "15 steps")
        occupy("n1,n2", 2)
        wait_until(lambda: bool(run.outcomes), "the end of an attempt")
    cluster.wait(job, "COMPLETED")
    assert run.outcomes == ["preempted", "done"] and run.step == 60, "every step once"
    run.assert_weights_as_undisturbed()


def test_a_lost_node_is_survived_on_others(cluster: Cluster, tmp_path: Path, elsewhere: dict[str, FakeRun]):
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


def test_a_job_that_a_person_cancels_stays_so_though_its_node_is_to_be_drained(cluster: Cluster, tmp_path: Path):
    run = FakeRun(tmp_path, steps=5000)
    job = run.submit("--sbatch", "nodelist=n1", nodes=1)
    wait_until(lambda: run.step >= 5, "5 steps")
    subprocess.run(["scontrol", "update", "nodename=n1", "state=drain", "reason=test"], check=True)
    try:
        subprocess.run(["scancel", job], check=True)
        wait_until(lambda: bool(run.outcomes), "the end of the attempt")
        cluster.wait(job, "CANCELLED")
    finally:
        subprocess.run(["scontrol", "update", "nodename=n1", "state=resume"], check=True)
    assert run.outcomes == ["ended"]


def test_a_node_that_fails_twice_is_excluded(cluster: Cluster, tmp_path: Path):
    run = FakeRun(tmp_path)
    run.faults["FAKE_CRASH_ON"] = "n2:kill"
    job = run.submit("--exclude", "n1")  # n2 and n3 begin, n4 is to spare
    wait_until(lambda: len(run.rows("end")) == 2, "two failures")
    assert [row["node"] for row in run.rows("end")] == ["n2", "n2"]
    cluster.wait(job, "COMPLETED")
    assert run.rows("begin")[2]["nodes"] == ["n3", "n4"], "what the user excluded stays so"
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


def test_a_job_that_fails_twice_at_the_same_step_stops_with_a_message(cluster: Cluster, elsewhere: dict[str, FakeRun]):
    run = elsewhere["fails"]
    cluster.wait(run.job, "FAILED")
    assert run.outcomes == ["failed", "failed"]
    assert "stop: 2 attempts ended at step 10" in run.log and "not restarted" in run.log


def test_one_failure_with_progress_is_retried(cluster: Cluster, elsewhere: dict[str, FakeRun]):
    run = elsewhere["retried"]
    cluster.wait(run.job, "COMPLETED")
    assert run.outcomes == ["failed", "done"] and "Killed" in run.rows("end")[0]["detail"]
    run.assert_weights_as_undisturbed()


@pytest.mark.parametrize("fails", [False, True])
def test_a_pipeline_finetunes_when_its_release_exists_and_never_otherwise(
    cluster: Cluster, pipelines: dict[bool, list[str]], fails: bool
):
    first, second = pipelines[fails]
    cluster.wait(second, "CANCELLED" if fails else "COMPLETED")
    assert cluster.state(first) == ("FAILED" if fails else "COMPLETED")


def test_a_run_continues_after_its_time_limit(cluster: Cluster, elsewhere: dict[str, FakeRun]):
    run = elsewhere["hears"]
    cluster.wait(run.job, "COMPLETED")
    assert run.outcomes[-1] == "done" and set(run.outcomes[:-1]) == {"time limit"}
    assert run.step == 500, "every step once"
    run.assert_weights_as_undisturbed()


def test_a_run_that_cannot_save_in_time_is_ended_before_the_limit_and_not_for_ever(
    cluster: Cluster, elsewhere: dict[str, FakeRun]
):
    run = elsewhere["deaf"]
    cluster.wait(run.job, "FAILED")
    assert run.outcomes == ["failed", "failed"], "SLURM never had to kill it: a job that timed out is not requeued"
    assert "did not stop in time" in run.log


def test_shellcheck_finds_nothing_in_the_batch_scripts():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted((Path(__file__).parents[2] / "SLURM").iterdir())
    done = subprocess.run(["shellcheck", "--shell=bash", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
