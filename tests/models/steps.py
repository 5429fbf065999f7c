"""A training step of a tiny model, and what it has from the allocator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vlm_calibration.losses.sequence import IGNORE, token_log_likelihood
from vlm_calibration.models.activations import RESPONSE_TOKENS
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.forward import labelled_logits

TOLERANCE = 0.1
"""Of the activations' peak, as a share of what the allocator saw; deviations are at most 7%."""
PLAIN = LoraSettings(dropout=0.0)
"""CPUs keep another kind of mask for dropout than GPUs, which are what is estimated."""
ROWS = 24
BF16 = torch.bfloat16


def saved(config: Any, folder: Path) -> str:
    """A folder with a configuration, which is all that an estimate needs of a model."""
    config.save_pretrained(folder / "config")
    return str(folder / "config")


def train_step(model: Any, inputs: dict[str, Any], labels: torch.Tensor, autocast: Any) -> None:
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        found = labelled_logits(model, inputs, labels)
        loss = -token_log_likelihood(found.logits, found.targets).sum()
    del found
    loss.backward()


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    labels = torch.full_like(ids, IGNORE)
    labels[:, -RESPONSE_TOKENS:] = 5
    return labels


def allocated(run: Callable[[], None]) -> int:
    """The most bytes that a run has from the allocator at any moment, without those that it found there.

    The run must have been run before: it is to find its gradients there.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
