"""Schedules as pure functions of the step: nothing to save, nothing to restore, and a plot needs no training.

Sources: linear warm-up and half cosine of MAE (He et al. 2021, A.1), of DINO (Caron et al. 2021, section 3.2) and
DINOv2, of I-JEPA (Assran et al. 2023, A.1); the steps of SimMIM (Xie et al. 2021, appendix A); the polynomial of
segmentation (Chen et al. 2017, "Rethinking Atrous Convolution", section 4.1). They differ in where
the warm-up starts, in its last step (`warmup_form`), and in where the cosine begins.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pretrain.core.configlib import Config

WarmupForm = Literal["open", "closed"]
CosineForm = Literal["open", "closed"]


def cosine(step: float, start: float, end: float, total_steps: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at `total_steps`; constant after that."""
    if step >= total_steps:
        return end
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * step / total_steps))


def closed_cosine(step: float, start: float, end: float, num_steps: int, *, extra: float = 0.0) -> float:
    """Half a cosine from `start` at step 0 to `end` at step num_steps - 1, its last; constant after that.

    Args:
        extra: the cosine of a schedule longer by this share, cut off and stretched to end at `end` (DINOv3).
    """
    last = num_steps - 1
    if step >= last:
        return end if last > 0 else start
    whole = int((1 + extra) * num_steps) - 1
    passed, until_cut = (1.0 - math.cos(math.pi * at / whole) for at in (step, last))
    return start + (end - start) * passed / until_cut


def warmup(step: float, *, start: float, peak: float, warmup_steps: float, form: WarmupForm = "open") -> float:
    """Linear from `start` at step 0 to `peak`; defined for steps below `warmup_steps`.

    Args:
        form: "open" reaches the peak at step W (MAE); "closed" at step W - 1, its last (DINO).
    """
    last = warmup_steps if form == "open" else warmup_steps - 1
    return start + (peak - start) * min(step / last, 1.0) if last > 0 else start


def warmup_cosine(
    step: float,
    *,
    peak: float,
    final: float,
    warmup_steps: float,
    total_steps: float,
    warmup_form: WarmupForm = "open",
    start: float = 0.0,
    frozen_steps: float = 0,
    whole: bool = False,
    cosine_form: CosineForm = "open",
    cosine_steps: int | None = None,
    share: float = 1.0,
    extra: float = 0.0,
) -> float:
    """Linear warm-up from `start` to `peak`, then half a cosine down to `final` at `total_steps`.

    Args:
        step: completed steps, so the first update uses step 0.
        warmup_form: "open" warms up as step / W and reaches the peak at step W (MAE); "closed" warms up as
            step / (W - 1), so the last warm-up step already is the peak and step W repeats it (DINO).
        frozen_steps: zero for this many steps; the warm-up follows (DINOv2).
        whole: the cosine counts from step 0, so that the value drops slightly at the end of the warm-up (SimMIM, timm);
            else it starts at the peak.
        cosine_form: "open" would reach `final` in the step after its last; "closed" reaches it in its last (DINOv3).
        cosine_steps: steps of the cosine, after which the value is `final`; None: to `total_steps`.
        share: the part of an "open" cosine that is passed in that time; below 1 it stops above `final` (CAPI).
        extra: of a "closed" cosine, see `closed_cosine`.
    """
    if step < frozen_steps:
        return 0.0
    step, total_steps = step - frozen_steps, total_steps - frozen_steps
    if step >= total_steps:
        return final
    if step < warmup_steps:
        return warmup(step, start=start, peak=peak, warmup_steps=warmup_steps, form=warmup_form)
    passed = 0 if whole else warmup_steps
    num_steps = cosine_steps or total_steps - passed
    if cosine_form == "closed":
        return closed_cosine(step - passed, peak, final, round(num_steps), extra=extra)
    return cosine(step - passed, peak, final, num_steps / share)


def poly(step: float, *, peak: float, final: float, power: float, start_step: float, total_steps: float) -> float:
    """From `peak` at `start_step` as (1 - t)^power to `final` at `total_steps`, t in [0, 1] is linear between."""
    if step >= total_steps:
        return final
    return final + (peak - final) * (1.0 - (step - start_step) / (total_steps - start_step)) ** power


def multistep(step: float, *, peak: float, milestones: Sequence[float], gamma: float) -> float:
    """`peak` times `gamma` for each of the ascending `milestones` that `step` has reached."""
    return peak * gamma ** bisect_right(milestones, step)


def teacher_temp(epoch: int, *, warmup_temp: float, temp: float, warmup_epochs: int) -> float:
    """Temperature of the teacher's softmax in `epoch`: linear over the first epochs, the last of them at `temp`."""
    if epoch >= warmup_epochs:
        return temp
    return warmup_temp + (temp - warmup_temp) * epoch / max(warmup_epochs - 1, 1)


class PhasesConfig(Config):
    """From `start` linearly to `peak`, then half a cosine whose last step is at `end`, then `end`."""

    start: float
    peak: float
    end: float
    warmup_epochs: float = Field(0, ge=0, description="epochs from start to peak; 0: starts at peak")
    cosine_epochs: float | None = Field(
        None, gt=0, description="epochs from peak to end; default: to the end of the run"
    )
    cosine_extra: float = Field(0.0, ge=0, description="cut off a cosine longer by this share")

    def at(self, step: int, *, epoch_steps: int, total_steps: int) -> float:
        """The value for the update after `step` completed steps."""
        return warmup_cosine(
            step,
            start=self.start,
            peak=self.peak,
            final=self.end,
            warmup_steps=round(self.warmup_epochs * epoch_steps),
            total_steps=total_steps,
            cosine_steps=None if self.cosine_epochs is None else round(self.cosine_epochs * epoch_steps),
            cosine_form="closed",
            extra=self.cosine_extra,
        )
