"""The watchdog's own process beside ranks that hang; nodes are told apart by their number, here on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pretrain.core import heartbeat
from pretrain.engine.watchdog import __main__ as watchdog
from pretrain.engine.watchdog.__main__ import EXIT_HUNG, REPORT, Orders
from tests.runs import LONG

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]
NODES = ["n1", "n2"]


class Job:
    """Ranks of one job, one on each node, and a watchdog for each node that has one."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, list[subprocess.Popen[str]]()
        self.ranks: list[subprocess.Popen[str]] = []

    def start(self, *ranks: str, watched: int | None = None, step_seconds: float = 1.5) -> None:
        """`ranks`: "silent data 8", see `fake_rank`. watched: nodes that have a watchdog (default: all)."""
        facts = []
        for words in ranks:
            self.ranks.append(self._popen("tests.engine.watchdog.fake_rank", *words.split()))
            out = self.ranks[-1].stdout
            assert out is not None
            facts.append(json.loads(out.readline()))
        self.watchdogs = []
        for node in range(len(ranks) if watched is None else watched):
            orders = Orders(
                run_dir=str(self.folder),
                token="now",
                node=node,
                nodes=NODES[: len(ranks)],
                ranks=[{"rank": node, **facts[node]}],
                floors=dict.fromkeys(heartbeat.KINDS, step_seconds),
                patience=5.0,
                poll=0.1,
                answer=3.0,
            )
            self.watchdogs.append(self._popen("pretrain.engine.watchdog"))
            pipe = self.watchdogs[-1].stdin
            assert pipe is not None
            pipe.write(json.dumps(asdict(orders)) + "\n")
            pipe.flush()

    def _popen(self, module: str, *words: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-m", module, *words], subprocess.PIPE
        self.started.append(subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe))
        return self.started[-1]

    @property
    def statuses(self) -> list[int]:
        return [rank.wait(LONG) for rank in self.ranks]

    @property
    def hangs(self) -> Path:
        return self.folder / "hangs" / "now"

    @property
    def report(self) -> dict:
        return json.loads((self.hangs / REPORT).read_text())


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_ranks_that_all_stand_still_are_ended_on_every_node_and_the_one_behind_is_named(job: Job):
    job.start("silent agree 8", "silent data 8")
    assert job.statuses == [EXIT_HUNG, EXIT_HUNG]
    assert "rank 1 on n2 is behind: it waits for its data of step 8" in job.report["hang"]
    assert job.report["hosts"] == ["n2"]
    (fault,) = (job.folder / "faults.jsonl").read_text().splitlines()
    assert json.loads(fault)["hosts"] == ["n2"] and json.loads(fault)["kind"] == "hang"
    for rank in (0, 1):
        stacks = (job.hangs / f"rank-{rank}.txt").read_text()
        assert "in main" in stacks, "of the rank"
        assert "its data worker" in stacks and "in decode" in stacks
    assert [watchdog.wait(LONG) for watchdog in job.watchdogs] == [0, 0]


def test_a_rank_that_is_waited_for_and_still_busy_is_no_hang(job: Job):
    job.start("silent agree 8", "busy data 8")
    waited = time.monotonic() + 7  # several limits, and the time for an answer
    while time.monotonic() < waited:
        assert [rank.poll() for rank in job.ranks] == [None, None]
        time.sleep(0.2)
    assert not (job.hangs / "verdict").exists()


def test_a_node_that_does_not_answer_is_named(job: Job):
    job.start("silent agree 8", "silent data 8", watched=1)
    assert job.ranks[0].wait(LONG) == EXIT_HUNG
    assert "n2 does not respond" in job.report["hang"]


def test_a_node_that_answered_once_and_has_gone_since_holds_nothing_up(job: Job):
    job.hangs.mkdir(parents=True)
    (job.hangs / "node-1.json").write_text(json.dumps({"silent": False, "number": 1}))
    job.start("silent agree 8", "silent data 8", watched=1)
    assert job.ranks[0].wait(LONG) == EXIT_HUNG
    assert "n2 does not respond" in job.report["hang"]


def test_a_stopped_process_shows_its_stacks_and_is_ended(job: Job):
    job.start("silent backward 3", step_seconds=2.0)
    os.kill(job.ranks[0].pid, signal.SIGSTOP)
    assert job.statuses == [EXIT_HUNG]
    assert "its process is stopped" in job.report["hang"] or "same place" in job.report["hang"]
    assert "in main" in (job.hangs / "rank-0.txt").read_text()


def test_time_in_which_the_machine_slept_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Rank:
        process, quiet = "S", 0.0

        def look(self, watched_seconds: float) -> None:
            self.quiet += watched_seconds
            looks.append(watched_seconds)

        def limit(self, _: Orders) -> float:
            return 60.0

        @property
        def has_left(self) -> bool:
            return len(looks) > 3

    now, looks = [0.0], list[float]()
    orders = Orders(str(tmp_path), "now", 0, ["n1"], [], {}, patience=5.0, poll=1.0, answer=3.0)
    dog: Any = watchdog.Watchdog(orders)
    dog.watched = [Rank()]
    monkeypatch.setattr(watchdog, "_sleep", lambda seconds: now.__setitem__(0, now[0] + 3600))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog.watch()
    assert looks == [0.0, 2.0, 2.0, 2.0] and not (tmp_path / "hangs").exists()


def test_a_watchdog_goes_with_its_ranks_whether_they_leave_or_are_killed(job: Job):
    job.start("leaves data 8", "busy data 8", step_seconds=60)
    job.ranks[1].kill()
    assert [watchdog.wait(LONG) for watchdog in job.watchdogs] == [0, 0]
    assert not job.hangs.exists()


def test_a_long_wait_of_late_makes_the_limit_longer():
    heart = heartbeat.Heart()
    heart.mark("data", 1, 0)
    heart.mark("data", 2, 0)
    heart._since -= 40
    heart.mark("forward", 2, 0)
    heart.mark("data", 3, 0)
    reading = heartbeat.read(heart._memory)
    assert reading is not None and reading.kind == "step" and reading.slowest[1] == pytest.approx(40, abs=5)
    for step in range(3, 140):
        heart.mark("data", step, 0)
    reading = heartbeat.read(heart._memory)
    assert reading is not None and reading.slowest[1] < 40, "forgotten after 128 steps"
    heart.close()


def test_the_first_step_has_the_time_of_a_start():
    heart = heartbeat.Heart()
    kinds = []
    for phase, step in [("data", 7), ("forward", 7), ("save", 7), ("data", 8), ("end", 8), ("data", 9), ("probe", 9)]:
        heart.mark(phase, step, 0)
        reading = heartbeat.read(heart._memory)
        assert reading is not None
        kinds.append(reading.kind)
    assert kinds == ["start", "start", "save", "step", "start", "start", "probe"]
    heart.close()
