"""Estimates of GPU memory as tables and lines: what stages take, also with other settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from vlm_calibration.models.activations import TrainingStep
    from vlm_calibration.models.memory import MemoryEstimate
    from vlm_calibration.stages.memory import Phase

GIB = 2**30
PARTS = (
    ("weights gathered at a time", "gathered", "gathered"),
    ("gradients", "grad.", "gradients"),
    ("gradients, copy of DDP", "DDP", "buckets"),
    ("optimizer states", "optim.", "optimizer"),
    ("images", "images", "pixels"),
    ("keys and values", "KV", "cache"),
    ("activations, at most", "activ.", "activations"),
)
"""Name of a part of a phase's memory, its name where there is little room, and the field of the estimate."""


def memory_table(phases: Mapping[str, Sequence[Phase]], model: str) -> Table:
    """Compare the phases of stages, in GiB: one column for each phase of a single stage, one row for each phase of a plan."""
    named = [
        (f"{name} {phase.name}", phase.estimate) for name, of_stage in phases.items() for phase in of_stage
    ]
    estimates = [estimate for _, estimate in named]
    dtypes = sorted({dtype for e in estimates for dtype in e.weights})
    rows = {f"weights in {dtype}": [e.weights.get(dtype, 0) for e in estimates] for dtype in dtypes}
    if len(phases) > 1:
        rows = {"weights": [sum(e.weights.values()) for e in estimates]}
    for label, short, field in PARTS:
        if any(sizes := [getattr(e, field) for e in estimates]):
            rows[short if len(phases) > 1 else label] = sizes
    rows["total"] = [e.total for e in estimates]
    table = Table(
        title=f"{model}, GiB on one GPU",
        box=SIMPLE_HEAD if len(phases) > 1 else HEAVY_HEAD,
        collapse_padding=len(phases) > 1,
        pad_edge=len(phases) == 1,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption=(
            "The tensors at each phase's peak, without the CUDA context and what the\n"
            "allocator loses: leave 0.75 GiB and 5% of the rest free for them."
        ),
    )
    table.add_column("", no_wrap=True)
    if len(phases) > 1:
        for label in rows:
            table.add_column(label, justify="right", no_wrap=True)
        for number, (name, _) in enumerate(named):
            table.add_row(name, *(_cell(sizes[number]) for sizes in rows.values()))
        return table
    for name, _ in named:
        table.add_column(name, justify="right")
    table.add_row("parameters, adapters included", *(_count(e.parameters) for e in estimates))
    table.add_row("  of them trained", *(_count(e.trained) for e in estimates), end_section=True)
    for label, sizes in rows.items():
        if label == "total":
            table.add_section()
        table.add_row(label, *map(_cell, sizes))
    return table


def memory_line(estimate: MemoryEstimate, step: TrainingStep) -> str:
    """Summarise the estimate of a training step in one line."""
    parts = {
        "weights": sum(estimate.weights.values()),
        "gradients": estimate.gradients + estimate.buckets,
        "optimizer": estimate.optimizer,
        "images": estimate.pixels,
        "activations": estimate.activations,
    }
    added = " + ".join(f"{name} {in_gib(size)}" for name, size in parts.items())
    return (
        f"{_count(estimate.parameters)} parameters, {_count(estimate.trained)} trained. "
        f"{step.batch} x {step.row} tokens: {added} = {in_gib(estimate.total)} GiB"
    )


def choices_table(choices: Mapping[str, int], title: str) -> Table:
    """Compare what a training step takes with changed settings, in GiB."""
    table = Table(title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(title, overflow="fold")
    table.add_column("GiB", justify="right", no_wrap=True)
    for settings, size in choices.items():
        table.add_row(settings, in_gib(size))
    return table


def _cell(size: int) -> str:
    return in_gib(size) if size else "-"


def in_gib(size: float) -> str:
    """Bytes in GiB, with three digits."""
    value = size / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
