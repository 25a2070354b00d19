"""The watchdog process of one node: `python -m pretrain.engine.watchdog`, started by `watchdog.start`.

It reads the heartbeats of the node's ranks. A run hangs when every rank on every node has been silent for longer than
its limit; ranks that wait for a busy rank are not a hang. Watchdogs exchange messages through the run folder, and only
once all ranks of one node are silent. On a hang they write the stacks, name the rank that is behind, and end the ranks.

No torch. Every access to the run folder has a timeout: its file system may be what hangs.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.core import heartbeat
from pretrain.core.files import write_json
from pretrain.core.machine.terminal import safe_output
from pretrain.engine.watchdog import processes
from pretrain.engine.watchdog.faults import add_fault
from pretrain.engine.watchdog.hang import RankState, innermost_frame, sentence

EXIT_HUNG = 50  # exit status of ranks ended here, and the signal number that ends them (see `end_by_signal`)
REPORT = "report.json"
_FOLDER_SECONDS = 30.0  # timeout of folder accesses, and of waiting for the stacks of other nodes

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Orders:
    """The settings that `watchdog.start` sends on stdin.

    Attributes:
        run_dir, token: the run folder, and the unique name of this start.
        node, nodes: index of this node, and the host names of all nodes.
        ranks: the ranks of this node: rank, pid, start (see `processes.started`), fd of the heartbeat.
        floors: minimum limits, seconds, by `heartbeat.KINDS`. patience: limit / longest recent silence.
        poll: seconds between two checks. answer: seconds within which another node must answer.
    """

    run_dir: str
    token: str
    node: int
    nodes: list[str]
    ranks: list[dict[str, int]]
    floors: dict[str, float]
    patience: float
    poll: float
    answer: float


class Watched:
    """One rank of this node."""

    def __init__(self, rank: int, pid: int, start: int, fd: int):
        self.rank, self.pid, self.start = rank, pid, start
        self._memory = processes.memory_of(pid, fd)
        slowest = (0.0,) * len(heartbeat.KINDS)
        self.reading: heartbeat.Reading = heartbeat.Reading(-1, "start", "start", 0, 0, 0, "", slowest)
        self.quiet = 0.0

    def look(self, watched_seconds: float) -> None:
        """Count only silence while this process ran too: a suspended or overloaded machine is not a hang."""
        reading = heartbeat.read(self._memory) if self._memory else None
        self.quiet += watched_seconds
        if reading is not None and reading.beats != self.reading.beats:
            self.reading, self.quiet = reading, 0.0

    def limit(self, orders: Orders) -> float:
        kind = self.reading.kind
        return max(orders.floors[kind], orders.patience * self.reading.slowest[heartbeat.KINDS.index(kind)])

    @property
    def has_left(self) -> bool:
        return self._memory is None or self.reading.phase == "gone"

    @property
    def process(self) -> str:
        return processes.state(self.pid, self.start)

    def state(self, orders: Orders, frame: str = "") -> RankState:
        told = self.reading
        return RankState(
            self.rank,
            orders.nodes[orders.node],
            *(told.phase, told.step, told.micro, told.collectives, told.inside),
            *(round(self.quiet, 1), self.limit(orders), self.process, frame),
        )


class Watchdog:
    """Monitors the ranks of one node, and exchanges their state with the other nodes."""

    def __init__(self, orders: Orders):
        self.orders = orders
        self.watched = [Watched(**rank) for rank in orders.ranks]
        self.folder = Path(orders.run_dir) / "hangs" / orders.token
        self._asked_at: float | None = None
        self._next_look = 0.0
        self._answers = 0  # number of answers that this node has written
        self._heard: dict[str, tuple[int, float]] = {}  # by file: number of the newest answer, time of its arrival

    def watch(self) -> None:
        """Run until all ranks have left or were ended."""
        slept, last = self.orders.poll, time.monotonic()
        while True:
            elapsed, last = time.monotonic() - last, time.monotonic()
            for rank in self.watched:
                rank.look(min(elapsed, 2 * slept))
            here = [rank for rank in self.watched if not rank.has_left and rank.process not in "XZ"]
            if not here:
                return
            silent = all(rank.quiet > rank.limit(self.orders) for rank in here)
            if self._hangs(silent):
                self._end_run()
                return
            slept = self.orders.poll
            _sleep(slept)

    def _hangs(self, silent: bool) -> bool:
        """Are all ranks of the run silent? Asks the other nodes when those of this node are."""
        if len(self.orders.nodes) == 1:
            return silent
        if not silent and self._asked_at is None:
            now = time.monotonic()
            if now < self._next_look:
                return False
            self._next_look = now + min(30.0, self.orders.answer / 4)
        others = within(_FOLDER_SECONDS, lambda: self._exchange(silent))
        if not silent:
            # Another node may have asked; the answer is written now.
            self._asked_at = time.monotonic() if others and any(others["nodes"].values()) else None
            return bool(others) and others.get("verdict", False)
        self._asked_at = self._asked_at or time.monotonic()
        late = time.monotonic() - self._asked_at > self.orders.answer
        if others is None:  # the folder does not answer: this node decides alone
            return late
        said = others["nodes"]
        return others["verdict"] or (all(said.values()) and (late or len(said) == len(self.orders.nodes)))

    def _exchange(self, silent: bool) -> dict[str, Any]:
        """Write whether this node is silent, and return the answers of the other nodes; {} if no node has asked."""
        if not silent and not self.folder.exists():
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._answers += 1
        write_json(self.folder / f"node-{self.orders.node}.json", {"silent": silent, "number": self._answers})
        told, now = {}, time.monotonic()
        for path in self.folder.glob("node-*.json"):
            said = _read(path)
            if self._heard.get(path.name, (0, 0.0))[0] != said["number"]:
                self._heard[path.name] = (said["number"], now)
            # An answer that is no longer renewed is from a node that has left.
            if now - self._heard[path.name][1] <= self.orders.answer:
                told[path.name] = bool(said["silent"])
        return {"nodes": told, "verdict": (self.folder / "verdict").exists()}

    def _end_run(self) -> None:
        """Collect the stacks, write the report, end the ranks; each step runs even if the one before it failed."""
        dumps = processes.dump_stacks([(rank.pid, rank.start) for rank in self.watched])
        states = [rank.state(self.orders, innermost_frame(dumps[rank.pid])) for rank in self.watched]
        within(2 * _FOLDER_SECONDS + 5, lambda: self._report(states, dumps))
        processes.end([(rank.pid, rank.start) for rank in self.watched], with_signal=EXIT_HUNG)

    def _report(self, states: list[RankState], dumps: dict[int, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        leads = True
        try:
            os.close(os.open(self.folder / "verdict", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            leads = False
        for rank in self.watched:
            (self.folder / f"rank-{rank.rank}.txt").write_text(dumps[rank.pid], encoding="utf-8")
        write_json(self.folder / f"states-{self.orders.node}.json", {"ranks": [asdict(state) for state in states]})
        seconds = min(_FOLDER_SECONDS, self.orders.answer)
        patience = time.monotonic() + seconds
        if not leads:
            while not (self.folder / REPORT).exists() and time.monotonic() < patience + seconds:
                time.sleep(self.orders.poll)
            return
        numbers = range(len(self.orders.nodes))
        while missing := [n for n in numbers if not (self.folder / f"states-{n}.json").exists()]:
            if time.monotonic() > patience:
                break
            time.sleep(self.orders.poll)
        self._conclude([self.orders.nodes[number] for number in missing])

    def _conclude(self, silent_hosts: list[str]) -> None:
        rows = [row for path in self.folder.glob("states-*.json") for row in _read(path).get("ranks", [])]
        states = sorted((RankState(**row) for row in rows), key=lambda state: state.rank)
        told, blamed = sentence(states, silent_hosts)
        _say(f"{told}\nfovea watch: stacks of all ranks are in {self.folder}; ended with status {EXIT_HUNG}")
        hosts = silent_hosts or list(dict.fromkeys(state.host for state in blamed))
        add_fault(Path(self.orders.run_dir), "hang", told, hosts=hosts, ranks=[state.rank for state in blamed])
        write_json(self.folder / REPORT, {"hang": told, "hosts": hosts, "ranks": [asdict(state) for state in states]})


def within(seconds: float, work: Callable[[], Answer]) -> Answer | None:
    """The result of `work`; None when it fails or times out (its thread is then abandoned)."""
    found: list[Answer] = []

    def run() -> None:
        try:
            found.append(work())
        except (OSError, ValueError) as error:
            _say(f"{error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _sleep(seconds: float) -> None:
    """Sleep, or return early when the process that started the watchdog ends (stdin closes)."""
    if not sys.stdin.closed and select.select([sys.stdin], [], [], seconds)[0]:
        sys.stdin.close()
        return
    if sys.stdin.closed:
        time.sleep(seconds)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _say(message: str) -> None:
    with suppress(OSError):
        print(f"fovea watch: {message}", file=sys.stderr, flush=True)


@safe_output()
def main() -> None:
    # The ranks handle these signals and end; the watchdog ends after them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, heartbeat.STACKS_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        return
    try:
        watchdog = Watchdog(Orders(**json.loads(line)))
    except OSError as error:
        _say(f"no watchdog on this node: {error}")
        return
    watchdog.watch()


if __name__ == "__main__":
    main()
