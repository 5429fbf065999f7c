"""What a stage's configuration asks of a GPU: its training steps, its answers to a batch, its detectors, each with an estimate.

The stage is told by the class of the module. Settings are those of the parsed configuration; nothing is instantiated or loaded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from vlm_calibration.estimators.answer_scoring import EVERY_PERCENT
from vlm_calibration.estimators.probes import COPIES
from vlm_calibration.models.activations import RESPONSE_TOKENS, TrainingStep
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.answer_memory import AnsweringStep
from vlm_calibration.models.base import BaseModel, base_of_adapters
from vlm_calibration.models.image_tokens import image_tokens
from vlm_calibration.models.loading import check_blocks, empty_vlm, model_config, quantised_layers
from vlm_calibration.models.memory import MemoryEstimate, estimate_answering, estimate_memory
from vlm_calibration.records import DataError
from vlm_calibration.regions.detector import ZeroShotDetector
from vlm_calibration.regions.memory import detector_memory, segmenter_memory
from vlm_calibration.regions.segmenter import PromptedSegmenter
from vlm_calibration.stages.gpu_shares import on_each_gpu

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer states for each trained parameter."""
LEVELS = 11
"""Confidences of a scale: 0%, 10%, ... 100%."""
LEVEL_TOKENS = 3
"""Tokens of each further confidence when all of a scale are scored after an answer."""
COPY_RESPONSES = 3
"""Responses that `Stability` scores with a copy of an image: the answer, and for yes/no questions both words."""
TEXT_TOKENS = 256
"""Tokens of a prompt and its response beside the image: question, request for a confidence, chat template, answer."""
RANKED_TOKENS = 128
"""Tokens of each of two answers that `data.grading` ranks."""
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


class Phase(NamedTuple):
    """A part of a stage's work, which takes memory of its own.

    Attributes:
        name: "training", "validation", "answers", "describer", "detector" or "segmenter".
        work: what is done at a time, in words.
        estimate: its memory.
    """

    name: str
    work: str
    estimate: MemoryEstimate


@dataclass(frozen=True)
class Plan:
    """What stages of one plan know of each other before any has run.

    Args:
        tokens: tokens of a prompt with its image and a response, instead of those that the settings allow.
        base: base model of a stage that takes it from adapters which do not exist yet.
        lora: the adapters that are evaluated.
        adapters: how many there are if the settings name none.
    """

    tokens: int | None = None
    base: BaseModel | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    adapters: int = 0


class Row(NamedTuple):
    """Tokens of a prompt with its image, and of the image; None for the image: not told apart."""

    tokens: int
    image: int | None


def stage_of(config: Any) -> str:
    """The stage of a configuration: "sft", "dpo", "levels", "evaluation" or "regions".

    Raises:
        DataError: there is no estimate for its module.
    """
    names = {
        "SFTModule": "sft",
        "DPOModule": "dpo",
        "LevelFitModule": "levels",
        "EvaluationModule": "evaluation",
        "RegionExtractor": "regions",
    }
    name = config.model.class_path.rpartition(".")[-1]
    if name not in names:
        raise DataError(f"model.class_path: no estimate for {name}, expected one of {', '.join(names)}")
    return names[name]


def stage_phases(config: Any, plan: Plan = Plan()) -> list[Phase]:
    """The phases of a stage with their memory on one GPU.

    Args:
        config: a stage's configuration, as the parser returns it.
        plan: what is known beside it.

    Raises:
        DataError: no estimate for a setting, or a model does not exist.
    """
    stage = stage_of(config)
    if stage == "regions":
        return _region_phases(config)
    if stage not in ("sft", "dpo"):
        return [answer_phase(config, plan)]
    training = training_phase(config, plan)
    return [
        training,
        *own_answer_phases(config, plan, training.estimate),
        *validation_phases(config, plan, training.estimate),
    ]


# --- Training -------------------------------------------------------------------------------------------------------


def training_step(config: Any, tokens: int | None = None) -> TrainingStep:
    """Describe the training step of a configuration of `fit`.

    Args:
        config: as the parser returns it.
        tokens: length of a prompt with one response; None: the longest that the configuration allows.

    Raises:
        DataError: no estimate for this precision, or there is no such model.
    """
    autocast, cast = _precision(config)
    settings = config.model.init_args
    row = longest_row(base_model(config), config.data, tokens, training=True)
    batch, responses = config.data.batch_size, _responses(settings, config.data)
    separate = settings.get("scoring") == "plain"
    return TrainingStep(
        batch=batch * responses if separate else batch,
        tokens=row.tokens,
        image_tokens=row.image,
        responses=1 if separate else responses,
        shares_image=responses if separate else 1,
        checkpointing=settings.gradient_checkpointing,
        autocast=autocast,
        cast=cast,
    )


def training_memory(config: Any, step: TrainingStep) -> MemoryEstimate:
    """Estimate the memory of a training step with the settings of `fit`.

    An adapter that training continues from is assumed to be as `model.lora` describes it.

    Raises:
        DataError: there is no such model, or the module trains no adapter.
    """
    settings = config.model.init_args
    if "lora" not in settings or "base" not in settings:
        raise DataError(f"{config.model.class_path} trains no adapter: give the settings of `fit`")
    return estimate_memory(
        base_model(config),
        LoraSettings(**settings.lora.as_dict()),
        step,
        optimizer_bytes=STATE_BYTES[settings.optimizer.get("name", "adamw")],
        reference=settings.get("reference") == "adapter",
        trained=settings.get("parts"),
    )


def training_phase(config: Any, plan: Plan) -> Phase:
    """The training steps of a configuration of `fit`, with the memory of one of its GPUs."""
    step = training_step(config, plan.tokens)
    checkpointing = "with" if step.checkpointing else "without"
    shared = f" for {step.responses} responses each" if step.responses > 1 else ""
    work = f"{step.batch} rows of {step.row} tokens{shared}, {checkpointing} checkpointing"
    return Phase("training", work, on_each_gpu(training_memory(config, step), config.trainer))


def usual_choices(config: Any, plan: Plan) -> dict[str, int]:
    """Bytes of a training step with the changes that are tried first where memory is short: each alone, then all together.

    Args:
        config: of `fit`.
        plan: what is known beside it.

    Returns:
        The changed settings as arguments of the command line -> bytes on one GPU.
    """
    settings, data, base = config.model.init_args, config.data, base_model(config, plan)
    changes: list[dict[str, Any]] = []
    if not settings.gradient_checkpointing:
        changes.append({"model.init_args.gradient_checkpointing": True})
    if base.quantization == "none" and _can_quantise(base):
        changes.append({"model.init_args.base.quantization": "nf4"})
    if data.batch_size > 1:
        accumulated = 2 * (config.trainer.get("accumulate_grad_batches") or 1)
        changes.append(
            {"data.batch_size": data.batch_size // 2, "trainer.accumulate_grad_batches": accumulated}
        )
    image = image_tokens(model_config(base))
    half = (image.at_most(data.get("max_pixels")) or data.max_length - TEXT_TOKENS) // 2
    if half >= image.tokens and (limit := image.limit(half)) is not None:
        changes.append({"data.max_pixels": limit})
    if len(changes) > 1:
        changes.append({key: value for change in changes for key, value in change.items()})
    sizes = {}
    for change in changes:
        changed = config.clone()
        for key, value in change.items():
            changed[key] = value
        arguments = " ".join(f"--{key} {str(value).lower()}" for key, value in change.items())
        sizes[arguments] = training_phase(changed, plan).estimate.total
    return sizes


def _can_quantise(base: BaseModel) -> bool:
    """Whether all layers that nf4 quantises have a width that is a multiple of its blocks."""
    model = empty_vlm(base)
    try:
        check_blocks(model, set(quantised_layers(model)))
    except ValueError:
        return False
    return True


def validation_phases(config: Any, plan: Plan, training: MemoryEstimate) -> list[Phase]:
    """The answers to validation queries, while the states of training are kept; none if validation is off.

    Args:
        config: of `fit`.
        plan: as for `stage_phases`.
        training: memory of a training step on one of the GPUs.
    """
    data, settings = config.data, config.model.init_args
    if data.get("validation") is None or config.trainer.get("limit_val_batches") == 0:
        return []
    step = _answering_step(base_model(config), config, plan)
    if (responses := _responses(settings, data)) > 1:
        candidates = (responses, RESPONSE_TOKENS)
        step = replace(step, systems=2, ranked=max(step.ranked or candidates, candidates, key=math.prod))
    return [_answers_in_training("validation", step, config, training)]


def own_answer_phases(config: Any, plan: Plan, training: MemoryEstimate) -> list[Phase]:
    """The reference's answers within a training step, with the scores of their candidates; none where gold answers are compared.

    Args:
        config: of `fit`.
        plan: as for `stage_phases`.
        training: memory of a training step on one of the GPUs.
    """
    candidates = config.data.get("candidates")
    if candidates is None or candidates.answers != "own":
        return []
    settings = config.model.init_args
    target = settings.pairs.target
    features = settings.teacher.features if target == "fitted" else [target]
    step = replace(
        _answering_step(base_model(config), config, plan),
        batch=config.data.batch_size,
        scored_tokens=settings.max_new_tokens + _responses(settings, config.data) * LEVEL_TOKENS,
        sampled="self_consistency" in features,
    )
    return [_answers_in_training("own answers", step, config, training)]


def _answers_in_training(name: str, step: AnsweringStep, config: Any, training: MemoryEstimate) -> Phase:
    settings = config.model.init_args
    estimate = estimate_answering(
        base_model(config),
        step,
        lora=LoraSettings(**settings.lora.as_dict()),
        adapters=1 + (settings.get("reference") == "adapter"),
        training=True,
    )
    kept = ("trained", "weights", "gradients", "optimizer", "buckets", "gathered")
    estimate = replace(estimate, **{field: getattr(training, field) for field in kept})
    return Phase(name, _answer_work(step), estimate)


def _responses(settings: Any, data: Any) -> int:
    """The largest number of responses to a prompt that are compared."""
    if "pairs" not in settings or data.get("candidates") is None:
        return 1
    pairs = settings.pairs
    rejected = LEVELS - 1 if pairs.rejected == "all" else pairs.n_rejected or 1
    return 1 + int(rejected) + bool(data.candidates.wrong_answer)


# --- Answers --------------------------------------------------------------------------------------------------------


def answer_phase(config: Any, plan: Plan) -> Phase:
    """The answers of `levels fit` or of an evaluation, whose systems share one copy of the base model."""
    settings = config.model.init_args
    base = base_model(config, plan)
    step = _answering_step(base, config, plan)
    adapters = 0
    if stage_of(config) == "evaluation":
        adapters = len(settings.get("adapters") or {}) or plan.adapters
        names = {e.class_path.rpartition(".")[-1] for e in settings.get("estimators") or ()}
        step = replace(
            step,
            systems=adapters + bool(settings.get("with_base")),
            scored_tokens=_scored_tokens(settings) if names or settings.get("probes") else 0,
            sampled="SelfConsistency" in names,
            copied=_copied_responses(settings, names),
        )
    estimate = estimate_answering(base, step, lora=plan.lora, adapters=adapters)
    return Phase("answers", _answer_work(step), on_each_gpu(estimate, config.trainer))


def _answering_step(base: BaseModel, config: Any, plan: Plan) -> AnsweringStep:
    autocast, cast = _precision(config)
    row = longest_row(base, config.data, plan.tokens, training=False)
    ranks = stage_of(config) != "evaluation" and (config.data.get("grading") or {}).get("rank_levels")
    return AnsweringStep(
        batch=config.data.eval_batch_size,
        tokens=row.tokens,
        new_tokens=config.model.init_args.max_new_tokens,
        image_tokens=row.image,
        ranked=(2, RANKED_TOKENS) if ranks else None,
        autocast=autocast,
        cast=cast,
    )


def _scored_tokens(settings: Any) -> int:
    """Tokens of an answer and of every percent after it, which estimators score."""
    return settings.max_new_tokens + EVERY_PERCENT.n_levels * LEVEL_TOKENS


def _copied_responses(settings: Any, estimators: Collection[str]) -> tuple[int, int] | None:
    """The responses that are scored with perturbed copies of an image, and the tokens of each."""
    copied = []
    if "Stability" in estimators:
        copied.append((COPY_RESPONSES, settings.max_new_tokens))
    if set(settings.get("probes") or ()) & set(COPIES):
        copied.append((1, _scored_tokens(settings)))
    return max(copied, key=math.prod, default=None)


def _answer_work(step: AnsweringStep) -> str:
    work = f"{step.batch} prompts of {step.tokens} tokens, up to {step.new_tokens} new ones"
    parts = {
        f"{step.systems} systems": step.systems > 1,
        "scored responses": step.scored_tokens,
        "sampled answers": step.sampled,
        "perturbed copies": step.copied,
        "ranked answers": step.ranked,
    }
    return ", ".join([work, *(name for name, used in parts.items() if used)])


# --- Regions --------------------------------------------------------------------------------------------------------


def _region_phases(config: Any) -> list[Phase]:
    """The models of region extraction, all of which stay loaded; a describer by rules needs no GPU."""
    settings, batch = config.model.init_args, config.data.eval_batch_size
    phases = []
    describer = settings.describer
    if describer.class_path.endswith(".PromptedDescriber"):
        base = BaseModel(**describer.init_args.base.as_dict())
        row = longest_row(base, config.data, None, training=False, limited=False)
        step = AnsweringStep(batch, row.tokens, describer.init_args.max_new_tokens, row.image)
        phases.append(Phase("describer", _answer_work(step), estimate_answering(base, step)))
    for name, kind, estimate in (
        ("detector", ZeroShotDetector, detector_memory),
        ("segmenter", PromptedSegmenter, segmenter_memory),
    ):
        part = settings[name]
        if part.class_path.endswith(f".{kind.__name__}"):
            found = estimate(kind(**part.init_args.as_dict()), batch)  # type: ignore[arg-type]
            phases.append(Phase(name, f"{batch} images", found))
    if not phases:
        raise DataError("model: no estimate for any of its describer, detector and segmenter")
    return [phase._replace(estimate=_beside(phase, phases)) for phase in phases]


def _beside(phase: Phase, phases: Sequence[Phase]) -> MemoryEstimate:
    """The estimate of a phase with the weights of all models."""
    weights: Counter[str] = Counter()
    for each in phases:
        weights.update(each.estimate.weights)
    return replace(
        phase.estimate, weights=dict(weights), parameters=sum(p.estimate.parameters for p in phases)
    )


# --- Settings -------------------------------------------------------------------------------------------------------


def base_model(config: Any, plan: Plan = Plan()) -> BaseModel:
    """The base model of a stage: that of its settings, of the adapters that it names, or of the plan.

    Raises:
        DataError: there is none.
    """
    settings = config.model.init_args
    if settings.get("base") is not None:
        return BaseModel(**settings.base.as_dict())
    return plan.base or base_of_adapters({n: str(a) for n, a in (settings.get("adapters") or {}).items()})


def longest_row(
    base: BaseModel, data: Any, tokens: int | None, *, training: bool, limited: bool = True
) -> Row:
    """The longest prompt with its image and a response.

    In training that is `data.max_length`, which nothing longer passes, or with `data.max_pixels` the largest image and
    `TEXT_TOKENS`. An evaluation refuses no prompt, and takes the second wherever the number of image tokens is known.

    Args:
        base: the model.
        data: settings of the data.
        tokens: takes precedence over them.
        training: whether rows are those of training.
        limited: whether `data.max_pixels` applies to the model.
    """
    max_pixels = data.get("max_pixels") if limited else None
    image = image_tokens(model_config(base)).at_most(max_pixels)
    longest = tokens or data.max_length
    if tokens is None and image is not None and (max_pixels or not training):
        longest = min(longest, image + TEXT_TOKENS)
    return Row(longest, None if image is None else min(image, longest))


def _precision(config: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes of autocast and of all weights that `trainer.precision` sets."""
    precision = str(config.trainer.get("precision") or "32-true")
    if precision not in PRECISIONS:
        raise DataError(f"trainer.precision: no estimate for {precision!r}, expected {', '.join(PRECISIONS)}")
    autocast, cast = (getattr(torch, name) if name else None for name in PRECISIONS[precision])
    return autocast, cast
