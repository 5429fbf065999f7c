"""`vlm-calibration estimate-memory`: the GPU memory that every stage takes, and that of training with the usual changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from jsonargparse.typing import PositiveInt
from rich.console import Console

from vlm_calibration.arguments import Forwarded
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS

if TYPE_CHECKING:
    from vlm_calibration.stages.memory import Plan

SETTINGS = Forwarded(
    {
        CONFIG: "a stage (levels, sft, dpo, eval/jsonl, regions, ...) or an overlay such as model/qwen2_5_vl_7b; without a stage: all "
        "but regions (may be repeated)",
        **VARIABLE_OPTIONS,
    },
    lambda: "Settings of the stages may follow; `fit --help-all` lists those of training.",
)


def estimate(*settings: Annotated[str, SETTINGS], tokens: PositiveInt | None = None) -> None:
    """Estimate the GPU memory that stages take with the same settings, and training with the usual changes; needs neither a GPU nor the weights.

    Args:
        tokens: length of a prompt with its image and a response (default: data.max_length, or what data.max_pixels leads to)

    Raises:
        ArgumentError: a setting is unknown or wrong.
        DataError: a setting or a model cannot be used.
    """
    from vlm_calibration.commands.memory_plan import parse_stages, plan_of

    stages = parse_stages(settings)
    _print_memory(stages, plan_of(stages, tokens))


def _print_memory(stages: Mapping[str, Any], plan: Plan) -> None:
    from vlm_calibration.reporting.memory import choices_table, memory_line, memory_table
    from vlm_calibration.stages.memory import base_model, stage_of, stage_phases, training_step, usual_choices

    console = Console()
    phases = {name: stage_phases(config, plan) for name, config in stages.items()}
    models = [base_model(c, plan).name_or_path for c in stages.values() if stage_of(c) != "regions"]
    console.print(memory_table(phases, models[0] if models else "regions"))
    for name, of_stage in phases.items():
        for phase in of_stage:
            line = f"{name} {phase.name}: {phase.work}; peak: {phase.estimate.phase}"
            console.print(line, soft_wrap=True, highlight=False)
    for name in stages:
        if phases[name][0].name == "training":
            console.print(choices_table(usual_choices(stages[name], plan), f"{name} training, with"))
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
