"""A run whose checkpoints are gone is refused, never started again at step 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.engine.checkpoint.commit import CheckpointError
from pretrain.engine.session.lost_checkpoints import check_not_started


@pytest.mark.parametrize("trace", ["DONE", "PREEMPTED", "metrics.jsonl"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again_at_step_0(tmp_path: Path, trace: str):
    check_not_started(tmp_path)
    (tmp_path / "config.yaml").write_text("checkpoint: {every_steps: 4}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    check_not_started(tmp_path)  # killed before its first checkpoint was complete
    (tmp_path / trace).write_text('{"step": 5}\n')
    with pytest.raises(CheckpointError, match=rf"no checkpoint in .*{trace}.* Restore the checkpoints, or choose"):
        check_not_started(tmp_path)
    if trace == "metrics.jsonl":
        check_not_started(tmp_path, rewound_to_start=True)
