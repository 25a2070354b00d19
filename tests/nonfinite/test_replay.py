"""What a replay needs is found from whichever folder it is started in."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain.config import PretrainConfig
from pretrain.core.configlib import dump, load_config
from pretrain.core.files import write_json
from pretrain.nonfinite import capture
from pretrain.nonfinite.capture import Capture
from pretrain.nonfinite.replay import main
from tests.runs import SHARDS, write_config

CAPTURED = Capture(1, 0, 1, 16, 1, "fp32", 1.0, "loss", {}, (), "0", "f" * 64, None, None, 0)


def test_relative_paths_of_a_run_are_those_of_the_folder_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run, here = tmp_path / "start" / "run", tmp_path / "here"
    (folder := run / "captures" / "step-00000002").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    config = load_config(PretrainConfig, write_config(tmp_path, "mae"), ["data.shards=shards/train", "run_dir=run"])
    (run / "config.yaml").write_text(dump(config))
    (run.parent / "shards").symlink_to(SHARDS)
    write_json(folder / capture.FILE, asdict(CAPTURED))
    (run / "environment.jsonl").write_text(json.dumps({"folder": str(run.parent)}) + "\n")
    assert main([str(folder)]) == 2
    assert "data.shards: the data differ from those of the run" in capsys.readouterr().err
    (here / "shards").mkdir()
    assert main([str(folder), "data.shards=shards"]) == 2
    assert "no *.tar in folder shards" in capsys.readouterr().err  # what is typed is of the current folder
