"""The peak memory of a run, from the allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def _allocations(events: Iterable[Any]) -> list[tuple[int, int, int]]:
    """(time, address, bytes) of what was allocated, and with negative bytes of what was freed."""
    rows = []
    for event in events:
        if event.tag == _EventType.Allocation:
            rows.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        rows += _allocations(event.children)
    return rows


def allocated(run: Callable[[], None]) -> int:
    """Peak bytes that a run allocates, not counting those allocated before it.

    Call the run once before, so that its gradients are already allocated.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocations = _allocations(profiler.profiler.kineto_results.experimental_event_tree())
    assert allocations
    held: dict[int, int] = {}
    current = peak = 0
    for _, pointer, size in sorted(allocations, key=lambda allocation: allocation[0]):
        # The profiler remembers addresses of earlier runs: memory that this run did not allocate may seem freed.
        current += size if size > 0 else -held.pop(pointer, 0)
        if size > 0:
            held[pointer] = size
        peak = max(peak, current)
    return peak
