"""Real runs on a real SLURM: MAE under DeepSpeed ZeRO-1 on two nodes ends bitwise the same, whatever befalls a job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.command import main
from tests.runs import LONG, ROOT, hashes, reached, rows
from tests.slurm.cluster import Cluster, FakeRun, wait_until

pytestmark = pytest.mark.slurm

STEPS = 24
SLOW = str(Path(__file__).parent / "slow_python.sh")
REAL = ["engine.name=deepspeed", "engine.zero_stage=1", "engine.device=cpu", "log.tensorboard=false", "doctor=null"]


class RealRun(FakeRun):
    """The run itself in place of the trainer of the tests, the steps of its first attempt made longer where something
    is to happen to it."""

    def __init__(self, folder: Path, *, step_seconds: float = 0.0):
        super().__init__(folder, steps=STEPS)
        self.python = SLOW if step_seconds else sys.executable
        self.overrides = [*REAL, f"optim.total_steps={STEPS}"]
        # A collective that waits for a dead node ends with the job, not before.
        self.faults = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}
        self.faults |= {"SLOW_SECONDS": str(step_seconds), "PYTHONPATH": str(ROOT)}

    def flags(self, *, nodes: int, minutes: str) -> list[str]:
        site = [flag for name, value in self.faults.items() for flag in ("--environment", f"export {name}={value}")]
        job = ["--nodes", str(nodes), "--gpus-per-node", "1", "--time", minutes, "--cpus-per-task", "1"]
        return [*job, "--python", self.python, "--margin", "25", *site]

    @property
    def step(self) -> int:
        return reached(self.run_dir)


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    """A run longer than its time limit on n1 and n4, which the others leave alone: it waits while they compute."""
    run = RealRun(tmp_path_factory.mktemp("limited"), step_seconds=6)
    run.submit("--no-preflight", "--sbatch", "nodelist=n1,n4", minutes="2")
    return run


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, limited: RealRun) -> dict[str, str]:
    """Hashes of weights and optimizer states of a run that nothing happened to; with its preflight on the nodes."""
    run = RealRun(tmp_path_factory.mktemp("undisturbed"))
    job = run.submit(minutes="30")
    cluster.wait(job, "COMPLETED")
    assert run.outcomes == ["done"] and "2 with 2 ranks on" in run.log, "the preflight measured both nodes"
    assert (run.run_dir / "release" / "model.safetensors").exists()
    return hashes(run.run_dir, STEPS)


def assert_as(undisturbed: dict[str, str], run: RealRun) -> None:
    assert hashes(run.run_dir, STEPS) == undisturbed
    assert sorted({row["step"] for row in rows(run.run_dir) if "loss" in row}) == list(range(1, STEPS + 1))


def test_a_preempted_and_requeued_run_has_bitwise_the_same_weights(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str]
):
    run = RealRun(tmp_path, step_seconds=0.3)
    job = run.submit("--no-preflight", "--sbatch", "nodelist=n2,n3", minutes="30")
    wait_until(lambda: run.step >= 3, "3 steps", 300)
    high = ["sbatch", "-p", "high", "-N", "2", "-w", "n2,n3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    subprocess.run(high, check=True, capture_output=True, timeout=LONG)
    cluster.wait(job, "COMPLETED")
    assert run.outcomes == ["preempted", "done"] and 3 <= run.rows("begin")[1]["step"] < STEPS
    assert_as(undisturbed, run)


def test_a_run_whose_second_node_is_lost_has_bitwise_the_same_weights(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str]
):
    run = RealRun(tmp_path, step_seconds=0.3)
    job = run.submit("--no-preflight", "--exclude", "n4", minutes="30")
    wait_until(lambda: run.step >= 6, "6 steps", 300)
    lost = run.rows("begin")[0]["nodes"][1]
    cluster.script("crash", lost)
    try:
        cluster.wait(job, "COMPLETED")
    finally:
        cluster.script("boot", lost)
    assert run.outcomes[-1] == "done" and len(run.outcomes) == 2
    assert_as(undisturbed, run)


def test_a_run_that_hangs_is_found_with_its_stacks_and_started_again(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str]
):
    run = RealRun(tmp_path, step_seconds=0.1)
    run.faults["HANG_AT"] = "1:6"
    run.overrides += ["engine.watch.step_seconds=10"]
    job = run.submit("--no-preflight", "--sbatch", "nodelist=n1,n2", minutes="30")
    cluster.wait(job, "COMPLETED")
    assert run.outcomes == ["failed", "done"] and run.rows("begin")[1]["step"] == 4, "from its newest checkpoint"
    assert run.rows("end")[0]["node"] == "n2"
    assert "hang: rank 1 on n2 is behind: it waits for its data of step 7" in run.log
    stacks = {path.name: path.read_text() for path in run.run_dir.glob("hangs/*/rank-*.txt")}
    assert "in slowly" in stacks["rank-1.txt"] and "in train_step" in stacks["rank-0.txt"]
    assert_as(undisturbed, run)


def test_a_run_longer_than_its_time_limit_has_bitwise_the_same_weights(
    cluster: Cluster, limited: RealRun, undisturbed: dict[str, str]
):
    cluster.wait(limited.job, "COMPLETED")
    assert len(limited.outcomes) > 1 and set(limited.outcomes[:-1]) == {"time limit"}
    assert limited.rows("begin")[1]["step"] > 0
    assert_as(undisturbed, limited)


def test_ranks_started_by_torchrun_end_the_same(cluster: Cluster, tmp_path: Path, undisturbed: dict[str, str]):
    run = RealRun(tmp_path)
    job = run.submit("--no-preflight", "--launcher", "torchrun", minutes="30")
    cluster.wait(job, "COMPLETED")
    assert_as(undisturbed, run)


def test_a_pipeline_of_real_runs_goes_through(cluster: Cluster, tmp_path: Path):
    pytest.importorskip("finetune.run")
    run, task = RealRun(tmp_path), tmp_path / "task.yaml"
    task.write_text(
        f"run_dir: {tmp_path / 'task'}\ntask: {{name: classification}}\nmodel: {{release: later, img_size: 32}}\n"
        "data: {train: {images: samples/grocery/train}, val: {images: samples/grocery/val}, num_workers: 1}\n"
        "optim: {lr: 1e-3, global_batch_size: 16, total_steps: 4}\nengine: {device: cpu}\n"
    )
    flags = [*run.flags(nodes=1, minutes="30"), "--no-preflight"]
    assert main(["pipeline", str(run.config), *run.overrides, "--finetune", str(task), *flags]) == 0
    second = (tmp_path / "task" / "slurm" / "jobs.jsonl").read_text().split('"')[3]
    cluster.wait(second, "COMPLETED")
    assert (tmp_path / "task" / "DONE").exists() and (tmp_path / "task" / "results.json").exists()
