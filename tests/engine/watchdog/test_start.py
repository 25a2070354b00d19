"""Real ranks over gloo: one that hangs with the GIL held, one whose weights change, and a run with neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.engine.protocol import StepResult
from pretrain.engine.watchdog.__main__ import EXIT_HUNG, REPORT
from pretrain.engine.watchdog.faults import read_faults
from pretrain.engine.watchdog.replicas import describe, sums_of_bits
from pretrain.engine.watchdog.stragglers import Stragglers
from tests.runs import Run, kill_all


def launch(how: str, run_dir: Path, *, world: int) -> tuple[list[int | None], str]:
    """(exit status of each rank, what they said) of `tests.engine.watchdog.watched`."""
    ranks = Run(["tests.engine.watchdog.watched", how, str(run_dir)], processes=world)
    try:
        ranks.wait()
    finally:
        kill_all(ranks)
    return [rank.returncode for rank in ranks.ranks], ranks.said


@pytest.mark.processes
def test_a_rank_that_holds_the_gil_in_its_data_is_named_and_all_ranks_end_with_their_stacks_saved(tmp_path: Path):
    statuses, said = launch("gil", tmp_path, world=2)
    assert statuses == [EXIT_HUNG, EXIT_HUNG], said
    assert "rank 1 on n2 is behind: it waits for its data of step 6" in said and "hold_the_gil" in said
    (folder,) = (tmp_path / "hangs").iterdir()
    assert json.loads((folder / REPORT).read_text())["hosts"] == ["n2"]
    assert "hold_the_gil" in (folder / "rank-1.txt").read_text()
    waiting = (folder / "rank-0.txt").read_text()
    assert "in train_step" in waiting and "hold_the_gil" not in waiting
    assert [fault.ranks for fault in read_faults(tmp_path, job="", restart=0)] == [[1]]
    assert (tmp_path / "saved-5").exists()


@pytest.mark.processes
def test_healthy_steps_are_silent_and_weights_that_change_on_one_rank_are_named_before_they_are_saved(tmp_path: Path):
    statuses, said = launch("weights", tmp_path, world=3)
    assert statuses == [1, 1, 1], said
    assert "step 10: the weights of rank 1 on n2 differ from those of the other 2 ranks (last.weight)" in said
    assert "fovea watch" not in said and not (tmp_path / "hangs").exists()
    assert (tmp_path / "saved-5").exists() and not (tmp_path / "saved-10").exists()
    (fault,) = read_faults(tmp_path, job="", restart=0)
    assert (fault.kind, fault.hosts, fault.ranks) == ("replicas", ["n2"], [1])


def test_every_bit_of_every_dtype_counts_in_a_sum():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        tensor = torch.arange(64).to(dtype).view(8, 8).t()
        before = sums_of_bits({"a": tensor})
        for bit in range(8 * tensor.element_size()):
            changed = tensor.contiguous().clone()
            raw = changed.view(-1).view(torch.uint8)
            raw[3 * tensor.element_size() + bit // 8] ^= 1 << bit % 8
            assert not torch.equal(sums_of_bits({"a": changed}), before)


def test_of_two_ranks_that_differ_neither_is_blamed():
    error = describe(3, ["a", "b"], [("n1", [1, 2]), ("n2", [1, 3])])
    assert "ranks 0, 1 on n1, n2 differ; there is no majority" in str(error) and "(b)" in str(error)
    assert error.ranks == [] and error.hosts == []


def results(steps: int, works: tuple[float, ...], waits: tuple[float, ...] = (0.0,) * 4) -> list[StepResult]:
    one = StepResult(losses={}, grad_norm=1.0, lr=1.0, weight_decay=0.0, seconds=2.0, works=works, waits=waits)
    return [one] * steps


def test_a_rank_that_stays_slower_is_told_of_once_and_a_short_wait_is_not():
    hosts = ["n1", "n1", "n2", "n2"]
    stragglers = Stragglers(hosts, window=5)
    even = results(20, (1.0, 1.1, 1.0, 1.05))
    short = results(5, (1.0, 1.0, 1.9, 1.0))
    slow = results(30, (1.0, 1.0, 1.0, 1.5))
    assert [said for result in even + short + even for said in stragglers(result)] == []
    (said,) = [said for result in slow for said in stragglers(result)]
    assert said.startswith("rank 3 (n2) is slower than the others: forward passes take 1.500 s")


def test_a_whole_host_that_waits_for_its_data_is_told_of_as_one():
    stragglers = Stragglers(["n1", "n1", "n2", "n2"], window=5)
    slow = results(30, (1.0,) * 4, (0.1, 0.1, 0.9, 0.8))
    (said,) = [said for result in slow for said in stragglers(result)]
    assert said.startswith("all ranks of n2 are slower than the others: waits for data take 0.900 s")
