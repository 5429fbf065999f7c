"""`vlm-calibration estimate-memory`: the GPU memory that every stage takes, and the settings with which they fit on a GPU."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from vlm_calibration.arguments import Forwarded
from vlm_calibration.errors import CommandError
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS

if TYPE_CHECKING:
    from vlm_calibration.models.activations import TrainingStep
    from vlm_calibration.models.memory import MemoryEstimate
    from vlm_calibration.stages.memory import Phase, Plan
    from vlm_calibration.stages.memory_search import PlanFit

GIB = 2**30
SETTINGS = Forwarded(
    {
        CONFIG: "a stage (levels, sft, dpo, eval/jsonl, regions, ...) or an overlay such as model/qwen2_5_vl_7b; without a stage: all "
        "but regions (may be repeated)",
        **VARIABLE_OPTIONS,
    },
    "Every setting of the stages may follow: `vlm-calibration fit --help` lists those of training.",
)


def estimate(
    *settings: Annotated[str, SETTINGS],
    tokens: PositiveInt | None = None,
    gpu: str | None = None,
    out: Path | None = None,
) -> None:
    """Estimate the GPU memory that stages take with the same settings, or find settings that fit; needs neither a GPU nor the weights.

    Args:
        tokens: length of a prompt with its image and a response (default: data.max_length, or what data.max_pixels leads to)
        gpu: memory of a GPU, as 24GB; several as 24GB,80GB. Finds batch sizes, gradient checkpointing, quantisation and
            data.max_pixels with which all stages fit. A card sold as 24 GB has about 24 GiB, so GB and GiB mean the same here
        out: write the settings that fit to this YAML file, an overlay for all stages; with one GPU

    Raises:
        ArgumentError: a setting is unknown or wrong.
        DataError: a setting or a model cannot be used.
        CommandError: nothing fits on one of the GPUs.
    """
    sizes = parse_gpus(gpu) if gpu is not None else {}
    if out is not None and len(sizes) != 1:
        raise ArgumentError(None, f"--out {out}: needs --gpu with one size, found {len(sizes)}")
    from vlm_calibration.commands.memory_plan import parse_stages, plan_of

    stages = parse_stages(settings)
    plan = plan_of(stages, tokens)
    if sizes:
        _advise(stages, plan, sizes, out)
    else:
        _print_memory(stages, plan)


def parse_gpus(text: str) -> dict[str, float]:
    """Read sizes such as "24GB,80GiB"; returns each as it was given -> bytes.

    Raises:
        ArgumentError: not a list of sizes.
    """
    sizes = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB?|GiB)\s*", part, re.IGNORECASE)
        if match is None or float(match[1]) <= 0:
            raise ArgumentError(
                None, f"--gpu: expected a size such as 24GB, or several as 24GB,80GB, found {text!r}"
            )
        sizes[part.strip()] = float(match[1]) * GIB
    return sizes


# --- The memory of given settings -----------------------------------------------------------------------------------


def _print_memory(stages: Mapping[str, Any], plan: Plan) -> None:
    from vlm_calibration.stages.memory import base_model, stage_of, stage_phases, training_step

    console = Console()
    phases = {name: stage_phases(config, plan) for name, config in stages.items()}
    models = [base_model(c, plan).name_or_path for c in stages.values() if stage_of(c) != "regions"]
    console.print(memory_table(phases, models[0] if models else "regions"))
    for name, of_stage in phases.items():
        for phase in of_stage:
            console.print(
                f"{name}, {phase.name}: {phase.work}; most while: {phase.estimate.phase}", highlight=False
            )
    for note in _notes(stages, plan):
        console.print(note, highlight=False)
    training = [name for name in stages if phases[name][0].name == "training"]
    if len(training) == 1:
        step = training_step(stages[training[0]], plan.tokens)
        console.print(
            f"# {memory_line(phases[training[0]][0].estimate, step)}", soft_wrap=True, highlight=False
        )


def memory_table(phases: Mapping[str, Sequence[Phase]], model: str) -> Table:
    """Compare the phases of stages in a table, in GiB."""
    table = Table(
        title=model,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption=(
            "The tensors at each phase's peak. The CUDA context and memory that the allocator loses are not\n"
            "included: --gpu leaves a margin for them."
        ),
    )
    columns = [(name, phase) for name, of_stage in phases.items() for phase in of_stage]
    table.add_column("GiB on one GPU")
    for name, phase in columns:
        table.add_column(f"{name}\n{phase.name}", justify="right")
    estimates = [phase.estimate for _, phase in columns]
    table.add_row("parameters, adapters included", *(_count(e.parameters) for e in estimates))
    table.add_row("  of them trained", *(_count(e.trained) for e in estimates), end_section=True)
    for dtype in sorted({dtype for e in estimates for dtype in e.weights}):
        table.add_row(f"weights in {dtype}", *(_cell(e.weights.get(dtype, 0)) for e in estimates))
    for label, field in (
        ("weights gathered at a time", "gathered"),
        ("gradients", "gradients"),
        ("gradients, copy of DDP", "buckets"),
        ("optimizer states", "optimizer"),
        ("images", "pixels"),
        ("keys and values", "cache"),
        ("activations, at most", "activations"),
    ):
        if any(getattr(e, field) for e in estimates):
            table.add_row(label, *(_cell(getattr(e, field)) for e in estimates))
    table.add_section()
    table.add_row("total", *(_gib(e.total) for e in estimates))
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
    added = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return (
        f"{_count(estimate.parameters)} parameters, {_count(estimate.trained)} trained. "
        f"{step.batch} x {step.row} tokens: {added} = {_gib(estimate.total)} GiB"
    )


def _notes(stages: Mapping[str, Any], plan: Plan) -> list[str]:
    """Where the number of tokens comes from, and what is not covered."""
    from vlm_calibration.models.image_tokens import image_tokens
    from vlm_calibration.models.loading import model_config
    from vlm_calibration.stages.gpu_shares import sharing_of
    from vlm_calibration.stages.memory import TEXT_TOKENS, base_model, stage_of

    models = [c for c in stages.values() if stage_of(c) != "regions"]
    notes = []
    if models:
        data = models[0].data
        image = image_tokens(model_config(base_model(models[0], plan)))
        if plan.tokens:
            notes.append("Tokens of a prompt with its image and a response: as given by --tokens.")
        elif data.get("max_pixels") or image.kind == "fixed":
            notes.append(
                f"Tokens of a prompt with its image and a response: the largest image and {TEXT_TOKENS} of text, at most "
                "data.max_length (or --tokens N); in training without data.max_pixels data.max_length."
            )
        else:
            notes.append(
                "Tokens of a prompt with its image and a response: data.max_length, the longest allowed (or --tokens N). Only "
                "training refuses longer ones: set data.max_pixels so that answers keep to it as well."
            )
    shares = {sharing_of(c.trainer).note for c in models if stage_of(c) in ("sft", "dpo")}
    return [*notes, *(f"Several GPUs: {note}." for note in sorted(shares) if note)]


# --- Settings that fit ----------------------------------------------------------------------------------------------


def _advise(stages: Mapping[str, Any], plan: Plan, sizes: Mapping[str, float], out: Path | None) -> None:
    from vlm_calibration.files import write_text
    from vlm_calibration.stages.memory_search import CONTEXT, FRAGMENTATION, fit_plan, usable_bytes

    console = Console()
    misses = []
    for gpu, size in sizes.items():
        with console.status(f"estimating for {gpu}"):
            fit = fit_plan(stages, plan, size)
        console.print(fit_table(fit, stages, gpu))
        if not fit.fits:
            stage, worst = max(fit.stages.items(), key=lambda item: item[1].bytes)
            misses.append(
                f"{gpu}: nothing fits. With the smallest settings {stage} takes {_gib(worst.bytes)} GiB, "
                f"{_gib(round(worst.bytes - usable_bytes(size)))} GiB more than there is"
            )
            continue
        overlay = overlay_of(fit, stages)
        if out is not None:
            write_text(
                out,
                f"# Settings that fit on a GPU of {gpu}, by `vlm-calibration estimate-memory`.\n{overlay}",
            )
            console.print(f"wrote {out}: add --config {out} after the other configurations of every stage")
        else:
            console.print(
                f"For all stages, as an overlay (--out FILE writes it):\n\n{overlay}", highlight=False
            )
    console.print(
        f"A margin of {_gib(round(CONTEXT))} GiB for the CUDA context and {FRAGMENTATION:.0%} of the rest for fragmentation is left free.",
        highlight=False,
    )
    if misses:
        raise CommandError(
            "; ".join(misses) + ": take a smaller model, or shard its weights (trainer/fsdp2)", 1
        )


def fit_table(fit: PlanFit, stages: Mapping[str, Any], gpu: str) -> Table:
    """Compare what fits in each stage."""
    title = gpu
    if fit.shared is not None:
        pixels = fit.shared.max_pixels or "the processor's"
        title = (
            f"{gpu}: quantization {fit.shared.quantization}, data.max_pixels {pixels}, "
            f"data.max_length {fit.shared.max_length}"
        )
    table = Table(title=title, title_justify="left", title_style="bold")
    columns = (
        "data.batch_size",
        "accumulate_grad_batches",
        "gradient_checkpointing",
        "data.eval_batch_size",
        "GiB",
        "",
    )
    table.add_column("stage")
    for name in columns:
        table.add_column(name, justify="right")
    for name in stages:
        stage = fit.stages[name]
        settings = (stage.batch_size, stage.accumulate, stage.checkpointing, stage.eval_batch_size)
        cells = ["-" if value is None else str(value).lower() for value in settings]
        table.add_row(name, *cells, _gib(stage.bytes), "fits" if stage.fits else "does not fit")
    return table


def overlay_of(fit: PlanFit, stages: Mapping[str, Any]) -> str:
    """The settings of all stages as YAML: batches as large as the stage with the least room allows.

    Raises:
        DataError: training stages have different effective batches, for which one setting cannot stand.
    """
    import yaml

    from vlm_calibration.records import DataError

    training = {name: s for name, s in fit.stages.items() if s.batch_size and s.accumulate}
    effective = {name: (s.batch_size or 1) * (s.accumulate or 1) for name, s in training.items()}
    if len(set(effective.values())) > 1:
        raise DataError(
            "stages have different effective batches, data.batch_size x trainer.accumulate_grad_batches: "
            + ", ".join(f"{name} {size}" for name, size in effective.items())
            + ": give one stage at a time"
        )
    data: dict[str, Any] = {}
    init_args: dict[str, Any] = {}
    overlay: dict[str, Any] = {"data": data}
    if training:
        data["batch_size"] = min(s.batch_size or 1 for s in training.values())
        accumulate = next(iter(effective.values())) // data["batch_size"]
        overlay = {"trainer": {"accumulate_grad_batches": accumulate}, **overlay}
        if any(s.checkpointing for s in training.values()):
            init_args["gradient_checkpointing"] = True
    data["eval_batch_size"] = min(s.eval_batch_size or 1 for s in fit.stages.values())
    if fit.shared is not None:
        config = next(c for c in stages.values() if "max_length" in c.data)
        for name in ("max_pixels", "max_length"):
            if getattr(fit.shared, name) != config.data.get(name):
                data[name] = getattr(fit.shared, name)
        if fit.shared.quantization != "none":
            init_args["base"] = {"quantization": fit.shared.quantization}
    if init_args:
        overlay["model"] = {"init_args": init_args}
    return yaml.safe_dump(overlay, sort_keys=False)


def _cell(size: int) -> str:
    return _gib(size) if size else "-"


def _gib(size: int) -> str:
    value = size / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
