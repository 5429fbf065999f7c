"""`vlm-calibration estimate-memory`: the GPU memory that `fit` takes, as a table and as a line for a configuration's comment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from vlm_calibration.arguments import Forwarded
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.models.activations import TrainingStep
    from vlm_calibration.models.memory import MemoryEstimate

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer states for each trained parameter."""
LEVELS = 11
"""Responses to a prompt where all levels are compared: 0%, 10%, ... 100%."""
PRECISIONS: dict[str, tuple[str | None, str | None]] = {
    "32": (None, None),
    "32-true": (None, None),
    "bf16": ("bfloat16", None),
    "bf16-mixed": ("bfloat16", None),
    "16": ("float16", None),
    "16-mixed": ("float16", None),
    "bf16-true": (None, "bfloat16"),
    "16-true": (None, "float16"),
}
"""trainer.precision -> the dtype of autocast, and the dtype that the Trainer casts all weights to."""
SETTINGS = Forwarded(
    {
        CONFIG: 'a configuration of `fit`: "sft" or "dpo", and overlays after it (may be repeated)',
        **VARIABLE_OPTIONS,
    },
    "Every setting of `fit` may follow: `vlm-calibration fit --help` lists them.",
)


def estimate(*settings: Annotated[str, SETTINGS], tokens: PositiveInt | None = None) -> None:
    """Estimate the GPU memory that `fit` takes with the same settings; needs neither a GPU nor the weights.

    Args:
        tokens: length of a prompt with its image and a response (default: data.max_length, the longest that is allowed)

    Raises:
        ArgumentError: a setting is unknown or wrong.
        DataError: a setting or a model cannot be used.
    """
    from vlm_calibration.commands.lightning_cli import parsed_fit

    _print_memory(parsed_fit(settings), tokens)


def training_step(config: Any, tokens: int | None = None) -> TrainingStep:
    """Describe the training step of a configuration of `fit`.

    Args:
        config: as the parser returns it.
        tokens: length of a prompt with one response; None: the longest that the configuration allows.

    Raises:
        DataError: no estimate for this precision.
    """
    import torch

    from vlm_calibration.models.activations import TrainingStep

    precision = str(config.trainer.get("precision") or "32-true")
    if precision not in PRECISIONS:
        raise DataError(f"trainer.precision: no estimate for {precision!r}, expected {', '.join(PRECISIONS)}")
    autocast, cast = (getattr(torch, name) if name else None for name in PRECISIONS[precision])
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
    """The largest number of responses to a prompt that are compared."""
    if "pairs" not in settings or data.get("candidates") is None:
        return 1
    pairs = settings.pairs
    rejected = LEVELS - 1 if pairs.rejected == "all" else pairs.n_rejected or 1
    return 1 + int(rejected) + bool(data.candidates.wrong_answer)


def memory_of(config: Any, step: TrainingStep) -> MemoryEstimate:
    """Estimate the memory of a step with the settings of `fit`.

    An adapter that training continues from is assumed to be as `model.lora` describes it.

    Raises:
        DataError: there is no such model, or the module trains no adapter.
    """
    from vlm_calibration.models.adapters import LoraSettings
    from vlm_calibration.models.loading import BaseModel
    from vlm_calibration.models.memory import estimate_memory

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
    """Summarise an estimate in one line."""
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
    """Break an estimate down into a table, in GiB."""
    checkpointing = "with" if step.checkpointing else "without"
    table = Table(
        title=f"{name}\n{step.batch} rows of {step.row} tokens, {checkpointing} checkpointing",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption=(
            "The tensors at the peak of a training step. The CUDA context, memory that the allocator loses and\n"
            "the second copy of the gradients under DDP are not included."
        ),
    )
    table.add_column("on one GPU")
    table.add_column("GiB", justify="right")
    table.add_row(f"{_count(estimate.parameters)} parameters, the adapter's included", "")
    table.add_row(f"{_count(estimate.trained)} of them trained", "", end_section=True)
    for dtype, size in sorted(estimate.weights.items()):
        table.add_row(f"weights in {dtype}", _gib(size))
    table.add_row("gradients", _gib(estimate.gradients))
    table.add_row("optimizer states", _gib(estimate.optimizer))
    table.add_row("activations, at most", _gib(estimate.activations))
    table.add_row("  alone at the output head", _gib(estimate.logits), end_section=True)
    table.add_row("total", _gib(estimate.total))
    return table


def _print_memory(config: Any, tokens: int | None) -> None:
    console = Console()
    step = training_step(config, tokens)
    estimated = memory_of(config, step)
    console.print(memory_table(estimated, step, config.model.init_args.base.name_or_path))
    source = "as given by --tokens" if tokens else "data.max_length, the longest allowed (or --tokens N)"
    console.print(f"{step.tokens} tokens of a prompt with its image and a response: {source}.")
    if step.responses > 1:
        console.print(f"{step.responses} responses to each prompt share a row.")
    console.print(f"# {memory_line(estimated, step)}", soft_wrap=True, highlight=False)


def _gib(size: int) -> str:
    value = size / 2**30
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
