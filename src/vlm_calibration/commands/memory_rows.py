"""The memory of a stage by its settings: a row by arithmetic for each choice of settings, and the activations of real training steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import Namespace

from vlm_calibration.callbacks.throughput import PeakMemory
from vlm_calibration.commands.lightning_cli import ParsedCLI, lightning_errors
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.base import BaseModel, base_of_adapters
from vlm_calibration.models.loading import empty_vlm, model_config, why_not_nf4
from vlm_calibration.models.memory import STATE_BYTES, Memory, cache_bytes, model_memory
from vlm_calibration.quiet import quiet_lightning
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.text.confidence import render_response

CONFIGURED = "as configured"
STEPS = 2  # steps that are measured: in the second, the optimizer has its states


def answer_memory(config: Any, tokens: int | None) -> Memory:
    """The answers of `levels fit` or of an evaluation, whose systems share one copy of the base model."""
    adapters = len(config.model.init_args.get("adapters") or {})
    model = model_memory(_base(config), LoraSettings(), adapters=adapters, training=False)
    return Memory(model.weights, cache=_cache(config, tokens))


def training_memory(config: Any) -> Memory:
    """The states of training, of which FSDP2 gives each GPU its share. A continued adapter is assumed to be as `model.lora` says."""
    settings, trainer = config.model.init_args, config.trainer
    # To these dtypes the Trainer converts all weights.
    casts = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    memory = model_memory(
        _base(config),
        LoraSettings(**settings.lora.as_dict()),
        adapters=1 + (settings.get("reference") == "adapter"),
        trained=settings.get("parts"),
        cast=casts.get(str(trainer.precision)),
    )
    sharding = {} if isinstance(trainer.strategy, str) else trainer.strategy.get("init_args") or {}
    size = sharding.get("data_parallel_size")
    shares = size if isinstance(size, int) else 1
    return memory._replace(
        weights=memory.weights // shares,
        gradients=memory.gradients // shares,
        optimizer=STATE_BYTES[settings.optimizer.name] * memory.trained // shares,
    )


def _base(config: Any) -> BaseModel:
    settings = config.model.init_args
    if settings.get("base") is not None:
        return BaseModel(**settings.base.as_dict())
    return base_of_adapters({name: str(run) for name, run in (settings.get("adapters") or {}).items()})


def _cache(config: Any, tokens: int | None) -> int:
    base = _base(config)
    architecture = model_config(base)
    dtype = str(architecture.dtype) if base.dtype == "auto" else base.dtype
    half = "16" in f"{config.trainer.precision} {dtype}"
    length = (tokens or config.data.max_length) + config.model.init_args.max_new_tokens
    return cache_bytes(architecture, config.data.eval_batch_size * length, 2 if half else 4)


def training_rows(cli: ParsedCLI, tokens: int | None, measure: bool) -> Iterator[tuple[str, Memory]]:
    """The memory of training as configured, with each usual choice, as arguments, and of validation; `measure` runs training steps."""
    config = cli.config.fit
    length = tokens or config.data.max_length
    longest = longest_queries(_stage(cli, config).data, length) if measure else None
    for change in ({}, *_choices(config, measured=measure)):
        changed = config.clone()
        for key, value in change.items():
            changed[key] = value
        memory = training_memory(changed)
        if longest is not None:
            memory = _measured(cli, changed, memory, longest, length)
        label = " ".join(f"--{key} {str(value).lower()}" for key, value in change.items())
        yield label or CONFIGURED, memory
    yield "validation", training_memory(config)._replace(cache=_cache(config, tokens))


def _choices(config: Any, *, measured: bool) -> list[dict[str, Any]]:
    """The changes that are tried first where memory is short, each alone, then together; `measured`: also those of activations alone."""
    settings, data, base = config.model.init_args, config.data, _base(config)
    changes: list[dict[str, Any]] = []
    if measured and not settings.gradient_checkpointing:
        changes.append({"model.init_args.gradient_checkpointing": True})
    if base.quantization == "none" and not why_not_nf4(empty_vlm(base)):
        changes.append({"model.init_args.base.quantization": "nf4"})
    if measured and data.batch_size > 1:
        batches = 2 * (config.trainer.accumulate_grad_batches or 1)
        size = data.batch_size // 2
        changes.append({"data.batch_size": size, "trainer.accumulate_grad_batches": batches})
    if measured and data.max_pixels:
        changes.append({"data.max_pixels": data.max_pixels // 2})
    if len(changes) > 1:
        changes.append({key: value for change in changes for key, value in change.items()})
    return changes


def _stage(cli: ParsedCLI, config: Any) -> Any:
    """The `model` and `data` of a training stage, without queries, and with even levels and a new adapter, as if no other stage had run."""
    whole = cli.config.clone()
    whole.fit = config.clone()
    for name in ("train", "validation", "teacher", "regions"):
        whole.fit.data[name] = None
    linear = "vlm_calibration.perturbation.levels.LinearLevels"
    whole.fit.data.noise.levels = Namespace(class_path=linear, init_args=Namespace(n_levels=11))
    whole.fit.trainer.callbacks, whole.fit.trainer.logger = None, False
    settings = whole.fit.model.init_args
    if "reference" in settings:
        settings.lora.parts = settings.parts or settings.lora.parts
        settings.adapter = settings.parts = None
        settings.reference = "base" if settings.reference == "adapter" else settings.reference
        settings.pairs.target = "expected" if settings.pairs.target == "fitted" else settings.pairs.target
    return cli.parser.instantiate_classes(whole).fit


def _measured(cli: ParsedCLI, config: Any, memory: Memory, longest: LongestQueries, tokens: int) -> Memory:
    """The memory with the activations of training steps; without, if the device has too little."""
    quiet_lightning()
    trainer, stage, peak = config.trainer, _stage(cli, config), PeakMemory()
    accumulated = min(2, trainer.accumulate_grad_batches or 1)
    data = stage.data
    data.workers, data.max_length = 0, tokens + 64  # other responses than the measured one may be longer
    side = min(longest.side, math.isqrt(data.max_pixels or longest.side**2))
    data.train = replace(longest, n=STEPS * accumulated * data.batch_size, side=side)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    disabled: Any = dict.fromkeys((*off, "use_distributed_sampler"), False)
    try:
        with lightning_errors():
            L.Trainer(
                accelerator=trainer.accelerator,
                devices=1,
                precision=trainer.precision,
                max_steps=STEPS,
                accumulate_grad_batches=accumulated,
                gradient_clip_val=trainer.gradient_clip_val,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                callbacks=[peak],
                **disabled,
            ).fit(stage.model, data)
    except torch.OutOfMemoryError:
        return memory
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return memory._replace(activations=max(0, peak.peak - memory.gradients - memory.optimizer))


@dataclass(frozen=True)
class LongestQueries(QuerySource):
    """`n` copies of one yes/no question of so many words about an image of noise, with sides of `side` pixels."""

    n: int
    side: int
    words: int

    def queries(self) -> Sequence[Query]:
        question = " ".join(["dog"] * self.words)
        return [Query(str(i), "noise", question, "Yes", "yes_no", objects=("dog",)) for i in range(self.n)]

    def labels(self, query: Query) -> Sequence[str]:
        return ["dog"]

    def load(self, query: Query) -> LoadedImage:
        image = np.random.default_rng(0).integers(0, 256, (self.side, self.side, 3), np.uint8)
        mask = np.zeros(image.shape[:2], bool)
        mask[: self.side // 2, : self.side // 2] = True
        return LoadedImage(image, (mask,), ())


def longest_queries(data: PerturbedQueryDataModule, tokens: int) -> LongestQueries:
    """The largest image that fits into a row of `tokens` tokens with its response, and text for the rest; DataError if none fits."""

    def length(words: int) -> int:
        queries = LongestQueries(1, side, words)
        [query] = queries.queries()
        text = data.chat.render(query.question, render_response("Yes", 1.0))
        return int(data.chat.inputs([text], [queries.load(query).image], "right")["input_ids"].shape[1])

    side = math.isqrt(data.max_pixels or 2048**2)
    while (shortest := length(1)) > tokens:
        side = side * 7 // 8
        if side < 32:
            taken = f"an image and a question take {shortest}; raise --tokens or data.max_length"
            raise DataError(f"a row of {tokens} tokens is too short: {taken}")
    of_a_word = (length(33) - shortest) / 32
    return LongestQueries(1, side, 1 + math.floor((tokens - shortest) / of_a_word))
