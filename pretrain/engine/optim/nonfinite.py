"""When steps without a finite loss or gradient are too many."""

from __future__ import annotations

from collections.abc import Iterable

from pretrain.engine.protocol import StepResult


class NonFiniteError(RuntimeError):
    """Training cannot continue: too many steps had no finite loss or gradient."""


class NonFiniteSteps:
    """Counts them. Called by `fit` after each one, it raises NonFiniteError when `most` lie within `window` steps.

    Args:
        steps: known from before, as a resumed run has them from its checkpoint.
    """

    def __init__(self, *, most: int = 3, window: int = 3, steps: Iterable[int] = ()):
        self.most, self.window, self.steps = most, window, list(steps)

    def add(self, step: int) -> bool:
        """Count `step`; True when there are too many."""
        self.steps.append(step)
        return len(self.recent) >= self.most

    @property
    def recent(self) -> list[int]:
        """Those within the window that ends at the last one."""
        return [step for step in self.steps if step > self.steps[-1] - self.window]

    def after(self, step: int) -> bool:
        """Was there one after `step`?"""
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
            f"at sample positions {list(result.bad_positions)[:16]}; look at these samples, or lower the learning rate"
        )
