"""Verdicts of trials, and their record."""

from __future__ import annotations

from dataclasses import dataclass

HELD, FAILED, SILENT, EXECUTED = "held", "failed", "silent", "executed"
VERDICTS = {
    HELD: "the promise was kept",
    FAILED: "a traceback, a hang, a wrong exit status, or another end of the run",
    SILENT: "it went on with wrong data or weights and did not say so",
    EXECUTED: "a command or code in an input was run",
}


class BrokenPromiseError(Exception):
    """A trial did not hold; verdict: one of VERDICTS."""

    def __init__(self, why: str, verdict: str = FAILED):
        super().__init__(why)
        self.verdict = verdict


@dataclass(frozen=True)
class Result:
    """A line of results.jsonl. why: of a verdict that is not `held`. seconds: wall clock."""

    kind: str
    number: int
    seed: int
    verdict: str
    why: str
    seconds: float
