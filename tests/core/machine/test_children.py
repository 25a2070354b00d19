"""Processes that Fovea starts find its packages, whatever the current folder, the script and TMPDIR are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.core.machine.children import HOME, child_environment
from tests.runs import LONG

# No `if __name__ == "__main__":`, and a module of the current folder that multiprocessing imports.
SCRIPT = """
from pretrain.data.loader.workers import run_in_workers
from pretrain.data.shards.parallel import run_parallel
sizes = sorted(size for _, size in run_parallel(len, ["", "a"], workers=2))
print(sum(run_in_workers(range(8), 8, num_workers=1)), sizes)
"""


def test_children_search_fovea_and_what_the_user_named_but_never_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    given = os.pathsep.join(["", ".", str(tmp_path), "/mine"])
    found = child_environment({"PYTHONPATH": given})
    assert found == {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(HOME), "/mine"])}


@pytest.mark.processes
@pytest.mark.parametrize("how", ["script", "standard input", "long TMPDIR"])
def test_workers_start_from_any_script_and_under_any_tmpdir(tmp_path: Path, how: str):
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong file ran')\n")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "script.py").write_text(SCRIPT)
    temporary = tmp_path / ("long" * 30 if how == "long TMPDIR" else "short")
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, *(["-P", "-"] if how == "standard input" else [str(scripts / "script.py")])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HOME), "TMPDIR": str(temporary)},
        input=SCRIPT,
        text=True,
        capture_output=True,
        timeout=LONG,
    )
    assert (done.returncode, done.stdout) == (0, "28 [0, 1]\n"), done.stderr
    assert not list(temporary.glob("pymp-*"))
