"""A fine-tuning run, from its configuration to its report and release: builds its parts in order, then calls `fit`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from finetune import channels, results
from finetune.config import FinetuneConfig
from finetune.data.examples import Examples
from finetune.evaluate import Evaluation, EvaluationError, evaluate
from finetune.loader import FinetuneLoader, reading_of
from finetune.release import TASK, described, open_task, write_release
from finetune.tasks import task_class
from finetune.tasks.base import Task
from finetune.weights import OpenedBackbone, open_source
from pretrain.core import distributed
from pretrain.core.configlib import ConfigError
from pretrain.core.distributed import World
from pretrain.core.files import write_json, write_text
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.core.record import git_commit, versions
from pretrain.core.text import shown
from pretrain.data.sampling.bad_samples import TooManyBadSamplesError
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.engine.build import build_engine
from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.loop import every, fit
from pretrain.engine.nonfinite import NonFiniteSteps
from pretrain.engine.plan import Plan
from pretrain.engine.protocol import StepResult
from pretrain.engine.session import preempt
from pretrain.engine.session.folder import check_same_run, read_data, write_records
from pretrain.engine.session.log import open_log
from pretrain.engine.session.lost_checkpoints import check_not_started
from pretrain.engine.session.needs import check_machines, checkpoint_bytes
from pretrain.engine.session.pace import Pace
from pretrain.engine.session.session import session
from pretrain.models.release.manifest import NotFiniteError

PATHS = ("images", "annotations", "masks", "depth", "classes")
# What may change when a run resumes. The data may have moved, but its fingerprint must be the same.
FREE_KEYS = (
    *("run_dir", "engine", "checkpoint", "log", "evaluate"),
    *("data.num_workers", "data.prefetch", "data.strict", "data.max_bad_fraction"),
    *(f"data.{name}.{key}" for name in ("train", "val") for key in PATHS),
    *("model.activation_checkpointing",),
)
_FINDINGS_SHOWN = 5
_PROGRESS_SECONDS = 30.0


def run(config: FinetuneConfig, train: Examples, val: Examples, steps: Plan) -> int:
    """Train until done or requested to stop, from the newest checkpoint if there is one; the process's exit status.

    Raises:
        RunError: the run cannot continue.
    """

    def body(world: World) -> int:
        with ExitStack() as stack:
            return FinetuneRun(config, train, val, steps, world, stack).train()

    return session(
        config.run_dir, config.engine, body, failures=(TooManyBadSamplesError, EvaluationError, NotFiniteError)
    )


def measure(config: FinetuneConfig, val: Examples) -> int:
    """Evaluate the run's newest weights on `data.val`, and write the results; the process's exit status."""

    def body(world: World) -> int:
        folder = Path(config.run_dir)
        try:
            task, record = open_task(folder)
        except ValueError as error:
            raise ConfigError(config.run_dir, str(error).splitlines()) from error
        if tuple(task.classes) != tuple(val.classes):
            names = f"{len(val.classes)} classes, the run has {len(task.classes)}"
            raise ConfigError(config.run_dir, [f"data.val: other classes ({names}): {_difference(task, val)}"])
        now = channels.reading(config)
        for key, trained, given in (
            ("orientation", recorded_orientation(record), now.of_photos),
            ("range", recorded_range(record), now.value_range),
        ):
            if trained != given:
                problem = f"data.{key}: the run was trained with {trained}, now {given}; undo the change"
                raise ConfigError(config.run_dir, [problem])
        task.to(world.device)
        step = record.get("metrics", {}).get("step", 0)
        evaluation = _evaluate(config, task, val, world, say=None)
        if world.rank == 0:
            print("\n".join(results.lines(evaluation, step=step)))
            results.write_results(folder, evaluation, step=step, source=record["source"])
        return 0

    return session(config.run_dir, config.engine, body, failures=(EvaluationError,))


class FinetuneRun:
    """The parts of one run on one rank."""

    def __init__(
        self, config: FinetuneConfig, train: Examples, val: Examples, steps: Plan, world: World, stack: ExitStack
    ):
        self.config, self.train_set, self.val_set, self.steps, self.world = config, train, val, steps, world
        self.folder, self.first = Path(config.run_dir), world.rank == 0
        self.checkpoints = Checkpoints.of_run(self.folder, config.checkpoint)
        found = self.checkpoints.find_latest()
        self.fingerprints = {"data.train": train.fingerprint, "data.val": val.fingerprint}
        if found is not None:
            check_same_run(self.folder, config, self.fingerprints, free=FREE_KEYS)
        else:
            check_not_started(self.folder)
        self.opened, self.task = build_task(config, train, total_steps=steps.total_steps)
        size = checkpoint_bytes(self.task, config.optim)
        self.engine = build_engine(
            self.task, optim=config.optim, config=config.engine, plan=steps, world=world, seed=config.seed
        )
        greeting = [f"from {self.opened.title}", *self.opened.report_lines]
        if found is not None:
            self.engine.load(found.folder)
            greeting = found.greeting()
        self.start_step = self.engine.step_count
        if self.first:
            self._write_records()
        self.log = open_log(
            self.folder,
            config.log,
            rank=world.rank,
            start_step=self.start_step,
            total_steps=steps.total_steps,
            stack=stack,
        )
        for line in [*greeting, *self._findings(_FINDINGS_SHOWN)]:
            self.say(line)
        reading = reading_of(config, self.task, train, steps)
        check_machines(config, reading, steps.total_steps, size, self.say)
        self.watch = preempt.Watch(self.folder, rank=world.rank)
        stack.callback(self.watch.close)
        give_up = self.watch.gives_up_waiting
        self.loader = FinetuneLoader(
            config, steps, self.task, train, world, start_step=self.start_step, say=self.say, give_up=give_up
        )
        stack.callback(self.loader.close)
        self.evaluate_every = config.evaluate.period(steps.steps_per_epoch)
        self.pace = Pace(global_batch=config.optim.global_batch_size, start_step=self.start_step)

    def train(self) -> int:
        """Fit, evaluate, report, release; the exit status."""
        total = self.steps.total_steps
        if self.start_step >= total and (self.folder / "DONE").exists():
            self.say(f"all {total} steps are done; the report is {self.folder / results.REPORT / 'index.html'}")
            preempt.mark_again(self.folder, rank=self.world.rank)
            return 0
        distributed.barrier()
        if self.first:
            preempt.unmark(self.folder)
        try:
            return self._fit_and_finish()
        except StoppedWaitingError:  # of all ranks, while they evaluated
            self._save(self.engine.step_count)
            return self._preempted()

    def _fit_and_finish(self) -> int:
        config, total = self.config, self.steps.total_steps
        middle = 0 < self.start_step < total
        if middle and every(self.start_step, self.evaluate_every, total) and not self._is_evaluated():
            self._probe(self.start_step)  # the run was killed between its checkpoint and its evaluation
        reached = fit(
            self.engine,
            self.task,
            iter(self.loader),
            total_steps=total,
            log=self._log,
            save=self._save,
            requests=self.watch.poll,
            probe=self._probe,
            log_every=config.log.every_steps,
            save_every=config.checkpoint.every_steps,
            probe_every=self.evaluate_every,
            non_finite=NonFiniteSteps(most=config.engine.max_nonfinite_steps, window=config.engine.nonfinite_window),
            replicas_every=config.engine.watch.replicas_every_steps,
            say=self.say,
        )
        if reached < total:
            return self._preempted()
        self.loader.close()
        with self.engine.evaluating():
            self._finish(self._measure(total))
        distributed.barrier()
        return 0

    def _preempted(self) -> int:
        step, total = self.engine.step_count, self.steps.total_steps
        self.say(f"stopped at step {step} of {total} ({self.watch.reason}); the same command resumes")
        if self.first:
            preempt.mark(self.folder, "PREEMPTED", f"step {step}")
        return preempt.EXIT_PREEMPTED

    def say(self, message: str) -> None:
        """Print on rank 0; other ranks print only what rank 0 cannot see."""
        if self.log is not None:
            self.log.say(message)
        elif not self.first:
            print(f"rank {self.world.rank}: {shown(message)}", file=sys.stderr, flush=True)

    def _write_records(self) -> None:
        sets = {"train": self.train_set, "val": self.val_set}
        data = {
            f"data.{name}": {
                "fingerprint": examples.fingerprint,
                "num_samples": len(examples),
                "images": getattr(self.config.data, name).images,
                "findings": dict(examples.findings.counts()),
            }
            for name, examples in sets.items()
        }
        write_records(self.folder, self.config, data, world_size=self.world.world_size, device=self.world.device_name)
        write_json(self.folder / TASK, {**described(self.task, source=self._source), **self._images})
        rows = [{"set": name, **row} for name, examples in sets.items() for row in examples.findings.rows()]
        write_text(self.folder / "findings.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    @property
    def _source(self) -> dict[str, Any]:
        return {"title": self.opened.title, **self.opened.source}

    @property
    def _images(self) -> dict[str, Any]:
        """How images are read, computed and shown, for records."""
        how = channels.reading(self.config)
        shown = {"picture_channels": self.config.evaluate.picture_channels, "precision": self.config.evaluate.precision}
        names = self.config.data.channels
        return {"orientation": how.of_photos, "range": how.value_range, "channels": names, **shown}

    def _findings(self, limit: int) -> list[str]:
        found = []
        for name, examples in (("data.train", self.train_set), ("data.val", self.val_set)):
            if len(examples.findings):
                kinds = ", ".join(f"{count} x {kind}" for kind, count in examples.findings.counts().items())
                found.append(f"{name}: {kinds}; all are listed in findings.jsonl (data.strict=true refuses them)")
                found += [f"  {line}" for line in examples.findings.lines(limit)]
        return found

    def _log(self, step: int, result: StepResult) -> None:
        if result.skipped and not result.overflow and self.first:
            what = f"loss was not finite on ranks {list(result.bad_ranks)}" if result.bad_ranks else "gradient was not"
            self.say(f"step {step}: {what} ({result.first_bad}); the step was skipped on all ranks")
        if self.log is None:
            return
        fixed = {"lr": result.lr, "weight_decay": result.weight_decay, "bad_samples": float(self.loader.bad.num_bad)}
        trained = {} if result.skipped else {**result.losses, "grad_norm": result.grad_norm}
        self.log.scalars(step, {**trained, **fixed, **self.pace.rates(step, self.loader.waited)})

    def _save(self, step: int) -> None:
        about = {
            "samples_consumed": step * self.config.optim.global_batch_size,
            "fingerprints": self.fingerprints,
            "world_size": self.world.world_size,
            "versions": versions(),
        }
        folder = self.checkpoints.save(self.engine, step, about)
        if self.log is not None and step < self.steps.total_steps:
            self.log.say(f"saved {folder}")

    def _is_evaluated(self) -> bool:
        """Whether the log has an evaluation of the step from which the run resumes."""
        row = self.log.row(self.start_step) if self.log is not None else {}
        return distributed.broadcast_object(any(name.startswith("val/") for name in row))

    def _probe(self, step: int) -> None:
        if step < self.steps.total_steps:
            with self.engine.evaluating():
                self._measure(step)

    def _measure(self, step: int) -> Evaluation:
        evaluation = _evaluate(
            self.config,
            self.task,
            self.val_set,
            self.world,
            say=self.say if self.first else None,
            give_up=self.watch.gives_up_waiting,
        )
        if self.log is not None:
            self.log.scalars(step, {f"val/{name}": value for name, value in evaluation.scores.values.items()})
            for line in results.lines(evaluation, step=step):
                self.log.say(line)
            results.write_results(self.folder, evaluation, step=step, source=self._source)
        return evaluation

    def _finish(self, evaluation: Evaluation) -> None:
        """Rank 0 draws the report and writes the release."""
        if self.log is None:
            return
        total = self.steps.total_steps
        pictures = results.report(
            self.folder,
            evaluation,
            self.task,
            self.val_set,
            config=self.config,
            title=self.opened.title,
            rows=self.log.rows(),
            findings={
                "data.train": self.train_set.findings.lines(),
                "data.val": self.val_set.findings.lines(),
            },
            match=self.opened.report_lines,
        )
        self.log.pictures(total, pictures)
        release = write_release(
            self.folder / "release",
            self.task,
            {
                "source": self._source,
                **self._images,
                "recipe": self.config.model_dump(mode="json"),
                "data": read_data(self.folder),
                "metrics": results.record(evaluation, step=total),
                "commit": git_commit(),
                "versions": versions(),
            },
        )
        self.say(f"report {self.folder / results.REPORT / 'index.html'}; release {release}: fovea predict {release}")
        preempt.mark(self.folder, "DONE", f"step {total}")


def build_task(config: FinetuneConfig, train: Examples, *, total_steps: int) -> tuple[OpenedBackbone, Task]:
    """The backbone and the task on it, ready to train: equal on every rank, new parameters drawn from the seed.

    Raises:
        ConfigError: the weights do not fit, or the task does not work with this backbone or these classes.
    """
    opened = open_source(config.model, in_chans=channels.in_chans(config), seed=config.seed)
    torch.manual_seed(config.seed)
    try:
        task = task_class(config.task.name)(config.task, opened, train.classes)
        task.prepare(config.optim, total_steps=total_steps)
    except ValueError as error:
        raise ConfigError(f"task {config.task.name} on {opened.title}", str(error).splitlines()) from error
    return opened, task


def _difference(task: Task, val: Examples) -> str:
    """The first classes that only one of the two has, or that the order differs."""
    missing = [name for name in task.classes if name not in val.classes]
    more = [name for name in val.classes if name not in task.classes]
    if not missing and not more:
        return "the same in another order"
    parts = [
        f"{title} {shown(', '.join(names[:5]))}" for title, names in (("without", missing), ("with", more)) if names
    ]
    return "; ".join(parts)


def _evaluate(
    config: FinetuneConfig,
    task: Task,
    val: Examples,
    world: World,
    *,
    say: Any,
    give_up: Callable[[], bool] | None = None,
) -> Evaluation:
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if say is not None and time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            say(f"evaluating: {done * world.world_size} of {total} images")

    settings = config.evaluate
    return evaluate(
        task,
        val,
        world=world,
        batch_size=settings.batch_size,
        num_workers=config.data.num_workers,
        keep=settings.pictures,
        precision=settings.precision,
        progress=progress,
        give_up=give_up,
    )
