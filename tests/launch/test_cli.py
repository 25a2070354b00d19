"""The `fovea` command chooses, and refuses by name."""

from __future__ import annotations

import pytest

from launch.cli import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"fovea {command}" in said for command in COMMANDS)


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]):
    assert main(["pretrian"]) == 2
    assert "unknown command 'pretrian'; one of data, pretrain" in capsys.readouterr().err


def test_an_interruption_before_anything_runs_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "probe", interrupted)
    assert main(["probe"]) == 130
    assert capsys.readouterr().err == "fovea probe: interrupted\n"


def test_a_home_after_an_option_is_expanded(monkeypatch: pytest.MonkeyPatch):
    given: list[str] = []
    monkeypatch.setitem(COMMANDS, "predict", lambda arguments: given.extend(arguments) or 0)
    monkeypatch.setenv("HOME", "/home/me")
    assert main(["predict", "--out=~/x y", "a~/b", "--ids=~"]) == 0
    assert given == ["--out=/home/me/x y", "a~/b", "--ids=~"]


def test_finetune_refuses_a_missing_configuration(capsys: pytest.CaptureFixture[str]):
    assert main(["finetune", "x.yaml"]) == 2
    assert "x.yaml: 1 problem\n  no such file" in capsys.readouterr().err


def test_check_prints_what_would_run_and_runs_nothing(capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", "configs/debug/mae.yaml", "--check", "optim.global_batch_size=32"]) == 0
    assert main(["pretrain", "configs/debug/mae.yaml", "--check", "init.official=none.pth"]) == 2
    said = capsys.readouterr().out
    assert "960 images, 30 steps an epoch" in said and "batch      32 = 1 processes x 32 x 1 accumulation" in said


def test_a_release_of_no_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path):
    assert main(["release", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_an_unknown_word_of_slurm_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]):
    assert main(["launch", "slurm", "statsu"]) == 2
    assert "unknown word 'statsu'; one of pretrain, finetune, pipeline, status" in capsys.readouterr().err


def test_launching_checks_for_the_number_of_processes(capsys: pytest.CaptureFixture[str]):
    assert main(["launch", "local", "7", "configs/debug/mae.yaml"]) == 2
    assert "64 is not a multiple of 7 processes x 1 accumulation steps; nearest: 63" in capsys.readouterr().err
