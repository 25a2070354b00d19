"""An image that makes the network return nan: captured, recomputed, skipped, as if it had never been in the data."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import run as run_module
from pretrain.engine.config import EngineConfig
from pretrain.engine.session.preempt import EXIT_PREEMPTED, STOP
from pretrain.nonfinite import capture
from pretrain.nonfinite.recovery import RewindError
from pretrain.nonfinite.rewinds import FILE
from tests.planted import ONE_COLOUR, write_shards
from tests.runs import finish, hashes, kill_all, losses, start, wait_until, write_config

pytestmark = pytest.mark.processes

PLANTED = ("tests.planted", "pretrain")
STEPS = 12  # two epochs
OPTIONS = [
    *("optim.global_batch_size=8", f"optim.total_steps={STEPS}", "checkpoint.every_steps=2"),
    *("data.num_workers=0", "log.pictures_every_steps=0", "log.tensorboard=false"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def captures(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "captures").glob("step-*"))


def test_a_run_that_rewinds_ends_as_one_that_passed_the_sample_over_from_the_start(tmp_path: Path, shards: Path):
    """Two ranks, the sample comes once in each of two epochs, the run is killed after the first capture."""
    config = write_config(tmp_path, "mae")
    options = [*OPTIONS, f"data.shards={shards}", "engine.max_nonfinite_steps=1"]
    rewound, clean = tmp_path / "rewound", tmp_path / "clean"
    process = start(config, f"run_dir={rewound}", *options, processes=2, command=PLANTED)
    try:
        wait_until(lambda: bool(captures(rewound)), process)
    finally:
        kill_all(process)
    status, said = finish(config, f"run_dir={rewound}", *options, processes=2, command=PLANTED)
    assert status == 0, said

    found = [capture.read(folder) for folder in captures(rewound)]
    assert len(found) == 2
    for captured in found:
        (culprit,) = captured.culprits
        (part,) = [part for part in captured.parts if part.culprits]
        assert part.samples[part.positions.index(culprit)].endswith(f"/{ONE_COLOUR}")
        assert not part.loss_finite
        assert captured.world_size == 2 and len(captured.parts) == 2
        assert captured.weights_bytes == (captures(rewound)[0] / "model.safetensors").stat().st_size
    listed = json.loads((rewound / FILE).read_text())["rewinds"]
    assert [rewind["positions"] for rewind in listed] == [list(captured.culprits) for captured in found]
    assert all(rewind["to"] <= captured.step for rewind, captured in zip(listed, found, strict=True))

    clean.mkdir()
    shutil.copy(rewound / FILE, clean / FILE)
    status, said = finish(config, f"run_dir={clean}", *options, processes=2, command=PLANTED)
    assert status == 0, said
    assert not captures(clean)
    assert hashes(rewound, STEPS) == hashes(clean, STEPS)
    assert losses(rewound) == losses(clean)
    bad = [json.loads(line) for path in clean.glob("bad_samples.*") for line in path.read_text().splitlines()]
    assert {record["key"] for record in bad} == {ONE_COLOUR} and all(record["passed_over"] for record in bad)


def test_a_capture_is_computed_again_and_named_to_the_module(tmp_path: Path, shards: Path):
    """A few such steps are skipped and the run continues. A replay on the healthy network reports no reproduction."""
    config = write_config(tmp_path, "mae")
    options = [*OPTIONS, f"data.shards={shards}", "engine.accumulation_steps=2", "engine.precision=bf16"]
    status, said = finish(config, *options, command=PLANTED)
    assert status == 0, said
    assert "fovea replay" in said
    first, second = captures(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == STEPS - 2

    status, said = finish(first, command=("tests.planted", "replay"))
    assert status == 0, said
    assert f"/{ONE_COLOUR} at position" in said
    assert "module     encoder.blocks.0 (Block)\n" in said
    assert said.endswith("reproduced\n") and "in fp32" in said

    status, said = finish(second, command=("fovea", "replay"))
    assert status == 1, said
    assert "not reproduced" in said


def test_a_run_that_rewound_too_often_stops_and_says_so(tmp_path: Path, shards: Path):
    config = write_config(tmp_path, "mae")
    options = [*OPTIONS, f"data.shards={shards}", "engine.max_nonfinite_steps=1", "engine.max_rewinds=0"]
    status, said = finish(config, *options, "engine.capture_weights=false", command=PLANTED)
    assert status == 1
    assert "no more rewinds after 0 (engine.max_rewinds)" in said
    (folder,) = captures(tmp_path / "run")
    assert [path.name for path in folder.iterdir()] == [capture.FILE]


def test_a_signal_that_comes_while_the_run_goes_back_still_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    starts = []

    class GoesBack:
        def __init__(self, *_: Any, watch: Any):
            starts.append(self)
            self.watch = watch()

        def train(self) -> int:
            if len(starts) == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # after the poll of the step that is taken back
                raise RewindError
            return EXIT_PREEMPTED if self.watch.poll() & STOP else 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run_module, "PretrainRun", GoesBack)
    engine = EngineConfig.model_validate({"device": "cpu", "watch": {"enabled": False}})
    config: Any = SimpleNamespace(run_dir=str(tmp_path), engine=engine)
    nothing: Any = None
    assert run_module.run(config, nothing, nothing) == EXIT_PREEMPTED and len(starts) == 2
    assert signal.getsignal(signal.SIGTERM) == before
