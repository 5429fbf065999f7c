"""The memory that `vlm-calibration fit` takes with given settings, as a table and as one line for a configuration's comment."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vlm_calibration.models.activations import TrainingStep
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.models.memory import MemoryEstimate, estimate_memory
from vlm_calibration.records import DataError

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of the optimiser's states for each trained parameter."""
LEVELS = 11
"""Responses to a prompt where all levels are compared: 0%, 10%, ... 100%."""
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32": (None, None),
    "32-true": (None, None),
    "bf16": (torch.bfloat16, None),
    "bf16-mixed": (torch.bfloat16, None),
    "16": (torch.float16, None),
    "16-mixed": (torch.float16, None),
    "bf16-true": (None, torch.bfloat16),
    "16-true": (None, torch.float16),
}
"""trainer.precision -> the dtype of autocast, and the one that the Trainer turns all weights into."""


def training_step(config: Any, tokens: int | None = None) -> TrainingStep:
    """The step that a configuration of `fit` describes.

    Args:
        config: as the parser returns it. tokens: of a prompt with one response; None: the most that it lets through.

    Raises:
        DataError: a precision that is not known here.
    """
    precision = str(config.trainer.get("precision") or "32-true")
    if precision not in PRECISIONS:
        raise DataError(f"trainer.precision: no estimate for {precision!r}, expected {', '.join(PRECISIONS)}")
    autocast, cast = PRECISIONS[precision]
    settings = config.model.init_args
    batch, responses = config.data.batch_size, _responses(settings, config.data)
    if settings.get("scoring") == "plain":
        batch, responses = batch * responses, 1
    return TrainingStep(
        batch=batch,
        tokens=tokens or config.data.max_length,
        responses=responses,
        checkpointing=settings.gradient_checkpointing,
        autocast=autocast,
        cast=cast,
    )


def _responses(settings: Any, data: Any) -> int:
    """How many responses to a prompt are compared at most."""
    if "pairs" not in settings or data.get("candidates") is None:
        return 1
    pairs = settings.pairs
    rejected = LEVELS - 1 if pairs.rejected == "all" else pairs.n_rejected or 1
    return 1 + int(rejected) + bool(data.candidates.wrong_answer)


def memory_of(config: Any, step: TrainingStep) -> MemoryEstimate:
    """The memory of a step with the settings of `fit`.

    An adapter that training goes on from is taken to be one that `model.lora` describes.

    Raises:
        DataError: there is no such model, or the module trains no adapter.
    """
    settings = config.model.init_args
    if "lora" not in settings or "base" not in settings:
        raise DataError(f"{config.model.class_path} trains no adapter: give the settings of `fit`")
    return estimate_memory(
        BaseModel(**settings.base.as_dict()),
        LoraSettings(**settings.lora.as_dict()),
        step,
        optimizer_bytes=STATE_BYTES[settings.optimizer.get("name", "adamw")],
        reference=settings.get("reference") == "adapter",
        trained=settings.get("parts"),
    )


def memory_line(estimate: MemoryEstimate, step: TrainingStep) -> str:
    """All that matters of an estimate, in one line."""
    parts = {
        "weights": sum(estimate.weights.values()),
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "activations": estimate.activations,
    }
    added = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return (
        f"{_count(estimate.parameters)} parameters, {_count(estimate.trained)} trained. "
        f"{step.batch} x {step.row} tokens: {added} = {_gib(estimate.total)} GiB"
    )


def memory_table(estimate: MemoryEstimate, step: TrainingStep, name: str) -> Table:
    """What takes how much, in GiB."""
    kind = "with" if step.checkpointing else "without"
    table = Table(
        title=f"{name}\n{step.batch} rows of {step.row} tokens, {kind} checkpointing",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption=(
            "The worst moment of a training step, as far as its tensors go. The CUDA context, what the allocator\n"
            "loses and the gradients' second copy under DDP come on top."
        ),
    )
    table.add_column("on one GPU")
    table.add_column("GiB", justify="right")
    table.add_row(f"{_count(estimate.parameters)} parameters, the adapter's with them", "")
    table.add_row(f"{_count(estimate.trained)} of them trained", "", end_section=True)
    for dtype, size in sorted(estimate.weights.items()):
        table.add_row(f"weights in {dtype}", _gib(size))
    table.add_row("gradients", _gib(estimate.gradients))
    table.add_row("optimizer states", _gib(estimate.optimizer))
    table.add_row("activations, at most", _gib(estimate.activations))
    table.add_row("  alone at the output head", _gib(estimate.logits), end_section=True)
    table.add_row("total", _gib(estimate.total))
    return table


def print_memory(config: Any, tokens: int | None = None, console: Console | None = None) -> None:
    """Print the estimate for a configuration of `fit`, as a table and as a line.

    Args:
        tokens: see `training_step`.
    """
    console = console or Console()
    step = training_step(config, tokens)
    estimate = memory_of(config, step)
    console.print(memory_table(estimate, step, config.model.init_args.base.name_or_path))
    what = (
        "as given by --tokens" if tokens else "data.max_length, the most that is let through (or --tokens N)"
    )
    console.print(f"{step.tokens} tokens of a prompt with its image and a response: {what}.")
    if step.responses > 1:
        console.print(f"{step.responses} responses to each prompt share a row.")
    console.print(f"# {memory_line(estimate, step)}", soft_wrap=True, highlight=False)


def _gib(size: int) -> str:
    value = size / 2**30
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
