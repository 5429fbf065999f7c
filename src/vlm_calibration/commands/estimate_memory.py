"""`vlm-calibration estimate-memory`: the GPU memory that every stage takes, and the settings with which they fit on a GPU."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jsonargparse.typing import PositiveInt
from rich.console import Console

from vlm_calibration.arguments import Forwarded
from vlm_calibration.commands.trainer import page_of
from vlm_calibration.errors import CommandError
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.stages.memory import Plan
    from vlm_calibration.stages.memory_search import PlanFit

CHECKPOINTING = "gradient_checkpointing"
SETTINGS = Forwarded(
    {
        CONFIG: "a stage (levels, sft, dpo, eval/jsonl, regions, ...) or an overlay such as model/qwen2_5_vl_7b; without a stage: all "
        "but regions (may be repeated)",
        **VARIABLE_OPTIONS,
    },
    lambda: "Every setting of the stages may follow; --help-all lists those of training.",
    partial(page_of, "fit"),
)


def estimate(
    *settings: Annotated[str, SETTINGS],
    tokens: PositiveInt | None = None,
    gpu: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Estimate the GPU memory that stages take with the same settings, or find settings that fit; needs neither a GPU nor the weights.

    Args:
        tokens: length of a prompt with its image and a response (default: data.max_length, or what data.max_pixels leads to)
        gpu: memory of a GPU, as 24GB; several as 24GB,80GB. Finds batch sizes, gradient checkpointing, quantisation and
            data.max_pixels with which all stages fit. A card sold as 24 GB has about 24 GiB, so GB and GiB mean the same here
        out: write the settings that fit to this YAML file, an overlay for all stages; with one GPU
        overwrite: replace the file if it exists

    Raises:
        ArgumentError: a setting is unknown or wrong.
        DataError: a setting or a model cannot be used.
        CommandError: nothing fits on one of the GPUs.
    """
    sizes = parse_gpus(gpu) if gpu is not None else {}
    if out is not None and len(sizes) != 1:
        raise ArgumentError(None, f"--out {out}: needs --gpu with one size, found {len(sizes)}")
    if out is not None and out.exists() and not overwrite:
        raise DataError(f"--out {out} exists: give another file, or --overwrite")
    from vlm_calibration.commands.memory_plan import parse_stages, plan_of

    stages = parse_stages(settings)
    plan = plan_of(stages, tokens)
    if sizes:
        _advise(stages, plan, sizes, out)
    else:
        _print_memory(stages, plan)


# --- The memory of given settings -----------------------------------------------------------------------------------


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
        sizes[part.strip()] = float(match[1]) * 2**30
    return sizes


def _print_memory(stages: Mapping[str, Any], plan: Plan) -> None:
    from vlm_calibration.reporting.memory import memory_line, memory_table
    from vlm_calibration.stages.memory import base_model, stage_of, stage_phases, training_step

    console = Console()
    phases = {name: stage_phases(config, plan) for name, config in stages.items()}
    models = [base_model(c, plan).name_or_path for c in stages.values() if stage_of(c) != "regions"]
    console.print(memory_table(phases, models[0] if models else "regions"))
    for name, of_stage in phases.items():
        for phase in of_stage:
            line = f"{name} {phase.name}: {phase.work}; peak: {phase.estimate.phase}"
            console.print(line, soft_wrap=True, highlight=False)
    for note in _notes(stages, plan):
        console.print(note, highlight=False)
    training = [name for name in stages if phases[name][0].name == "training"]
    if len(training) == 1:
        step = training_step(stages[training[0]], plan.tokens)
        console.print(
            f"# {memory_line(phases[training[0]][0].estimate, step)}", soft_wrap=True, highlight=False
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
        elif image.at_most(data.get("max_pixels")) is not None:
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


def _advise(stages: Mapping[str, Any], plan: Plan, sizes: Mapping[str, float], out: Path | None) -> None:
    """Print the settings that fit on each GPU, and write them to `out`.

    Args:
        stages: name -> its parsed configuration.
        plan: what the stages know of each other.
        sizes: GPU -> its bytes.
        out: file of the overlay; None: none is written.

    Raises:
        CommandError: nothing fits on one of the GPUs.
    """
    import yaml

    from vlm_calibration.files import write_text
    from vlm_calibration.reporting.memory import fit_table, in_gib
    from vlm_calibration.stages.memory_search import CONTEXT, FRAGMENTATION, fit_plan, usable_bytes

    console = Console()
    misses = []
    for gpu, size in sizes.items():
        with console.status(f"estimating for {gpu}"):
            fit = fit_plan(stages, plan, size)
        console.print(fit_table(fit, gpu))
        if not fit.fits:
            stage, worst = max(fit.stages.items(), key=lambda item: item[1].bytes)
            misses.append(
                f"{gpu}: nothing fits. With the smallest settings {stage} takes {in_gib(worst.bytes)} GiB, "
                f"{in_gib(round(worst.bytes - usable_bytes(size)))} GiB more than there is"
            )
            continue
        overlay = overlay_of(fit, stages)
        console.print(f"Settings for all stages: {command_line(overlay)}", highlight=False, soft_wrap=True)
        if out is not None:
            text = yaml.safe_dump(overlay, sort_keys=False)
            write_text(
                out, f"# Settings that fit on a GPU of {gpu}, by `vlm-calibration estimate-memory`.\n{text}"
            )
            console.print(f"wrote {out}: add --config {out} after the other configurations of every stage")
    console.print(
        f"A margin of {in_gib(round(CONTEXT))} GiB for the CUDA context and {FRAGMENTATION:.0%} of the rest for fragmentation is left free.",
        highlight=False,
    )
    if misses:
        raise CommandError(
            "; ".join(misses) + ": take a smaller model, or shard its weights (trainer/fsdp2)", 1
        )


def overlay_of(fit: PlanFit, stages: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all stages, as an overlay: batches as large as the stage with the least room allows.

    Raises:
        DataError: training stages have different effective batches, for which one setting cannot stand.
    """
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
        if any(
            s.checkpointing and not stages[name].model.init_args.gradient_checkpointing
            for name, s in training.items()
        ):
            init_args[CHECKPOINTING] = True
    data["eval_batch_size"] = min(s.eval_batch_size or 1 for s in fit.stages.values())
    if fit.shared is not None:
        config = next(c for c in stages.values() if "max_length" in c.data)
        for name in ("max_pixels", "max_length"):
            if getattr(fit.shared, name) != config.data.get(name):
                data[name] = getattr(fit.shared, name)
        if fit.shared.quantization != fit.quantization:
            init_args["base"] = {"quantization": fit.shared.quantization}
    if init_args:
        overlay["model"] = {"init_args": init_args}
    return overlay


def command_line(overlay: Mapping[str, Any]) -> str:
    """The settings of an overlay as arguments; gradient checkpointing apart, which only training has."""
    settings = list(_flat(overlay))
    shared = " ".join(f"--{key} {value}" for key, value in settings if not key.endswith(CHECKPOINTING))
    training = [f"--{key} true" for key, _ in settings if key.endswith(CHECKPOINTING)]
    return f"{shared}; in training also {training[0]}" if training else shared


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
