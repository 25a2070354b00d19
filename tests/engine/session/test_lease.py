from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.engine.session.lease import Lease, RunInUseError

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from pathlib import Path
from pretrain.engine.session.lease import Lease
lease = Lease(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.processes
def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunInUseError, match=rf"process {holder.pid} on {os.uname().nodename} since 20"):
            Lease(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Lease(tmp_path):
        pass


def test_a_released_lease_can_be_taken_again(tmp_path):
    with Lease(tmp_path / "run"), pytest.raises(RunInUseError):
        Lease(tmp_path / "run")
    Lease(tmp_path / "run").release()


def test_two_runs_do_not_disturb_each_other(tmp_path):
    with Lease(tmp_path / "a"), Lease(tmp_path / "b"):
        assert (tmp_path / "a" / "lock").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunInUseError, match="file/run cannot be written: Not a directory"):
        Lease(tmp_path / "file" / "run")
