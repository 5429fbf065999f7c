"""Settings with which a plan's stages fit on a GPU, found by estimates.

Quality comes first. The search changes settings in this order and stops at the first with which every stage fits:

1. gradient checkpointing on, then fewer queries per training step, with `accumulate_grad_batches` raised so that the effective batch
   stays the same; and fewer queries per batch of answers. None of these changes a result.
2. nf4 quantisation of the language model.
3. smaller images (`data.max_pixels`): half the image's tokens, a quarter, ... down to `FEWEST_IMAGE_TOKENS`.

Quantisation and image size are the same in all stages, because levels and adapters hold only for the model and images that they were
made with. Where there is room, batches become larger than the configuration's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vlm_calibration.models.base import BaseModel, Quantization
from vlm_calibration.models.image_tokens import image_tokens
from vlm_calibration.models.loading import check_blocks, empty_vlm, model_config, quantised_layers
from vlm_calibration.stages.memory import (
    TEXT_TOKENS,
    Plan,
    answer_phase,
    base_model,
    stage_of,
    stage_phases,
    training_phase,
    validation_phases,
)

CONTEXT = 0.75 * 2**30
"""Bytes of a GPU that the CUDA context and libraries take."""
FRAGMENTATION = 0.05
"""Share of the rest that the allocator loses between tensors."""
FEWEST_IMAGE_TOKENS = 256
"""Tokens below which no image is shrunk: about 450 x 450 pixels of a Qwen2.5-VL."""
MOST_ANSWERS = 64
"""Queries per batch of answers beyond which a batch is not made larger."""


def usable_bytes(gpu_bytes: float) -> float:
    """Bytes of a GPU that tensors can take."""
    return (gpu_bytes - CONTEXT) * (1 - FRAGMENTATION)


class Shared(NamedTuple):
    """Settings that are the same in all stages.

    Attributes:
        quantization: of the base model.
        max_pixels: `data.max_pixels`.
        max_length: `data.max_length`.
    """

    quantization: Quantization
    max_pixels: int | None
    max_length: int


@dataclass(frozen=True)
class StageFit:
    """Settings of one stage, and the bytes that it takes with them.

    Attributes:
        bytes: at the peak of its largest phase.
        fits: whether that is as much as the GPU has.
        eval_batch_size: `data.eval_batch_size`; None: the stage answers nothing.
        batch_size: `data.batch_size`; None: the stage trains nothing.
        accumulate: `trainer.accumulate_grad_batches`.
        checkpointing: `gradient_checkpointing`.
    """

    bytes: int
    fits: bool
    eval_batch_size: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    checkpointing: bool | None = None


@dataclass(frozen=True)
class PlanFit:
    """Settings of all stages for one GPU.

    Attributes:
        shared: settings of all stages; None: no stage has a vision-language model.
        stages: name -> its settings. If not all fit, those that take the least.
        quantization: of the configuration.
    """

    shared: Shared | None
    stages: Mapping[str, StageFit]
    quantization: Quantization = "none"

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages.values())


def fit_plan(stages: Mapping[str, Any], plan: Plan, gpu_bytes: float) -> PlanFit:
    """Search settings with which every stage fits on a GPU.

    Args:
        stages: name -> its parsed configuration.
        plan: what the stages know of each other.
        gpu_bytes: memory of the GPU.

    Raises:
        DataError: no estimate for a setting, or a model does not exist.
    """
    usable = usable_bytes(gpu_bytes)
    models = {name: config for name, config in stages.items() if stage_of(config) != "regions"}
    regions = {
        name: _fit_regions(config, usable) for name, config in stages.items() if stage_of(config) == "regions"
    }
    if not models:
        return PlanFit(None, regions)
    base = base_model(next(iter(models.values())), plan)
    *larger, smallest = shared_settings(list(models.values()), plan)
    for shared in larger:
        fits: dict[str, StageFit] = {}
        for name, config in models.items():
            fits[name] = _fit_stage(config, shared, plan, usable)
            if not fits[name].fits:
                break
        else:
            return PlanFit(shared, {name: {**fits, **regions}[name] for name in stages}, base.quantization)
    fits = {name: _fit_stage(config, smallest, plan, usable) for name, config in models.items()}
    return PlanFit(smallest, {name: {**fits, **regions}[name] for name in stages}, base.quantization)


def _fit_stage(config: Any, shared: Shared, plan: Plan, usable: float) -> StageFit:
    changed, known = with_shared(config, shared, plan)
    fit = _fit_training if stage_of(config) in ("sft", "dpo") else _fit_answers
    return fit(changed, known, usable)


def shared_settings(configs: Sequence[Any], plan: Plan) -> Iterator[Shared]:
    """The settings that all stages share, from those of the configuration to those that take the least memory."""
    base = base_model(configs[0], plan)
    kinds: list[Quantization] = [base.quantization]
    if base.quantization == "none" and _can_quantise(base, configs):
        kinds.append("nf4")
    for max_pixels, max_length in _image_sizes(base, configs[0].data):
        for kind in kinds:
            yield Shared(kind, max_pixels, max_length)


def _image_sizes(base: BaseModel, data: Any) -> Iterator[tuple[int | None, int]]:
    """`max_pixels` and `max_length`, from large to small.

    Where images may have any size, `max_pixels` is set from the start: training would refuse larger images by `max_length`, and an
    evaluation would take them.
    """
    image, limit, longest = image_tokens(model_config(base)), data.get("max_pixels"), data.max_length
    tokens = image.at_most(limit) or longest - TEXT_TOKENS
    if limit is None and image.kind == "area" and tokens > 0:
        limit = image.limit(tokens)
    yield limit, longest
    if image.kind == "fixed":
        if (shorter := image.tokens + TEXT_TOKENS) < longest:
            yield limit, shorter
        return
    tokens //= 2
    while tokens >= max(FEWEST_IMAGE_TOKENS, image.tokens) and image.limit(tokens) is not None:
        limit = image.limit(tokens)
        yield limit, min(longest, (image.at_most(limit) or tokens) + TEXT_TOKENS)
        tokens //= 2


def _can_quantise(base: BaseModel, configs: Sequence[Any]) -> bool:
    """Whether nf4 is tried: not with sharded weights, which each GPU loads whole first, nor in layers whose width is no multiple of 64."""
    strategies = [str(config.trainer.get("strategy")) for config in configs]
    if any("ModelParallel" in s or "fsdp" in s.lower() for s in strategies):
        return False
    model = empty_vlm(base)
    try:
        check_blocks(model, set(quantised_layers(model)))
    except ValueError:
        return False
    return True


def with_shared(config: Any, shared: Shared, plan: Plan) -> tuple[Any, Plan]:
    """A stage's configuration with other shared settings, and the plan with their base model."""
    config = config.clone()
    config.data.max_length = shared.max_length
    config.data.max_pixels = shared.max_pixels
    if config.model.init_args.get("base") is not None:
        config.model.init_args.base.quantization = shared.quantization
    base = plan.base and replace(plan.base, quantization=shared.quantization)
    return config, replace(plan, base=base)


# --- One stage ------------------------------------------------------------------------------------------------------


def _fit_training(config: Any, plan: Plan, usable: float) -> StageFit:
    current, accumulate = config.data.batch_size, config.trainer.get("accumulate_grad_batches") or 1
    effective = current * accumulate
    batches = [n for n in range(effective, 0, -1) if effective % n == 0]
    choices = [(True, batches)]
    if not config.model.init_args.gradient_checkpointing:
        choices.insert(0, (False, [n for n in batches if n >= current]))
    for checkpointing, sizes in choices:
        config.model.init_args.gradient_checkpointing = checkpointing

        def of_batch(size: int) -> int:
            config.data.batch_size = size
            return training_phase(config, plan).estimate.total

        size, taken = largest_that_fits(of_batch, sizes, usable)
        if taken <= usable:
            break
    config.data.batch_size = size
    training = training_phase(config, plan).estimate

    def of_answers(size: int) -> int:
        config.data.eval_batch_size = size
        return max((p.estimate.total for p in validation_phases(config, plan, training)), default=0)

    answers, validation = largest_that_fits(of_answers, _answer_batches(config), usable)
    peak = max(taken, validation)
    return StageFit(peak, peak <= usable, answers, size, effective // size, checkpointing)


def _fit_answers(config: Any, plan: Plan, usable: float) -> StageFit:
    def of_answers(size: int) -> int:
        config.data.eval_batch_size = size
        return answer_phase(config, plan).estimate.total

    size, taken = largest_that_fits(of_answers, _answer_batches(config), usable)
    return StageFit(taken, taken <= usable, size)


def _fit_regions(config: Any, usable: float) -> StageFit:
    config = config.clone()

    def of_images(size: int) -> int:
        config.data.eval_batch_size = size
        return max(phase.estimate.total for phase in stage_phases(config))

    size, taken = largest_that_fits(of_images, _answer_batches(config), usable)
    return StageFit(taken, taken <= usable, size)


def _answer_batches(config: Any) -> list[int]:
    """Sizes of a batch of answers, from large to small: powers of two and the configuration's."""
    current = config.data.eval_batch_size
    powers = {
        2**n for n in range(max(current, MOST_ANSWERS).bit_length()) if 2**n <= max(current, MOST_ANSWERS)
    }
    return sorted({current, *powers}, reverse=True)


def largest_that_fits(taken: Callable[[int], int], sizes: Sequence[int], usable: float) -> tuple[int, int]:
    """The largest size that fits, and what it takes; if none fits, the smallest.

    Memory is linear in the size up to a maximum over phases, so two estimates tell which size to try.

    Args:
        taken: size -> bytes.
        sizes: from large to small.
        usable: bytes.
    """
    smallest = sizes[-1]
    least = taken(smallest)
    if least > usable or len(sizes) == 1:
        return smallest, least
    slope = (taken(2 * smallest) - least) / smallest
    for size in sizes[:-1]:
        if least + slope * (size - smallest) <= usable:
            exact = taken(size)
            if exact <= usable:
                return size, exact
    return smallest, least
