"""Applies the rules to rows of metrics, of a running job or read from its log, and gives diagnoses. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pretrain.doctor.history import Facts, History
from pretrain.doctor.rules import RULES

CALM_ROWS = 5  # a sign is over after this many rows without it
CAUSE_STEPS = 100  # for this many steps after a cause, signs that follow from it are not reported


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong at `step`: name of the rule, and a sentence with numbers and remedy."""

    step: int
    rule: str
    text: str


class Doctor:
    """Checks every rule at every row; a sign is reported when it begins, not again while it lasts.

    Args:
        off: rules that are not checked.

    Attributes:
        standing: rules with an active sign, reported or not: given at their last check, or absent for fewer than
            CALM_ROWS rows since.
    """

    def __init__(self, facts: Facts, *, off: Collection[str] = ()):
        self.facts, self.history = facts, History()
        self._rules = {name: rule for name, rule in RULES.items() if name not in off}
        self._calm: dict[str, int] = {}  # of each active sign: rows without it
        self._hidden: set[str] = set()  # active signs that follow from a cause
        self._again: set[str] = set()  # active signs to report once more
        self._last_cause: int | None = None

    def observe(self, step: int, values: Mapping[str, float]) -> list[Diagnosis]:
        """Add the row of `step` and report the signs that begin with it. Non-finite values are skipped."""
        finite = {name: value for name, value in values.items() if -float("inf") < value < float("inf")}
        self.history.add(step, finite)
        found = []
        for name, rule in self._rules.items():
            if not rule.asked(finite):
                continue
            numbers = rule.check(self.history, self.facts)
            self._hidden.discard(name)
            if numbers is None:
                self._calm_down(name)
                continue
            if rule.is_cause:
                self._last_cause = step
            elif self._last_cause is not None and step - self._last_cause <= CAUSE_STEPS:
                self._hidden.add(name)
                continue
            is_new = name not in self._calm or name in self._again
            self._calm[name] = 0
            self._again.discard(name)
            if is_new:
                found.append(Diagnosis(step, name, f"{rule.title}: {numbers}; {rule.way_out}"))
        return found

    @property
    def standing(self) -> set[str]:
        return self._calm.keys() | self._hidden

    def say_again(self) -> None:
        """Report each active sign once more when its rule is next checked: for a run that resumes."""
        self._again = set(self._calm)

    def _calm_down(self, name: str) -> None:
        if name in self._calm:
            self._calm[name] += 1
            if self._calm[name] >= CALM_ROWS:
                del self._calm[name]
                self._again.discard(name)
