"""A batch script is filled in line by line, and stays one that a person can read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm.attempts import add_row
from launch.slurm.command import main
from launch.slurm.template import folder, read_options, read_template, render
from tests.runs import ROOT, write_config

TEMPLATE = """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --requeue

PYTHON=(python) # which
# Modules and variables of your site:
"""


def test_options_are_replaced_added_and_taken_away():
    script = render(TEMPLATE, options={"nodes": "8", "requeue": None, "qos": "long", "exclusive": ""}, settings={})
    assert read_options(script) == {"nodes": "8", "qos": "long", "exclusive": ""}


@pytest.mark.processes
def test_an_installation_without_a_checkout_has_the_batch_scripts(tmp_path: Path):
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "home"
    for name in ("launch", "pretrain/core", "SLURM", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "-w", str(wheels), str(source)], check=True, timeout=300)
    (wheel,) = wheels.iterdir()
    subprocess.run(
        [*pip, "install", *offline, "--ignore-installed", "--prefix", str(home), str(wheel)], check=True, timeout=300
    )
    (packages,) = home.glob("lib/python*/site-packages")
    assert (packages / "launch" / "py.typed").is_file(), "type checkers read the annotations of an installation"
    code = "from launch.slurm.template import folder, read_template; print(folder(), len(read_template('finetune')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(packages)}, capture_output=True, text=True
    )
    assert done.stdout.split() == [f"{home}/share/fovea/SLURM", str(len(read_template("finetune")))], done.stderr


def test_settings_and_lines_of_the_site_are_quoted_for_the_shell():
    script = render(TEMPLATE, options={}, settings={"PYTHON": ["/my env/python", "a'b"]}, environment=["export A=1"])
    done = subprocess.run(["bash", "-c", script + 'printf "%s|" "${PYTHON[@]}" "$A"'], capture_output=True, text=True)
    assert done.stdout == "/my env/python|a'b|1|"


@pytest.mark.parametrize("place", ["options", "settings"])
def test_a_value_cannot_end_its_line_and_begin_a_command(place: str):
    given = {"options": {"output": "a"}, "settings": {"PYTHON": ["python"]}}
    given[place] = {"output": "a\ntouch b"} if place == "options" else {"PYTHON": ["python", "a\ntouch b"]}
    with pytest.raises(ValueError, match=r"control character in 'a\\ntouch b'; remove it"):
        render(TEMPLATE, **given)


def test_a_template_without_the_setting_is_refused():
    with pytest.raises(ValueError, match="no line MARGIN="):
        render(TEMPLATE, options={}, settings={"MARGIN": "3"})


def test_pretraining_and_finetuning_have_the_same_batch_script():
    first, second = (read_template(name).splitlines() for name in ("pretrain", "finetune"))
    different = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert all(a.startswith("#") or a == "PROGRAM=pretrain" for a, _ in different) and len(different) <= 7


def test_every_batch_script_is_bash():
    for path in folder().iterdir():
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ["--container", "fovea.sif", "--mount", "/data"],
            ["CONTAINER=(apptainer exec --nv --bind {here},{run},/data fovea.sif)", "PYTHON=(python)"],
        ),
        (
            ["--container", "org/fovea:1", "--mount", "/data", "--mount", "/a:/b"],
            [
                "SRUN=(srun --container-image=org/fovea:1 "
                "--container-mounts={here}:{here},{run}:{run},/data:/data,/a:/b --container-workdir={here})"
            ],
        ),
        (["--gpus-per-node", "h200:4"], ["#SBATCH --gpus-per-node=h200:4", "#SBATCH --ntasks-per-node=4"]),
        (["--sbatch", "comment=two words"], ["#SBATCH --comment='two words'"]),
        (["--margin", "120"], ["MARGIN=120", "#SBATCH --signal=B:USR1@120"]),
        (["--launcher", "torchrun", "--no-preflight"], ["LAUNCHER=torchrun", "PREFLIGHT=no"]),
        (
            ["--sbatch", "constraint=h200", "--account", "vision"],
            ["#SBATCH --constraint=h200", "#SBATCH --account=vision"],
        ),
    ],
)
def test_the_requested_options_are_in_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], lines: list[str]
):
    config = write_config(tmp_path, "mae")
    assert main(["pretrain", str(config), "--nodes", "2", "--gpus-per-node", "4", *flags, "--dry-run"]) == 0
    script = capsys.readouterr().out.splitlines()
    assert {line.format(here=Path.cwd(), run=tmp_path / "run") for line in lines} <= set(script)
    assert {f"#SBATCH --chdir={Path.cwd()}", "#SBATCH --ntasks-per-node=4"} <= set(script)
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_job_finds_fovea_in_a_checkout_that_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_config(tmp_path, "mae")
    shape = ["--nodes", "1", "--gpus-per-node", "1", "--dry-run"]
    assert main(["pretrain", str(config), *shape]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "PYTHONPATH" in line]
    for before, after in (("", f"{ROOT}"), ("/mine", f"{ROOT}:/mine")):
        done = subprocess.run(
            ["bash", "-c", f"{line}\necho $PYTHONPATH"],
            env={"PYTHONPATH": before},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == after
    assert main(["pretrain", str(config), *shape, "--container", "fovea.sif"]) == 0
    assert "PYTHONPATH" not in capsys.readouterr().out, "the container has its own"


def test_a_run_folder_may_have_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, name = write_config(tmp_path, "mae"), "it's 50%,#1"
    assert main(["pretrain", str(config), f"run_dir={tmp_path}/{name}", "--ranks-per-node", "1", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert read_options(script)["output"] == f"{tmp_path}/it's 50%%,#1/slurm/job-%j.log", "as SLURM fills it in"


def test_a_pipeline_takes_one_s_own_batch_script_for_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own, config, task = tmp_path / "own.sbatch", write_config(tmp_path, "mae"), tmp_path / "task.yaml"
    own.write_text(read_template("pretrain").replace("#SBATCH --nodes=2", "#SBATCH --nodes 1 # mine"))
    task.write_text(
        f"run_dir: {tmp_path / 'task'}\ntask: {{name: classification}}\nmodel: {{release: later}}\n"
        "data: {train: {images: samples/grocery/train}, val: {images: samples/grocery/val}}\n"
        "optim: {lr: 1e-3, global_batch_size: 16, total_steps: 20}\n"
    )
    given = ["--finetune", str(task), "--template", str(own), "--ranks-per-node", "2", "--dry-run"]
    assert main(["pipeline", str(config), *given]) == 0
    script = capsys.readouterr().out.splitlines()
    assert script.count("#SBATCH --nodes 1 # mine") == 2
    assert [line for line in script if line.startswith("PROGRAM=")] == ["PROGRAM=pretrain", "PROGRAM=finetune"]
    (second,) = [line for line in script if line.startswith("# sbatch --parsable --dependency")]
    assert second.endswith(f" model.release={tmp_path}/run/release")
    assert main(["pipeline", str(config), f"run_dir={tmp_path}/task", *given]) == 2
    assert "two stages share a run folder" in capsys.readouterr().err


def test_a_run_is_resumed_from_any_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write_config(tmp_path, "mae")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "run.yaml", "--ranks-per-node", "1", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    slurm = tmp_path / "run" / "slurm"
    slurm.mkdir(parents=True)
    (slurm / "7.sbatch").write_text(shown[shown.index("#!/bin/bash") :])
    add_row(slurm / "jobs.jsonl", {"job": "7", "program": "pretrain", "arguments": ["run.yaml"], "time": ""})
    monkeypatch.chdir("/")
    assert main(["resume", str(tmp_path / "run"), "--nodes", "4", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert read_options(script)["chdir"] == str(tmp_path) and read_options(script)["nodes"] == "4"


@pytest.mark.parametrize(
    ("flags", "said"), [(["--nodes", "2-4"], "--nodes 2-4: expected one number"), ([], "--nodes is not in the batch")]
)
def test_a_job_without_a_number_of_ranks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
):
    own = tmp_path / "own.sbatch"
    own.write_text(read_template("pretrain").replace("#SBATCH --nodes=2", "#SBATCH -N 2"))
    assert main(["pretrain", str(write_config(tmp_path, "mae")), "--template", str(own), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_configuration_is_refused_before_it_is_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_config(tmp_path, "mae")
    assert main(["pretrain", str(config), "--nodes", "3", "--gpus-per-node", "1"]) == 2
    assert "nearest: 15" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2 and "no run folder with SLURM jobs" in capsys.readouterr().err
    assert main(["preempt"]) == 2
    assert (ROOT / "SLURM").is_dir()
