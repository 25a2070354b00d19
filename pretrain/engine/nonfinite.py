"""Counts non-finite steps (loss or gradient not finite) and ends the run when there are too many."""

from __future__ import annotations

from collections.abc import Iterable

from pretrain.engine.protocol import StepResult


class NonFiniteError(RuntimeError):
    """Training cannot continue: too many non-finite steps."""


class NonFiniteSteps:
    """Called by `fit` after each non-finite step; raises NonFiniteError after `most` of them within `window` steps.

    Args:
        steps: earlier non-finite steps, which a resumed run reads from its checkpoint.
    """

    def __init__(self, *, most: int = 3, window: int = 3, steps: Iterable[int] = ()):
        self.most, self.window, self.steps = most, window, list(steps)

    def add(self, step: int) -> bool:
        """Count `step`; True when there are too many."""
        self.steps.append(step)
        return len(self.recent) >= self.most

    @property
    def recent(self) -> list[int]:
        """The non-finite steps within the window that ends at the latest one."""
        return [step for step in self.steps if step > self.steps[-1] - self.window]

    def after(self, step: int) -> bool:
        """Was there a non-finite step after `step`?"""
        return any(broken > step for broken in self.steps)

    def __call__(self, step: int, result: StepResult) -> None:
        if self.add(step):
            raise NonFiniteError(self.why(step, result))

    def why(self, step: int, result: StepResult) -> str:
        count = len(self.recent)
        often = f"{count} steps in a row" if count == self.window else f"in {count} of the last {self.window} steps"
        if not result.bad_ranks:
            return f"step {step}: the gradient norm was not finite {often}; lower the learning rate"
        return (
            f"step {step}: the loss was not finite {often}, last on ranks {list(result.bad_ranks)} "
            f"at sample positions {list(result.bad_positions)[:16]}; check these samples, or lower the learning rate"
        )
