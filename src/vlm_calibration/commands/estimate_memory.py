"""`vlm-calibration estimate-memory`: the GPU memory of stages by arithmetic, and with `--measure` that of real training steps."""

from __future__ import annotations

from argparse import ArgumentError
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from jsonargparse.typing import PositiveInt

from vlm_calibration.arguments import Forwarded
from vlm_calibration.commands.settings_check import check_settings
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS, read_config
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_calibration.models.memory import Memory

SETTINGS = Forwarded(
    {
        CONFIG: "a stage (sft, dpo, levels, eval/jsonl, ...) or an overlay such as model/qwen2_5_vl_7b; without a stage: these four "
        "(may be repeated)",
        **VARIABLE_OPTIONS,
    },
    lambda: "Settings of the stages may follow; `fit --help-all` lists those of training.",
)
TRAINING, ANSWERING = ("SFTModule", "DPOModule"), ("LevelFitModule", "EvaluationModule")
COLUMNS = ("weights", "gradients", "optimizer", "cache", "activations", "total")
NOTE = """\
The tensors at the peak, without the CUDA context and what the allocator loses: leave 0.75 GiB and 5% of the rest free for them.
Activations of training, which are most of it, are not known without --measure."""


def estimate(
    *settings: Annotated[str, SETTINGS], tokens: PositiveInt | None = None, measure: bool = False
) -> None:
    """Compute the GPU memory of weights, gradients, optimizer states, and keys and values of stages; needs neither a GPU nor the weights.

    Args:
        tokens: length of a prompt with its image and a response (default: data.max_length)
        measure: load the model and run training steps on the longest rows, on the GPU or else the CPU, also with the usual changes
    """
    configs = [value for option, value in pairwise(settings) if option in ("--config", "-c")]
    configs += [s.partition("=")[2] for s in settings if s.startswith(("--config=", "-c="))]
    named = [name for name in configs if "class_path" in (read_config(name).get("model") or {})]
    if len(named) > 1:
        raise ArgumentError(None, f"--config: give one stage at a time, found {' and '.join(named)}")
    check_settings(settings)
    from rich.console import Console

    from vlm_calibration.commands.lightning_cli import parse
    from vlm_calibration.commands.memory_rows import CONFIGURED, answer_memory, training_rows

    console = Console()
    for stage in named or ("sft", "dpo", "levels", "eval/jsonl"):
        module = read_config(stage)["model"]["class_path"].rpartition(".")[2]
        if module not in TRAINING + ANSWERING:
            raise DataError(f"{stage}: no estimate for {module}, expected {', '.join(TRAINING + ANSWERING)}")
        arguments = settings if named else ["--config", stage, *settings]
        cli = parse("fit" if module in TRAINING else "test", arguments)
        if module in ANSWERING:
            console.print(_table(stage, {"answers": answer_memory(cli.config.test, tokens)}))
            continue
        rows = dict(training_rows(cli, tokens, measure))
        console.print(_table(stage, rows))
        memory = rows[CONFIGURED]
        parts = " + ".join(f"{n} {_gib(getattr(memory, n))}" for n in COLUMNS[:-1] if getattr(memory, n))
        sizes = (memory.parameters, memory.trained)
        every, trained = (f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" for n in sizes)
        line = f"# {every} parameters, {trained} trained: {parts} = {_gib(memory.total)} GiB"
        console.print(line, soft_wrap=True, highlight=False)
    console.print(NOTE, highlight=False)


def _table(stage: str, rows: dict[str, Memory]) -> Table:
    from rich.box import SIMPLE_HEAD

    from vlm_calibration.reporting.tables import text_table

    names = [name for name in COLUMNS if any(getattr(row, name) for row in rows.values())]
    cells = [(label, *(_gib(getattr(row, name)) for name in names)) for label, row in rows.items()]
    table = text_table(f"{stage} on one GPU, GiB", ("", *names), cells)
    table.box = SIMPLE_HEAD
    table.columns[0].overflow = "fold"
    return table


def _gib(size: int) -> str:
    if not (value := size / 2**30):
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
