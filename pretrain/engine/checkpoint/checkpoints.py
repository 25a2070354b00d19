"""Checkpoints of a run, as collective operations of all ranks: save, verify, find the newest complete one."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core import distributed
from pretrain.core.machine.failures import EXIT_FAILED, Failure, failure_of
from pretrain.engine.checkpoint import commit
from pretrain.engine.checkpoint.commit import CheckpointError, DamagedError, FileRecord, Manifest
from pretrain.engine.config import CheckpointConfig
from pretrain.engine.protocol import Engine


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose files are all intact.

    Attributes:
        about: the value that was passed to `save`.
        skipped: newer folders that are damaged, each with the reason.
    """

    folder: Path
    step: int
    about: Mapping[str, Any]
    skipped: tuple[str, ...] = ()

    def greeting(self) -> list[str]:
        """Log lines for the run that resumes from it."""
        return [*(f"damaged, not used: {reason}" for reason in self.skipped), f"resumed from {self.folder}"]


class Checkpoints:
    """The checkpoints of one run, in `root` on a shared file system. All methods are collective.

    Args:
        keep_last: number of newest ones to keep. milestone_every: keep multiples of this step permanently (0: none).

    Attributes:
        protected: step of the newest healthy checkpoint, the target of a rewind; it is never pruned.
    """

    def __init__(self, root: Path, *, keep_last: int = 3, milestone_every: int = 0):
        if keep_last < 1:
            raise ValueError(f"keep_last {keep_last}: keep at least 1 checkpoint")
        self.root, self._keep_last, self._milestone_every = root, keep_last, milestone_every
        self.protected: int | None = None

    @classmethod
    def of_run(cls, run_dir: Path, config: CheckpointConfig) -> Checkpoints:
        """The checkpoints of the run in `run_dir`, opened under its lease; incomplete folders are removed."""
        milestones = config.milestone_every_steps or 0
        found = cls(run_dir / "checkpoints", keep_last=config.keep, milestone_every=milestones)
        if distributed.rank() == 0:
            commit.clean(found.root)
        distributed.barrier()
        return found

    def save(self, engine: Engine, step: int, about: Mapping[str, Any]) -> Path:
        """Commit the state at `step`; when this returns on any rank, the complete checkpoint is on disk.

        Args:
            about: JSON that `find_latest` returns (data cursor, config, versions). "healthy": false: the run must not
                rewind to this checkpoint.

        Raises:
            CheckpointError: on every rank, if any rank could not write; earlier checkpoints are unchanged.
        """
        if about.get("healthy", True):
            self.protected = step
        final = commit.step_folder(self.root, step)
        if distributed.broadcast_object(final.exists()):
            return self._keep_or_replace(engine, step, about, final)
        return self._commit(engine, step, about, final)

    def _commit(self, engine: Engine, step: int, about: Mapping[str, Any], final: Path) -> Path:
        temp, problem = self._on_rank_0(lambda: commit.begin(self.root, step, secrets.token_hex(4)))
        self._raise_if(problem, final, None)
        assert temp is not None
        records: list[FileRecord] = []
        mine = None
        try:
            records = engine.save(temp)
        except (OSError, RuntimeError, ValueError) as error:
            mine = _problem(error)
        everyone = distributed.all_gather_object((records, mine))
        problems = [problem for _, problem in everyone if problem]
        text = "; ".join(problem.text for problem in problems)
        self._raise_if(Failure(text, problems[0].status) if problems else None, final, temp)
        files = [record for written, _ in everyone for record in written]
        _, problem = self._on_rank_0(lambda: commit.seal(temp, final, step=step, files=files, about=about))
        self._raise_if(problem, final, temp)
        self._prune(final, step)
        return final

    def _keep_or_replace(self, engine: Engine, step: int, about: Mapping[str, Any], final: Path) -> Path:
        """The folder of this step exists: keep it if it verifies, else replace it."""
        try:
            self.verify(final)
            return final
        except DamagedError:
            trash = self.root / f".trash-{final.name}-{secrets.token_hex(4)}"
            _, problem = self._on_rank_0(lambda: final.rename(trash))
            self._raise_if(problem, final, None)
        return self._commit(engine, step, about, final)

    def find_latest(self) -> VerifiedCheckpoint | None:
        """The newest checkpoint that verifies, the same on all ranks; None when there is none.

        Also sets `protected`.

        Raises:
            CheckpointError: all existing checkpoints are damaged; a restart from step 0 would hide that.
        """
        folders = distributed.broadcast_object(commit.checkpoints(self.root))
        skipped: list[str] = []
        for folder in folders:
            try:
                manifest = self.verify(folder)
            except DamagedError as damage:
                skipped.append(str(damage))
                continue
            self.protected = manifest.step if manifest.is_healthy else self.newest_healthy()
            return VerifiedCheckpoint(folder, manifest.step, manifest.about, tuple(skipped))
        if skipped:
            listed = "\n  ".join(skipped)
            raise CheckpointError(f"no checkpoint is complete:\n  {listed}\nrestore one, or move them all elsewhere")
        return None

    def newest_healthy(self, *, until: int | None = None) -> int | None:
        """Step of the newest checkpoint that verifies and was healthy when it was saved.

        Args:
            until: the newest one up to this step; if there is none, the oldest one after it.
        """
        found = None
        for folder in commit.checkpoints(self.root) if distributed.rank() == 0 else ():
            try:
                if commit.read_manifest(folder).is_healthy:
                    found = commit.verify(folder).step
            except CheckpointError:
                continue
            if found is not None and (until is None or found <= until):
                break
        return distributed.broadcast_object(found)

    def newest_until(self, step: int) -> Path | None:
        """The folder of the newest checkpoint up to `step`, not verified."""
        folders = commit.checkpoints(self.root)
        return next((folder for folder in folders if commit.step_of(folder) <= step), None)

    def remove_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        if distributed.rank() == 0:
            commit.remove_after(self.root, step)
        distributed.barrier()

    def verify(self, folder: Path) -> Manifest:
        """Read all files in `folder`, shared among ranks. Raises DamagedError on all ranks."""
        manifest, problem = None, None
        try:
            manifest = commit.read_manifest(folder)
            commit.verify_files(folder, _share(manifest.files))
        except DamagedError as damage:
            problem = damage.reason
        problems = [reason for reason in distributed.all_gather_object(problem) if reason]
        if problems:
            raise DamagedError(folder, problems[0])
        assert manifest is not None
        return manifest

    def _prune(self, newest: Path, step: int) -> None:
        # Delete old checkpoints only after the new one has been verified.
        self.verify(newest)

        def make_room() -> None:
            commit.prune(
                self.root,
                newest=step,
                keep_last=self._keep_last,
                milestone_every=self._milestone_every,
                protected=self.protected,
            )
            commit.point_latest(self.root, newest)

        _, problem = self._on_rank_0(make_room)
        if problem:
            text = f"wrote {newest}, but the cleanup of {self.root} failed: {problem.text}"
            raise CheckpointError(text, status=problem.status)

    def _on_rank_0(self, action: Any) -> tuple[Any, Failure | None]:
        result, problem = None, None
        if distributed.rank() == 0:
            try:
                result = action()
            except OSError as error:
                problem = _problem(error)
        return distributed.broadcast_object((result, problem))

    def _raise_if(self, problem: Failure | None, final: Path, temp: Path | None) -> None:
        if not problem:
            return
        distributed.barrier()  # no rank writes into it any more
        if temp is not None and distributed.rank() == 0:
            shutil.rmtree(temp, ignore_errors=True)
        text = f"could not write {final}: {problem.text}; earlier checkpoints are unchanged"
        raise CheckpointError(text, status=problem.status)


def _problem(error: Exception) -> Failure:
    """What this rank could not write, with the exit status of its kind."""
    known = failure_of(error)
    return Failure(f"rank {distributed.rank()}: {error}", known.status if known else EXIT_FAILED)


def _share(files: Sequence[FileRecord]) -> list[FileRecord]:
    """The files that this rank verifies: balanced by bytes, largest first."""
    load = [0] * distributed.world_size()
    mine: list[FileRecord] = []
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        rank = load.index(min(load))
        load[rank] += file.size
        if rank == distributed.rank():
            mine.append(file)
    return mine
