"""Files of the current folder are never imported; another `launch`, `pretrain` or `finetune` on the path is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fovea.__main__ import PACKAGES
from tests.runs import LONG, ROOT

pytestmark = pytest.mark.processes

CONFIG = str(ROOT / "configs/debug/mae.yaml")
RUN = ("pretrain", CONFIG, "--check", f"data.shards={ROOT}/samples/grocery/train")
INSTALLED = ("-c", "import sys; from fovea.__main__ import main; sys.exit(main())")  # what the installed script does
AS_A_MODULE = ("-m", "fovea")
# Fovea's packages, a library that every process imports, modules that multiprocessing and torchrun import.
COMMON_NAMES = (*PACKAGES, "torch", "numpy", "random", "selectors", "queue")


def run(folder: Path, *words: str, path: tuple[Path, ...] = ()) -> tuple[int, str]:
    """Exit status and output of Python with `words` in `folder`, with `path` before Fovea in PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG)
    return done.returncode, done.stdout + done.stderr


def plant(folder: Path, name: str) -> Path:
    """A package of another project."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise SystemExit('the wrong package ran')\n")
    return folder / name / "__init__.py"


@pytest.mark.parametrize("how", [INSTALLED, AS_A_MODULE], ids=["installed", "module"])
def test_files_of_the_current_folder_are_no_obstacle(tmp_path: Path, how: tuple[str, ...]):
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file ran')\n")
    status, said = run(tmp_path, *how, *RUN)
    assert status == 0 and "wrong file" not in said, said


@pytest.mark.parametrize("words", [("pretrain",), ("launch", "local", "1")], ids=["pretrain", "launch local"])
def test_a_run_trains_whatever_files_lie_in_the_current_folder(tmp_path: Path, words: tuple[str, ...]):
    """Neither the ranks, nor the watchdog, nor the data workers import one of them."""
    for name in COMMON_NAMES:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\nraise SystemExit(0)"
        )
    settings = (
        *("run_dir=run", f"data.shards={ROOT}/samples/grocery/train", "data.num_workers=1", "model.depth=1"),
        *("objective.decoder_depth=1", "optim.global_batch_size=8", "optim.total_steps=2", "optim.warmup_steps=1"),
    )
    status, said = run(tmp_path, *INSTALLED, *words, CONFIG, *settings)
    assert status == 0 and (tmp_path / "run" / "DONE").exists(), said
    assert not (tmp_path / "ran").exists() and "fovea watch" not in said


@pytest.mark.parametrize("how", [INSTALLED, AS_A_MODULE], ids=["installed", "module"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_in_pythonpath_that_hides_ours_is_named(tmp_path: Path, name: str, how: tuple[str, ...]):
    foreign = plant(tmp_path / "ros", name)
    status, said = run(tmp_path, *how, *RUN, path=(tmp_path / "ros",))
    assert status == 2
    assert said.startswith(f"fovea: {foreign} hides Fovea's package '{name}'") and said.count("\n") == 1


def test_ranks_under_torchrun_name_it_too(tmp_path: Path):
    foreign = plant(tmp_path / "ros", "launch")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "-m", "fovea")
    status, said = run(tmp_path, *torchrun, *RUN, path=(tmp_path / "ros",))
    assert status != 0
    assert f"fovea: {foreign} hides Fovea's package 'launch'" in said and "the wrong package ran" not in said


def test_a_folder_that_is_no_package_hides_nothing(tmp_path: Path):
    (tmp_path / "launch").mkdir()  # without __init__.py, so a package of PYTHONPATH comes first
    status, said = run(tmp_path, *AS_A_MODULE, *RUN)
    assert status == 0, said
