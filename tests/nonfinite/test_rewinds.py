"""The list of rewinds: completed after a kill, and positions skipped more than once."""

from __future__ import annotations

from pathlib import Path

from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.nonfinite import NonFiniteSteps
from pretrain.nonfinite.rewinds import SkippedPositions


def make_checkpoints(run_dir: Path, *steps: int) -> list[str]:
    for step in steps:
        (run_dir / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return checkpoints(run_dir)


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_rewind_that_was_cut_short_is_completed_at_the_next_start(tmp_path: Path):
    make_checkpoints(tmp_path, 4, 8, 12)
    SkippedPositions(tmp_path).decide(13, 4, [7, 3])
    assert len(checkpoints(tmp_path)) == 3  # killed here

    after = SkippedPositions(tmp_path)
    assert after.counts == {3: 1, 7: 1}
    last = after.complete(Checkpoints(tmp_path / "checkpoints"))
    assert last is not None and (last.at, last.to) == (13, 4)
    assert checkpoints(tmp_path) == ["step-00000004"]

    make_checkpoints(tmp_path, 8)  # of the run that went on
    assert SkippedPositions(tmp_path).complete(Checkpoints(tmp_path / "checkpoints")) is None
    assert len(checkpoints(tmp_path)) == 2


def test_a_position_named_again_leaves_its_first_substitute_too(tmp_path: Path):
    listed = SkippedPositions(tmp_path)
    assert listed.counts == {}
    listed.decide(3, 0, [5])
    listed.decide(9, 0, [5, 6])
    assert SkippedPositions(tmp_path).counts == {5: 2, 6: 1}


def test_steps_count_within_a_window_that_ends_at_the_last():
    steps = NonFiniteSteps(most=3, window=10)
    assert [steps.add(step) for step in (1, 5, 11, 14, 15)] == [False, False, False, True, True]
    assert steps.recent == [11, 14, 15]
    assert steps.after(14) and not steps.after(15)
