"""What an optimizer's configuration means for a number of images and of processes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.engine.config import EngineConfig, OptimConfig


@dataclass(frozen=True)
class Plan:
    """All counts are of optimizer steps."""

    num_samples: int
    world_size: int
    micro_batch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    lr: float  # peak, absolute
    milestones: tuple[int, ...] = ()  # of the schedule "multistep"
    cosine_steps: int | None = None  # of the learning rate's cosine; None: to the end of the run


def plan_steps(
    optim: OptimConfig, engine: EngineConfig, *, num_samples: int, world_size: int
) -> tuple[Plan, list[str]]:
    """Convert epochs to steps and the global batch to micro-batches; return the plan and a list of problems.

    Where the batch does not divide, or one step asks for more samples than there are, there are problems and the plan
    means nothing.
    """
    problems: list[str] = []
    batch, share = optim.global_batch_size, world_size * engine.accumulation_steps
    if batch % share:
        near = max(1, round(batch / share)) * share
        problems.append(
            f"optim.global_batch_size: {batch} is not a multiple of {world_size} processes x "
            f"{engine.accumulation_steps} accumulation steps; nearest: {near}"
        )
    if batch > num_samples:
        fits = num_samples // share * share
        problems.append(
            f"optim.global_batch_size: {batch} images per step, but the data set has only {num_samples}"
            + (f"; give {fits} or fewer" if fits else "")
        )
    steps_per_epoch = max(1, num_samples // batch)
    total = optim.total_steps or max(1, round((optim.epochs or 0) * steps_per_epoch))
    warmup = (
        optim.warmup_steps if optim.warmup_steps is not None else round((optim.warmup_epochs or 0) * steps_per_epoch)
    )
    if warmup > total:
        key = "warmup_epochs" if optim.warmup_steps is None else "warmup_steps"
        problems.append(
            f"optim.{key}: {warmup} warm-up steps are more than the {total} steps of the run; give fewer, or 0"
        )
    milestones = tuple(round(epoch * steps_per_epoch) for epoch in optim.milestone_epochs)
    cosine_steps = None if optim.cosine_epochs is None else max(1, round(optim.cosine_epochs * steps_per_epoch))
    plan = Plan(
        num_samples,
        world_size,
        batch // share,
        steps_per_epoch,
        total,
        warmup,
        optim.peak_lr,
        milestones=milestones,
        cosine_steps=cosine_steps,
    )
    return plan, problems
