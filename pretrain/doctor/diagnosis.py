"""From rows of numbers to verdicts: the same for a run that goes on and for one read from its log. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pretrain.doctor.history import Facts, History
from pretrain.doctor.rules import RULES

CALM_ROWS = 5  # a sign that was absent so often is over
CAUSE_STEPS = 100  # so long after a cause, what follows from it is not said


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong at `step`: the rule's name, and a sentence with the numbers and the way out."""

    step: int
    rule: str
    text: str


class Doctor:
    """Asks every rule at every row; a verdict is given when its sign begins, not while it lasts.

    Args:
        off: rules that are not asked.

    Attributes:
        standing: rules whose sign was given when they were last asked, said or not, or not long enough ago to be over.
    """

    def __init__(self, facts: Facts, *, off: Collection[str] = ()):
        self.facts, self.history = facts, History()
        self._rules = {name: rule for name, rule in RULES.items() if name not in off}
        self._calm: dict[str, int] = {}  # of each sign that is given: rows without it
        self._hidden: set[str] = set()  # signs that are given, but follow from a cause
        self._again: set[str] = set()  # what stands is said once more
        self._last_cause: int | None = None

    def observe(self, step: int, values: Mapping[str, float]) -> list[Diagnosis]:
        """Take in the row of `step`, and say what begins with it. Values that are not finite are left out."""
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
        """What stands now is said once more when its rule is next asked: to a run that resumes."""
        self._again = set(self._calm)

    def _calm_down(self, name: str) -> None:
        if name in self._calm:
            self._calm[name] += 1
            if self._calm[name] >= CALM_ROWS:
                del self._calm[name]
                self._again.discard(name)
