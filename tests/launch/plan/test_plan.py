"""The plan's formulas, each where it can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.plan.command import FAILURES_PER_GPU_DAY, IMAGES_PER_CORE, Cluster, Load, forecast, main
from launch.plan.hardware import GPUS

CLUSTER = Cluster(
    nodes=4,
    gpus_per_node=8,
    gpu=GPUS["h100"],
    cores_per_node=96,
    network=400,
    storage=20,
    utilization=0.5,
    failures_per_gpu_day=1 / 32,
    restart=600,
)
LOAD = Load(batch=4096, steps=1000, flops=4096 * 1e12, gradients=4e9, checkpoint=12e9, image_bytes=1e5)


def test_the_parts_of_a_step_are_the_stated_quotients():
    found = forecast(LOAD, CLUSTER)
    assert found.compute == pytest.approx(4096 / (32 * 0.5 * 989))
    assert found.reduce == pytest.approx(2 * 0.75 * 4 / 400)
    assert found.read == pytest.approx(4096 * 1e5 / 20e9)
    assert found.decode == pytest.approx(4096 / (4 * 96 * IMAGES_PER_CORE))
    assert found.step == max(found.compute, found.reduce, found.read, found.decode) == found.compute
    assert forecast(replace(LOAD, image_bytes=1e8), CLUSTER).step == pytest.approx(20.48), "limited by storage"
    assert forecast(LOAD, replace(CLUSTER, nodes=1)).reduce == 0, "one node sends nothing"


def test_the_interval_between_checkpoints_loses_least():
    """By Young's formula, against every other interval: written and repeated work, restarts apart."""
    found = forecast(LOAD, CLUSTER)
    assert found.mtbf == pytest.approx(86400)
    assert found.save == pytest.approx(0.6)

    def loses(interval: float) -> float:
        return found.save / interval + (interval / 2 + CLUSTER.restart) / found.mtbf

    assert found.lost == pytest.approx(loses(found.interval))
    assert all(loses(found.interval) <= loses(found.interval * factor) for factor in (0.5, 0.9, 1.1, 2))


def test_a_run_of_llama_s_size_fails_as_often_as_llama_did():
    cluster = replace(CLUSTER, nodes=2048, failures_per_gpu_day=FAILURES_PER_GPU_DAY)
    assert forecast(LOAD, cluster).mtbf / 3600 == pytest.approx(54 * 24 / 419)


@pytest.mark.parametrize("flag", ["--nodes=0", "--gpus-per-node=2x", "--utilization=0", "--storage=-1", "--images=1e6"])
def test_a_cluster_without_nodes_or_speed_is_refused_by_its_flag(flag: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["config.yaml", "--nodes=2", "--gpu=h100", flag])
    assert f"{flag.partition('=')[0]}: expected a" in capsys.readouterr().err


def test_a_cluster_that_fails_faster_than_it_restarts_never_ends():
    assert forecast(LOAD, replace(CLUSTER, failures_per_gpu_day=10.0)).total == float("inf")


def test_a_plan_without_the_data_names_the_flag_that_replaces_them(capsys: pytest.CaptureFixture[str]):
    flags = ["configs/debug/mae.yaml", "data.shards=/nowhere", "--nodes", "1", "--gpu", "h200"]
    assert main(flags) == 2
    assert "give the number of images: --images 1281167" in capsys.readouterr().err
