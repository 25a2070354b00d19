"""A run, from its configuration to its release: builds the parts, then calls `fit`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import cache
from pathlib import Path

import torch

from pretrain import release
from pretrain.config import Plan, PretrainConfig
from pretrain.core import distributed
from pretrain.core.distributed import World
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.core.record import versions
from pretrain.core.text import shown
from pretrain.data.sampling.bad_samples import TooManyBadSamplesError
from pretrain.data.sampling.order import ORDER_VERSION
from pretrain.data.shards.dataset import Dataset
from pretrain.engine.build import build_engine
from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.loop import every, fit
from pretrain.engine.optim.head_warmup import HeadWarmup
from pretrain.engine.protocol import StepResult
from pretrain.engine.session import preempt
from pretrain.engine.session.folder import check_same_run, write_records
from pretrain.engine.session.log import open_log
from pretrain.engine.session.lost_checkpoints import check_not_started
from pretrain.engine.session.needs import check_machines, checkpoint_bytes
from pretrain.engine.session.pace import Pace
from pretrain.engine.session.session import session
from pretrain.loader import PretrainLoader, reading_of
from pretrain.models.release.manifest import NotFiniteError
from pretrain.nonfinite.recovery import Recovery, RewindError
from pretrain.nonfinite.rewinds import SkippedPositions
from pretrain.objectives.base import Horizon
from pretrain.online.doctor import AlarmError, OnlineDoctor
from pretrain.online.probe import OnlineProbe
from pretrain.report.online import OnlinePage
from pretrain.start import build_objective, start_weights

# Keys that may change when a run resumes.
FREE_KEYS = (
    *("run_dir", "engine", "checkpoint", "log", "probe", "doctor", "init"),
    *("data.shards", "data.index", "data.mixture", "data.num_workers", "data.prefetch", "data.max_bad_fraction"),
)
START_ANOTHER = "choose another run_dir (init.checkpoint starts from this run's weights), or undo the change"


def run(config: PretrainConfig, dataset: Dataset, steps: Plan) -> int:
    """Train until done or requested to stop, from the newest checkpoint if there is one; return the exit status.

    Raises:
        RunError: the run cannot continue.
    """

    def body(world: World) -> int:
        with ExitStack() as whole:
            # Opened once and kept, so that a signal during a rewind is not lost.
            watch = cache(lambda: whole.enter_context(closing(preempt.Watch(Path(config.run_dir), rank=world.rank))))
            while True:
                with suppress(RewindError), ExitStack() as parts:
                    return PretrainRun(config, dataset, steps, world, parts, watch=watch).train()
                gc.collect()  # frees the weights before the rewound run starts, which begins as after a kill

    return session(config.run_dir, config.engine, body, failures=(TooManyBadSamplesError, AlarmError, NotFiniteError))


class PretrainRun:
    """The parts of one run on one rank. watch: opens the signal handlers, which stay open during rewinds."""

    def __init__(
        self,
        config: PretrainConfig,
        dataset: Dataset,
        steps: Plan,
        world: World,
        stack: ExitStack,
        *,
        watch: Callable[[], preempt.Watch],
    ):
        self.config, self.dataset, self.steps, self.world = config, dataset, steps, world
        self.folder = Path(config.run_dir)
        self.first = world.rank == 0
        self.checkpoints = Checkpoints.of_run(self.folder, config.checkpoint)
        self.skipped = SkippedPositions(self.folder)
        rewound = self.skipped.complete(self.checkpoints)
        found = self.checkpoints.find_latest()
        if found is not None:
            check_same_run(
                self.folder, config, {config.data.key: dataset.fingerprint}, free=FREE_KEYS, way_out=START_ANOTHER
            )
        else:
            check_not_started(self.folder, rewound_to_start=self.skipped.rewound_to_start)
        if self.first:
            data = {"fingerprint": dataset.fingerprint, "num_samples": steps.num_samples}
            write_records(self.folder, config, data, world_size=world.world_size, device=world.device_name)
        self.objective = build_objective(config, Horizon(steps.total_steps, steps.steps_per_epoch))
        size = checkpoint_bytes(self.objective, config.optim)
        greeting = [] if found else start_weights(self.objective, config)
        head_warmup_steps = config.init.head_warmup_steps if config.init else 0
        self.engine = build_engine(
            self.objective,
            optim=config.optim,
            config=config.engine,
            plan=steps,
            world=world,
            seed=config.seed,
            head_warmup=HeadWarmup(self.objective.head_prefixes, head_warmup_steps),
        )
        if found is not None:
            self.engine.load(found.folder)
            greeting = found.greeting()
        if rewound is not None:
            greeting.append(f"rewound from step {rewound.at} to step {rewound.to}")
        self.start_step = self.engine.step_count
        self.log = open_log(
            self.folder,
            config.log,
            rank=world.rank,
            start_step=self.start_step,
            total_steps=steps.total_steps,
            stack=stack,
        )
        for line in greeting:
            self.say(line)
        self.page = OnlinePage(self.folder, self.say, start_step=self.start_step) if self.first else None
        reading = reading_of(config, steps, dataset, augmented=world.device.type != "cuda")
        check_machines(config, reading, steps.total_steps, size, self.say)
        self.watch = watch()
        self.loader = PretrainLoader(
            config,
            steps,
            dataset,
            world,
            start_step=self.start_step,
            say=self.say,
            skipped_positions=self.skipped.counts,
            give_up=self.watch.gives_up_waiting,
        )
        stack.callback(self.loader.close)
        self.recovery = Recovery(
            config,
            self.objective,
            self.engine,
            self.loader,
            self.skipped,
            self.checkpoints,
            world=world,
            fingerprint=dataset.fingerprint,
            start_step=self.start_step,
            known=dict(found.about) if found else {},
            say=self.say,
        )
        self.probe = OnlineProbe(config, world, give_up=self.watch.gives_up_waiting) if config.probe else None
        self.doctor = self._call_doctor()
        self.pace = Pace(global_batch=config.optim.global_batch_size, start_step=self.start_step)

    def train(self) -> int:
        """Train, then write the release; return the exit status."""
        steps = self.steps
        if self.start_step >= steps.total_steps and (self.folder / "DONE").exists():
            self.say(f"all {steps.total_steps} steps are done; the release is {self.folder / 'release'}")
            preempt.mark_again(self.folder, rank=self.world.rank)
            return 0
        distributed.barrier()
        if self.first:
            preempt.unmark(self.folder)
        try:
            return self._train()
        finally:
            if self.page is not None:
                self.page.write(last=True)

    def _train(self) -> int:
        steps = self.steps
        try:
            if self._lacks_probe():
                self._probe(self.start_step)
            reached = self._fit()
        except RewindError:
            self.engine.close()  # frees memory for the rewound run
            raise
        except StoppedWaitingError:  # of all ranks, while they probed
            self._save(self.engine.step_count)
            return self._preempted()
        if reached < steps.total_steps:
            return self._preempted()
        if self.first:
            report = release.from_run(self.folder, self.folder / "release")
            self.say(report)
            preempt.mark(self.folder, "DONE", f"step {reached}")
        distributed.barrier()
        return 0

    def _fit(self) -> int:
        config, steps = self.config, self.steps
        return fit(
            self.engine,
            self.objective,
            iter(self.loader),
            total_steps=steps.total_steps,
            log=self._log,
            save=self._save,
            requests=self.watch.poll,
            probe=self._probe,
            log_every=config.log.every_steps,
            save_every=config.checkpoint.every_steps,
            probe_every=config.probe.every_steps if config.probe else 0,
            non_finite=self.recovery,
            examine=self._examine,
            replicas_every=config.engine.watch.replicas_every_steps,
            say=self.say,
        )

    def _preempted(self) -> int:
        step = self.engine.step_count
        self.say(f"stopped at step {step} of {self.steps.total_steps} ({self.watch.reason}); the same command resumes")
        if self.first:
            preempt.mark(self.folder, "PREEMPTED", f"step {step}")
        return preempt.EXIT_PREEMPTED

    def say(self, message: str) -> None:
        """Print on rank 0; other ranks print only what rank 0 cannot see."""
        if self.log is not None:
            self.log.say(message)
        elif not self.first:
            print(f"rank {self.world.rank}: {shown(message)}", file=sys.stderr, flush=True)

    def _log(self, step: int, result: StepResult) -> None:
        if result.skipped:
            self._report_skipped(step, result)
        if self.log is None:
            return
        rates = self.pace.rates(step, self.loader.waited)
        fixed = {"lr": result.lr, "weight_decay": result.weight_decay, "bad_samples": float(self.loader.bad.num_bad)}
        norm = {} if result.skipped else {"grad_norm": result.grad_norm}
        self.log.scalars(
            step, {**({} if result.skipped else result.losses), **norm, **fixed, **rates, **self.loader.taken(step)}
        )
        period = self.config.log.pictures_every_steps
        due = every(step, period, self.steps.total_steps) or (step == 1 and period > 0)
        if due and not self.config.engine.is_zero3:
            self.objective.eval()
            with torch.no_grad():
                pictures = self.objective.pictures(self.loader.latest, step, mean=self.config.mean, std=self.config.std)
            self.objective.train()
            self.log.pictures(step, pictures)
            if self.page is not None:
                self.page.add(step, pictures)

    def _call_doctor(self) -> OnlineDoctor | None:
        if self.config.doctor is None:
            return None
        return OnlineDoctor(
            self.config,
            self.steps,
            self.dataset,
            self.world,
            self.objective,
            start_step=self.start_step,
            rows=self.log.rows() if self.log is not None else (),
        )

    def _examine(self, step: int, result: StepResult) -> None:
        """Apply the doctor's rules; react to an alarm according to `doctor.reaction`.

        Raises:
            AlarmError: the run stops. RewindError: it rewinds.
        """
        if self.doctor is None:
            return
        verdicts = self.doctor(step, result)
        if self.log is not None:
            if self.doctor.measured:
                self.log.scalars(step, self.doctor.measured)
            for verdict in verdicts:
                self.log.alarm(step, verdict.rule, verdict.text)
        if not verdicts:
            return
        if self.doctor.settings.reaction == "rewind" and not result.requests & preempt.STOP:
            begin, positions = self.doctor.suspects(step)
            named = ", ".join(verdict.rule for verdict in verdicts)
            why = f"step {step}: alarm {named} (doctor.reaction=rewind)"
            self.recovery.go_back(step, positions, why=why, until=begin)
        if self.doctor.settings.reaction == "stop":
            said = "\n".join(f"{verdict.rule}: {verdict.text}" for verdict in verdicts)
            raise AlarmError(f"stopped at step {step} by an alarm (doctor.reaction=stop); not saved\n{said}")

    def _report_skipped(self, step: int, result: StepResult) -> None:
        if result.overflow:
            return
        names = self.loader.names(result.bad_positions[:16]) if self.first and result.bad_positions else []
        where = f" on ranks {list(result.bad_ranks)}; samples {', '.join(names)}" if result.bad_ranks else ""
        what = "loss" if result.bad_ranks else "gradient"
        if self.first:
            self.say(f"step {step}: {what} was not finite{where}; the step was skipped on all ranks")

    def _save(self, step: int) -> None:
        about = {
            "samples_consumed": step * self.config.optim.global_batch_size,
            "order": {
                "version": ORDER_VERSION,
                "seed": self.config.seed,
                "block_shards": self.config.data.block_shards,
            },
            "global_batch_size": self.config.optim.global_batch_size,
            "fingerprint": self.dataset.fingerprint,
            "world_size": self.world.world_size,
            "versions": versions(),
            **self.recovery.about(step, alarms=self.doctor.doctor.standing if self.doctor else ()),
        }
        folder = self.checkpoints.save(self.engine, step, about)
        if self.log is not None and step < self.steps.total_steps:
            self.log.say(f"saved {folder}")

    def _lacks_probe(self) -> bool:
        """True at step 0, and if the run ended between a checkpoint and its probe."""
        if self.config.probe is None or self.start_step == 0:
            return self.config.probe is not None
        due = every(self.start_step, self.config.probe.every_steps, self.steps.total_steps)
        row = self.log.row(self.start_step) if self.log is not None and due else {}
        return due and not distributed.broadcast_object(any(name.startswith("knn/") for name in row))

    def _probe(self, step: int) -> None:
        if self.probe is None:
            return
        with self.engine.evaluating():
            scores = self.probe(self.objective.backbone, with_pixels=step == 0)
        if self.log is None:
            return
        start = {} if step == 0 else self.log.row(0)
        self.log.scalars(step, scores)
        for kind, title in (("knn", "kNN"), ("linear", "linear")):
            parts = [
                f"{name.partition('/')[2]} {value:.1%}" + (f" (at step 0 {start[name]:.1%})" if name in start else "")
                for name, value in scores.items()
                if name.startswith(f"{kind}/")
            ]
            if f"{kind}/pixels" in start:
                parts.append(f"raw pixels {start[f'{kind}/pixels']:.1%}")
            if parts:
                self.log.say(f"step {step}: {title} accuracy " + ", ".join(parts))
        if self.page is not None:
            self.page.write()
