"""`vlm-calibration estimate-memory`: the GPU memory of stages by arithmetic, and with `--measure` that of real training steps."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from jsonargparse.typing import PositiveInt

from vlm_calibration.arguments import Forwarded
from vlm_calibration.commands.trainer import page_of
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS, read_config
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_calibration.commands.lightning_cli import ParsedCLI

SETTINGS = Forwarded(
    {
        CONFIG: "a stage (sft, dpo, levels, eval/jsonl, ...) or an overlay such as model/qwen2_5_vl_7b; without a stage: these four "
        "(may be repeated)",
        **VARIABLE_OPTIONS,
    },
    lambda: "Every setting of the stages may follow; --help-all lists those of training.",
    partial(page_of, "fit"),
)
STAGES = ("sft", "dpo", "levels", "eval/jsonl")
"""The stages where none is named."""
TRAINING = ("SFTModule", "DPOModule")
ANSWERING = ("LevelFitModule", "EvaluationModule")
CASTS = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
"""trainer.precision -> the dtype that the Trainer converts all weights to."""
CONFIGURED = "as configured"
STEPS = 2
"""Steps that are measured: in the second, the optimizer has its states."""
ROOM = 64
"""Tokens above the measured row's that its other responses may take."""
GIB = 2**30


class Memory(NamedTuple):
    """Bytes on one GPU.

    Attributes:
        weights: of the model with its adapters.
        gradients: of the trained adapter.
        optimizer: its states.
        cache: keys and values of a batch of answers at their longest.
        activations: measured, with all else that a step allocates; None: not measured.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    activations: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.cache + (self.activations or 0)


def estimate(
    *settings: Annotated[str, SETTINGS], tokens: PositiveInt | None = None, measure: bool = False
) -> None:
    """Tell the GPU memory that stages take: weights, gradients, optimizer states, keys and values, which need neither a GPU nor the weights; and activations, measured.

    Args:
        tokens: length of a prompt with its image and a response (default: data.max_length)
        measure: load the model, run training steps on the longest rows, on the GPU or else the CPU, also with the usual changes

    Raises:
        ArgumentError: a setting is unknown or wrong, or there are several stages.
        DataError: a setting or a model cannot be used.
    """
    from rich.console import Console

    from vlm_calibration.commands.lightning_cli import parse

    configs = [b for a, b in zip(settings, [*settings[1:], ""], strict=True) if a in ("--config", "-c")]
    configs += [s.partition("=")[2] for s in settings if s.startswith(("--config=", "-c="))]
    modules = {name: (read_config(name).get("model") or {}).get("class_path") for name in configs if name}
    named = [name for name, module in modules.items() if module]
    if len(named) > 1:
        raise ArgumentError(None, f"--config: give one stage at a time, found {' and '.join(named)}")
    console = Console()
    for stage in named or STAGES:
        module = (modules.get(stage) or read_config(stage)["model"]["class_path"]).rpartition(".")[2]
        if module not in (*TRAINING, *ANSWERING):
            raise DataError(f"{stage}: no estimate for {module}, expected {', '.join(TRAINING + ANSWERING)}")
        arguments = settings if named else ["--config", stage, *settings]
        cli = parse("fit" if module in TRAINING else "test", arguments)
        title = f"{stage} on one GPU, GiB"
        if module in ANSWERING:
            console.print(_table(title, {"answers": _answers(cli.config.test, tokens)}))
            continue
        config = cli.config.fit
        rows = {}
        for change in ({}, *_choices(config, measured=measure)):
            changed = _changed(config, change)
            memory = _training(changed)
            label = " ".join(f"--{key} {str(value).lower()}" for key, value in change.items())
            rows[label or CONFIGURED] = _measured(cli, changed, memory, tokens) if measure else memory
        rows["validation"] = _training(config)._replace(
            cache=_cache(_base(config), config, tokens), activations=None
        )
        console.print(_table(title, rows))
        console.print(f"# {_line(config, rows[CONFIGURED])}", soft_wrap=True, highlight=False)
    console.print(
        "A column without a number is not known: activations take --measure, and training steps alone have them. Leave 0.75 GiB and "
        "5% of the rest free for the CUDA context and fragmentation.",
        highlight=False,
    )


# --- By arithmetic --------------------------------------------------------------------------------------------------


def _base(config: Any) -> Any:
    from vlm_calibration.models.base import BaseModel, base_of_adapters

    settings = config.model.init_args
    if settings.get("base") is not None:
        return BaseModel(**settings.base.as_dict())
    return base_of_adapters({name: str(run) for name, run in (settings.get("adapters") or {}).items()})


def _counted(config: Any) -> Any:
    """The `ModelMemory` of a training stage. An adapter that it continues is assumed to be as `model.lora` describes it."""
    import torch

    from vlm_calibration.models.adapters import LoraSettings
    from vlm_calibration.models.memory import model_memory

    settings = config.model.init_args
    cast = CASTS.get(str(config.trainer.precision))
    return model_memory(
        _base(config),
        LoraSettings(**settings.lora.as_dict()),
        adapters=1 + (settings.get("reference") == "adapter"),
        trained=settings.get("parts"),
        cast=getattr(torch, cast) if cast else None,
    )


def _training(config: Any) -> Memory:
    """The states of training, of which FSDP2 gives each GPU its share."""
    from vlm_calibration.models.memory import STATE_BYTES

    model = _counted(config)
    optimizer = STATE_BYTES[config.model.init_args.optimizer.name] * model.trained
    strategy = config.trainer.strategy
    size = None if isinstance(strategy, str) else (strategy.get("init_args") or {}).get("data_parallel_size")
    shares = size if isinstance(size, int) else 1
    return Memory(model.weights // shares, model.gradients // shares, optimizer // shares)


def _answers(config: Any, tokens: int | None) -> Memory:
    """The answers of `levels fit` or of an evaluation, whose systems share one copy of the base model."""
    from vlm_calibration.models.adapters import LoraSettings
    from vlm_calibration.models.memory import model_memory

    base, adapters = _base(config), len(config.model.init_args.get("adapters") or {})
    model = model_memory(base, LoraSettings(), adapters=adapters, training=False)
    return Memory(model.weights, cache=_cache(base, config, tokens))


def _cache(base: Any, config: Any, tokens: int | None) -> int:
    from vlm_calibration.models.loading import model_config
    from vlm_calibration.models.memory import cache_bytes

    architecture = model_config(base)
    dtype = str(architecture.dtype) if base.dtype == "auto" else base.dtype
    half = "16" in str(config.trainer.precision) or "16" in dtype
    length = (tokens or config.data.max_length) + config.model.init_args.max_new_tokens
    return cache_bytes(architecture, config.data.eval_batch_size * length, 2 if half else 4)


def _choices(config: Any, *, measured: bool) -> list[dict[str, Any]]:
    """The changes of settings that are tried first where memory is short, each alone, then all together.

    Args:
        config: of a training stage.
        measured: with those that change activations alone.
    """
    from vlm_calibration.models.memory import can_quantise

    settings, data, base = config.model.init_args, config.data, _base(config)
    changes: list[dict[str, Any]] = []
    if measured and not settings.gradient_checkpointing:
        changes.append({"model.init_args.gradient_checkpointing": True})
    if base.quantization == "none" and can_quantise(base):
        changes.append({"model.init_args.base.quantization": "nf4"})
    if measured and data.batch_size > 1:
        accumulated = 2 * (config.trainer.accumulate_grad_batches or 1)
        changes.append(
            {"data.batch_size": data.batch_size // 2, "trainer.accumulate_grad_batches": accumulated}
        )
    if measured and data.max_pixels:
        changes.append({"data.max_pixels": data.max_pixels // 2})
    if len(changes) > 1:
        changes.append({key: value for change in changes for key, value in change.items()})
    return changes


def _changed(config: Any, change: Mapping[str, Any]) -> Any:
    config = config.clone()
    for key, value in change.items():
        config[key] = value
    return config


# --- Measured -------------------------------------------------------------------------------------------------------


def _measured(cli: ParsedCLI, config: Any, memory: Memory, tokens: int | None) -> Memory:
    """Run training steps on the longest rows, with a new adapter and evenly spaced levels, which need no results of other stages.

    Returns:
        The memory with activations; without, if there was not enough.
    """
    import torch

    from vlm_calibration.commands.lightning_cli import lightning_errors
    from vlm_calibration.quiet import quiet_lightning

    quiet_lightning()
    whole = cli.config.clone()
    whole.fit = _changed(config, dict.fromkeys(("data.train", "data.validation", "data.regions")))
    whole.fit.data.noise.levels = {"class_path": "vlm_calibration.perturbation.levels.LinearLevels"}
    whole.fit.trainer.callbacks, whole.fit.trainer.logger = None, False
    settings = whole.fit.model.init_args
    if "reference" in settings:
        settings.lora.parts = settings.parts or settings.lora.parts
        settings.adapter = settings.parts = None
        settings.reference = "base" if settings.reference == "adapter" else settings.reference
        settings.pairs.target = "expected" if settings.pairs.target == "fitted" else settings.pairs.target
    try:
        with lightning_errors():
            peak = _peak(cli.parser.instantiate_classes(whole).fit, config.trainer, tokens)
    except torch.OutOfMemoryError:
        return memory
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return memory._replace(activations=max(0, peak - memory.gradients - memory.optimizer))


def _peak(stage: Any, trainer: Any, tokens: int | None) -> int:
    """Bytes at the peak of training steps beside the model's weights.

    Args:
        stage: the stage's module and data, as `model` and `data`.
        trainer: settings of the Trainer.
        tokens: of a row; None: `data.max_length`.
    """
    import lightning as L

    from vlm_calibration.callbacks.peak_memory import PeakMemory
    from vlm_calibration.data.longest import longest_queries

    data, accumulated = stage.data, min(2, trainer.accumulate_grad_batches or 1)
    tokens = tokens or data.max_length
    data.workers, data.max_length = 0, tokens + ROOM
    data.train = longest_queries(data, STEPS * accumulated * data.batch_size, tokens)
    measured = PeakMemory()
    L.Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        max_steps=STEPS,
        accumulate_grad_batches=accumulated,
        gradient_clip_val=trainer.gradient_clip_val,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[measured],
    ).fit(stage.model, data)
    return measured.peak


# --- Printed --------------------------------------------------------------------------------------------------------


def _table(title: str, rows: Mapping[str, Memory]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    names = [n for n in Memory._fields if n == "weights" or any(getattr(row, n) for row in rows.values())]
    for name in [*names, "total"]:
        table.add_column(name, justify="right", no_wrap=True)
    for label, row in rows.items():
        table.add_row(label, *(_gib(getattr(row, name)) for name in [*names, "total"]))
    return table


def _line(config: Any, memory: Memory) -> str:
    """A training step in one line."""
    model = _counted(config)
    parts: Sequence[str] = [f"{n} {_gib(getattr(memory, n))}" for n in Memory._fields if getattr(memory, n)]
    return f"{_count(model.parameters)} parameters, {_count(model.trained)} trained: {' + '.join(parts)} = {_gib(memory.total)} GiB"


def _gib(size: int | None) -> str:
    value = (size or 0) / GIB
    return (f"{value:.1f}" if value >= 10 else f"{value:.2f}") if size else "-"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
