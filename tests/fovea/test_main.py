"""Another `launch`, `pretrain` or `finetune` on the path is named, in one sentence and with exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fovea.__main__ import PACKAGES
from tests.runs import ROOT

pytestmark = pytest.mark.processes

RUN = ("pretrain", str(ROOT / "configs/debug/mae.yaml"), "--check", f"data.shards={ROOT}/samples/grocery/train")
INSTALLED = ("-c", "import sys; from fovea.__main__ import main; sys.exit(main())")  # what the installed script does
AS_A_MODULE = ("-m", "fovea")


def run(folder: Path, *words: str, path: tuple[Path, ...] = (), safe: bool = False) -> tuple[int, str]:
    """Exit status and output of Python with `words` in `folder`, with `path` before Fovea in PYTHONPATH."""
    variables = {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    variables |= {"PYTHONSAFEPATH": "1"} if safe else {}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def plant(folder: Path, name: str) -> Path:
    """A package of another project."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise SystemExit('the wrong package ran')\n")
    return folder / name / "__init__.py"


@pytest.mark.parametrize("how", [INSTALLED, AS_A_MODULE], ids=["installed", "module"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_file_in_the_current_folder_that_hides_a_package_is_named(tmp_path: Path, name: str, how: tuple[str, ...]):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file ran')\n")
    status, said = run(tmp_path, *how, *RUN)
    assert status == 2
    assert said == (
        f"fovea: {tmp_path / name}.py hides Fovea's package '{name}' ({ROOT / name}): rename it, start from another "
        "folder, or remove its folder from PYTHONPATH\n"
    )


@pytest.mark.parametrize("how", [INSTALLED, AS_A_MODULE], ids=["installed", "module"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_in_pythonpath_that_hides_ours_is_named(tmp_path: Path, name: str, how: tuple[str, ...]):
    foreign = plant(tmp_path / "ros", name)
    status, said = run(tmp_path, *how, *RUN, path=(tmp_path / "ros",))
    assert status == 2
    assert said.startswith(f"fovea: {foreign} hides Fovea's package '{name}'") and said.count("\n") == 1


def test_ranks_under_torchrun_name_it_too(tmp_path: Path):
    foreign = plant(tmp_path, "launch")
    status, said = run(tmp_path, "-m", "torch.distributed.run", "--standalone", "-m", "fovea", *RUN)
    assert status != 0
    assert f"fovea: {foreign} hides Fovea's package 'launch'" in said and "the wrong package ran" not in said


def test_a_folder_that_is_no_package_hides_nothing(tmp_path: Path):
    (tmp_path / "launch").mkdir()  # without __init__.py, so a package of PYTHONPATH comes first
    status, said = run(tmp_path, *AS_A_MODULE, *RUN)
    assert status == 0, said


def test_a_file_in_the_current_folder_is_no_obstacle_where_python_does_not_search_it(tmp_path: Path):
    (tmp_path / "pretrain.py").write_text("raise SystemExit('the wrong file ran')\n")
    status, said = run(tmp_path, *AS_A_MODULE, *RUN, safe=True)
    assert status == 0, said
