"""A training step of a tiny model, and its peak memory from the allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from vlm_calibration.losses.sequence import IGNORE, token_log_likelihood
from vlm_calibration.models.activations import RESPONSE_TOKENS
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.forward import labelled_logits

TOLERANCE = 0.1
"""Tolerance of the activations' peak, as a share of the allocator's figure; deviations are at most 7%."""
PLAIN = LoraSettings(dropout=0.0)
"""Without dropout, whose masks CPUs store differently from GPUs, which the estimate is for."""
ROWS = 24
BF16 = torch.bfloat16


def saved(config: Any, folder: Path) -> str:
    """Save a configuration, all that an estimate needs of a model; return its folder."""
    config.save_pretrained(folder / "config")
    return str(folder / "config")


def train_step(model: Any, inputs: dict[str, Any], labels: torch.Tensor, autocast: Any) -> None:
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        labelled = labelled_logits(model, inputs, labels)
        loss = -token_log_likelihood(labelled.logits, labelled.targets).sum()
    del labelled
    loss.backward()


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    labels = torch.full_like(ids, IGNORE)
    labels[:, -RESPONSE_TOKENS:] = 5
    return labels


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
