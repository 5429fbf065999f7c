"""A training step of a tiny model, and the memory that it allocates."""

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
"""Relative tolerance of the estimated peak of activations; measured deviations are at most 7%."""
PLAIN = LoraSettings(dropout=0.0)
"""Without dropout: its mask on CPUs differs from the estimated one of GPUs."""
ROWS = 24
BF16 = torch.bfloat16


def saved(config: Any, folder: Path) -> str:
    """Save a configuration, the only file of a model that an estimate needs; returns its folder."""
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


def allocated(run: Callable[[], None]) -> int:
    """Peak bytes that `run` allocates, without bytes allocated before.

    Call `run` once before, so that gradients exist.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
