import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.core.heartbeat import STACKS_SIGNAL
from pretrain.data.loader.workers import run_in_workers
from tests.runs import LONG

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore:This DataLoader will create")]


class Squares:
    def __getitem__(self, index: int) -> tuple[int, int]:
        return index * index, os.getpid()


class Failing:
    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise ValueError("item two is wrong")
        return index


class Killing:
    def __getitem__(self, index: int) -> int:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


class SignalMask:
    def __getitem__(self, index: int) -> set[int]:
        return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


class Slow:
    def __getitem__(self, index: int) -> int:
        time.sleep(0.05)
        (Path(os.environ["WORKERS"]) / str(os.getpid())).touch()
        return index


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_items_come_in_order(num_workers):
    items = list(run_in_workers(Squares(), 10, num_workers=num_workers))
    assert [square for square, _ in items] == [i * i for i in range(10)]
    processes = {process for _, process in items}
    assert len(processes) == max(1, num_workers)
    assert (os.getpid() in processes) == (num_workers == 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_random_numbers_of_the_run_alone(num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(run_in_workers(Squares(), 2, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_items_are_no_items():
    assert list(run_in_workers(Squares(), 0, num_workers=1)) == []


class Large:
    def __getitem__(self, index: int) -> dict[str, list[torch.Tensor]]:
        return {"values": [torch.full((100_000,), float(index)), torch.arange(index)]}


SMALL_SHARED_MEMORY = """
from pretrain.data.loader.workers import run_in_workers
from tests.data.loader.test_workers import Large
for index, item in enumerate(run_in_workers(Large(), 6, num_workers=2)):
    large, small = item["values"]
    assert bool((large == index).all()) and small.tolist() == list(range(index))
print("all")
"""


def with_shared_memory(size: str, source: str) -> subprocess.CompletedProcess[str]:
    """Python with `source`, where /dev/shm has `size`, without the first page."""
    mounted = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/used && exec "
    shell = ["unshare", "-m", "sh", "-c", f'{mounted} "$0" -c "$1"', sys.executable, source]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=LONG)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("mounting needs root")
    return done


def test_items_larger_than_shared_memory_arrive_and_one_line_names_the_cause():
    done = with_shared_memory("256k", SMALL_SHARED_MEMORY)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr
    assert done.stderr.count("/dev/shm has 0.") == 1 and "docker: --shm-size or --ipc=host" in done.stderr


@pytest.mark.parametrize("size", ["4k", "16k"])  # of the locks of the workers, none and some are there
def test_without_any_shared_memory_the_workers_are_refused_with_the_way_out(size: str):
    done = with_shared_memory(size, SMALL_SHARED_MEMORY)
    assert "Exception ignored" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "no data worker can be started: No space left on device; /dev/shm has 0" in said, done.stderr
    assert said.endswith("or set data.num_workers=0")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_an_item_is_raised_unchanged_in_order(num_workers):
    items = run_in_workers(Failing(), 5, num_workers=num_workers)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="item two is wrong"):
        next(items)


def test_a_killed_worker_is_reported():
    """The worker of item 3 dies; on a busy machine this is seen while item 2, of the other worker, is awaited."""
    items = run_in_workers(Killing(), 8, num_workers=2, prefetch_factor=1)
    with pytest.raises(
        RuntimeError, match=r"data worker died while item [23] was due: killed by SIGKILL, .*for lack of memory"
    ):
        list(items)


@pytest.mark.parametrize("server", ["own", "of other code"])
def test_signals_for_the_run_do_not_reach_the_workers_and_are_open_again_here(server: str):
    multiprocessing.forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    if server == "of other code":
        multiprocessing.forkserver.ensure_running()
    (blocked,) = run_in_workers(SignalMask(), 1, num_workers=1)
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} <= blocked
    assert STACKS_SIGNAL not in blocked, "it shows where a worker hangs, and ends nothing"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def alive(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def gone(processes: set[int]) -> bool:
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def test_leaving_the_loop_ends_the_workers():
    items = run_in_workers(Squares(), 1000, num_workers=2)
    workers = {next(items)[1] for _ in range(4)}
    assert all(alive(worker) for worker in workers)
    items.close()
    assert gone(workers)


PARENT = """
from pretrain.data.loader.workers import run_in_workers
from tests.data.loader.test_workers import Slow
if __name__ == "__main__":
    for item in run_in_workers(Slow(), 100_000, num_workers=2):
        pass
"""


def started(tmp_path: Path, source: str) -> tuple[subprocess.Popen, set[int]]:
    """A run in a process of its own, and its two workers, which are at work."""
    script = tmp_path / "run.py"
    script.write_text(source)
    folder = tmp_path / "workers"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "WORKERS": str(folder)}
    run = subprocess.Popen([sys.executable, str(script)], env=environment)
    while len(workers := {int(path.name) for path in folder.iterdir()}) < 2:
        assert run.poll() is None
        time.sleep(0.02)
    return run, workers


def test_workers_of_a_killed_run_are_gone_within_seconds(tmp_path):
    run, workers = started(tmp_path, PARENT)
    with run:
        assert all(alive(worker) for worker in workers)
        run.kill()
        run.wait()
        assert gone(workers)


def test_a_run_that_ends_in_the_middle_of_the_stream_ends_with_its_workers(tmp_path):
    source = PARENT.replace("    for item in run_in", "    items = run_in").replace(
        ":\n        pass", "\n    [next(items) for _ in range(20)]"
    )
    run, workers = started(tmp_path, source)
    with run:
        assert run.wait(timeout=LONG) == 0
        assert gone(workers)
