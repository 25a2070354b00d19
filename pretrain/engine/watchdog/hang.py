"""Finds the rank that is behind when all ranks are silent, and describes the hang. Pure functions, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.core.heartbeat import PHASES

STANDS = {
    "start": "it has not started its first step",
    "data": "it waits for its data",
    "forward": "it is in its forward pass",
    "backward": "it is in its backward pass",
    "agree": "it waits for the other ranks' losses and gradients",
    "update": "it updates its weights",
    "after": "it is between two steps (averages, log, doctor)",
    "save": "it saves a checkpoint",
    "probe": "it runs a probe or an evaluation",
    "end": "it is ending or rewinding",
    "gone": "it has left the run",
}
_ACCUMULATED = ("data", "forward", "backward")
# Innermost Python frame of a rank that waits for others: a collective, or the gradient all-reduce in backward.
_WAITING = re.compile(r"torch/(distributed|autograd)/|pretrain/core/distributed\.py|pretrain/engine/optim/clip\.py")


@dataclass(frozen=True)
class RankState:
    """The state of one silent rank.

    Attributes:
        phase, step, micro, collectives, inside: see `heartbeat.Reading`.
        quiet, limit: seconds since the last heartbeat, and the allowed maximum.
        process: state letter as in /proc/PID/stat; X: the process does not exist.
        frame: the innermost Python frame of its main thread, "" if unknown.
    """

    rank: int
    host: str
    phase: str
    step: int
    micro: int
    collectives: int
    inside: str
    quiet: float
    limit: float
    process: str
    frame: str = ""

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Position in the program, comparable between ranks; it only increases."""
        micro = self.micro if self.phase in _ACCUMULATED else 1 << 30
        return (self.step, micro, PHASES.index(self.phase), self.collectives)


def behind(states: Sequence[RankState]) -> tuple[list[RankState], str]:
    """(the ranks that the others wait for, the reason); no ranks when all are at the same place."""
    signs = (
        ("its process has ended", [s for s in states if s.process in "XZ"]),
        ("its process is stopped (SIGSTOP, or a debugger)", [s for s in states if s.process in "Tt"]),
    )
    for why, found in signs:
        if found:
            return found, why
    first = min(state.place for state in states)
    found = [state for state in states if state.place == first]
    if len(found) < len(states):
        return found, ""
    known = [state for state in states if state.frame]
    found = [state for state in known if not _WAITING.search(state.frame)]
    if found and len(found) < len(known):
        return found, ""
    # A disk or a driver that does not respond.
    found = [state for state in states if state.process == "D"]
    return (found, "it waits in the kernel (state D) for a disk or a driver") if len(found) < len(states) else ([], "")


def sentence(states: Sequence[RankState], silent_hosts: Sequence[str] = ()) -> tuple[str, list[RankState]]:
    """(description of the hang, the ranks that cause it).

    Args:
        silent_hosts: nodes whose watchdog did not answer.
    """
    if silent_hosts:
        hosts = ", ".join(silent_hosts)
        return f"hang: {hosts} does not respond, and no other rank makes progress ({_all_at(states)})", []
    found, why = behind(states)
    if not found:
        return f"hang: all ranks are at the same place ({_all_at(states)}); see their stacks", []
    first = found[0]
    hosts = ", ".join(dict.fromkeys(state.host for state in found))
    who = f"rank{'s' * (len(found) > 1)} {numbers([state.rank for state in found])} on {hosts}"
    where = STANDS[first.phase] + (f" of step {first.step}" if first.step else "")
    where += f" (in {first.inside}, collective {first.collectives})" if first.inside else ""
    parts = [part for part in (why, where) if part]
    told = f"hang: {who} {'is' if len(found) == 1 else 'are'} behind: {', '.join(parts)}, for {first.quiet:.0f} s"
    told += f", at {first.frame}" if first.frame else ""
    others = [state for state in states if state not in found]
    return (told + (f"; {_all_at(others)}" if others else "")), found


def _all_at(states: Sequence[RankState]) -> str:
    """For instance 'ranks 0, 2-7 in agree of step 8'."""
    places: dict[str, list[int]] = {}
    for state in states:
        inside = f" ({state.inside} {state.collectives})" if state.inside else ""
        places.setdefault(f"{state.phase} of step {state.step}{inside}", []).append(state.rank)
    return "; ".join(f"rank{'s' * (len(ranks) > 1)} {numbers(ranks)} in {place}" for place, ranks in places.items())


def numbers(ranks: Sequence[int]) -> str:
    """For instance '0, 2-7'."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def innermost_frame(stacks: str) -> str:
    """'wait (FILE:LINE)' of the main thread, from the output of faulthandler; "" if it is not there."""
    for block in re.split(r"\n(?=(?:Current thread|Thread) 0x)", "\n" + stacks):
        frames = re.findall(r'^  File "(.+)", line (\d+|\?+) in (.+)$', block, re.MULTILINE)
        if frames and frames[-1][2] in ("<module>", "_run_module_as_main"):
            file, line, function = frames[0]
            return f"{function} ({file}:{line})"
    return ""
