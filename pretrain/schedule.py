"""Schedules as pure functions of the step: nothing to save, nothing to restore, and a plot needs no training.

Sources: linear warm-up and half cosine of MAE (He et al. 2021, A.1) and of DINO (Caron et al. 2021, section 3.2);
the two differ in the last step of the warm-up only (`warmup_form`).
"""

from __future__ import annotations

import math
from typing import Literal

WarmupForm = Literal["open", "closed"]


def cosine(step: float, start: float, end: float, total_steps: float) -> float:
    """Half a cosine from `start` at step 0 towards `end`, which it reaches at `total_steps` and then holds."""
    if step >= total_steps:
        return end
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * step / total_steps))


def warmup_cosine(
    step: float,
    *,
    peak: float,
    final: float,
    warmup_steps: float,
    total_steps: float,
    warmup_form: WarmupForm = "open",
) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `final` at `total_steps`.

    Args:
        step: completed steps, so the first update uses step 0.
        warmup_form: "open" warms up as step / W and meets the peak at step W (MAE); "closed" warms up as
            step / (W - 1), so the last warm-up step already is the peak and step W repeats it (DINO).
    """
    if step < warmup_steps:
        last = warmup_steps if warmup_form == "open" else warmup_steps - 1
        return peak * min(step / last, 1.0) if last > 0 else 0.0
    return cosine(step - warmup_steps, peak, final, total_steps - warmup_steps)


def teacher_temp(epoch: int, *, warmup_temp: float, temp: float, warmup_epochs: int) -> float:
    """Temperature of the teacher's softmax in `epoch`: linear over the first epochs, the last of them at `temp`."""
    if epoch >= warmup_epochs:
        return temp
    return warmup_temp + (temp - warmup_temp) * epoch / max(warmup_epochs - 1, 1)
