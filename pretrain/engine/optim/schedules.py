"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

from pretrain.core.schedule import closed_cosine, cosine, multistep, poly, warmup, warmup_cosine
from pretrain.engine.config import OptimConfig
from pretrain.engine.plan import Plan


class Schedules:
    """The schedules of an optimizer configuration, with durations in steps from `plan`."""

    def __init__(self, optim: OptimConfig, plan: Plan):
        self.optim, self.plan = optim, plan

    def lr_at(self, step: int) -> float:
        """Of the update that completes step + 1."""
        optim, plan = self.optim, self.plan
        step += optim.first_step
        if optim.schedule in ("cosine", "cosine_whole"):
            return warmup_cosine(
                step,
                peak=plan.lr,
                final=optim.min_lr,
                warmup_steps=plan.warmup_steps,
                total_steps=plan.total_steps,
                warmup_form=optim.warmup_form,
                start=optim.warmup_lr,
                whole=optim.schedule == "cosine_whole",
                cosine_form=optim.cosine_form,
                cosine_steps=plan.cosine_steps,
                share=optim.cosine_share,
                extra=optim.cosine_extra,
            )
        if step < plan.warmup_steps:
            start, steps = optim.warmup_lr, plan.warmup_steps
            return warmup(step, start=start, peak=plan.lr, warmup_steps=steps, form=optim.warmup_form)
        if optim.schedule == "poly":
            return poly(
                step,
                peak=plan.lr,
                final=optim.min_lr,
                power=1.0 if optim.power is None else optim.power,
                start_step=plan.warmup_steps,
                total_steps=plan.total_steps,
            )
        return multistep(step, peak=plan.lr, milestones=plan.milestones, gamma=optim.gamma)

    def weight_decay_at(self, step: int) -> float:
        """Of the update that completes step + 1."""
        optim, plan = self.optim, self.plan
        if (phases := optim.weight_decay_schedule) is not None:
            at = step + optim.first_step
            return phases.at(at, epoch_steps=plan.steps_per_epoch, total_steps=plan.total_steps)
        if optim.weight_decay_end is None:
            return optim.weight_decay
        step, ends = step + optim.first_step, (optim.weight_decay, optim.weight_decay_end)
        if optim.cosine_form == "closed":
            return closed_cosine(step, *ends, plan.total_steps, extra=optim.cosine_extra)
        return cosine(step, *ends, plan.total_steps)
