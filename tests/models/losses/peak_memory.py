"""The largest number of bytes that torch's own CPU allocator holds at once during a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes above what was held before; every allocation counts, also those within a kernel."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    profiler: Any = record.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
