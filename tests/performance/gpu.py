"""Real sizes on one GPU, with random weights: training steps beside TRL's and Liger's with their memory, answers a second.

`make bench-gpu` runs it in about ten minutes and writes `runs/bench/gpu.md`. Neither speed nor memory needs trained weights, so models are built from
their published configurations, and nothing is downloaded; the largest takes 17 GB of the temporary folder and of main memory.
Without a GPU it ends with status 1; `--device cpu --models tiny` runs every part on tiny models of the same families, as a test does.

Bars: losses of the first steps agree with TRL's, else the status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tests.performance.gpu_steps import (
    ANSWERED,
    FAILED,
    NEW_TOKENS,
    OURS,
    REAL,
    SETS,
    STEP_SECONDS,
    TINY,
    Cell,
)
from tests.performance.machine import processor, setting
from tests.performance.preference import BATCH

from vlm_calibration.files import write_text

LOSS_TOLERANCE = 0.02
"""Relative difference to TRL's loss in each of the first `COMPARED` steps, in bfloat16. Tiny models differ by at most 0.3%."""
COMPARED = 3
NOTES = """\
- A step: forward passes of policy and reference, loss, backward pass, clipping, AdamW; LoRA of rank 16 on the language model; bfloat16 mixed precision, gradient
  checkpointing for real sizes. Collating, which workers do beside the steps, is not part of it.
- A query with several rejected responses is as many pairs to TRL and Liger. TRL applies its output head at labelled positions only, as it does with Triton.
- Liger: `LigerFusedLinearDPOLoss` on TRL's batch. Its SFT loss is a Triton kernel that could not be checked without a GPU, and is left out.
- flash-pref is left out: 0.1.1, its newest version, needs transformers below 4.52, and this package 5 or newer.
- Peak: all tensors on the GPU, weights included.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the page and print it."""
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "make bench-gpu needs a CUDA GPU, and torch finds none; "
            'ARGS="--device cpu --models tiny" runs its parts on the CPU with tiny models'
        )
    deadline = time.monotonic() + 60 * args.minutes
    cells: list[Cell] = []
    failed: list[str] = []
    for name in args.models:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        left = deadline - time.monotonic()
        if left <= 0:
            cells.append(Cell(name, "", "all", OURS, reason="no time was left"))
            continue
        of_model, status = measure(name, args, left)
        cells += of_model
        if status:
            failed.append(f"{name}: ended with status {status} after {len(of_model)} cells")
        ended = (c for c in of_model if c.reason.startswith(FAILED))
        failed += [f"{c.model}, {c.weights}, {c.task}, {c.side}: {c.reason}" for c in ended]
    text, agree = page(cells, failed, args)
    write_text(args.out, text)
    print(text)
    print(f"wrote {args.out}", file=sys.stderr)
    if failed or not agree:
        raise SystemExit(1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=[*SETS, *REAL, *TINY], default=["real"])
    parser.add_argument("--weights", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--minutes", type=float, default=10.0, help="no measurement begins later")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.md"))
    args = parser.parse_args(arguments)
    args.models = list(dict.fromkeys(m for name in args.models for m in SETS.get(name, [name])))
    if args.device == "cpu" and (real := [name for name in args.models if name in REAL]):
        parser.error(f"{real[0]} takes hours on a CPU: add --models tiny")
    return args


def measure(name: str, args: argparse.Namespace, seconds: float) -> tuple[list[Cell], int]:
    """The cells of one model, from a process of its own, and its exit status."""
    command = [sys.executable, "-m", "tests.performance.gpu_steps", name, "--device", args.device]
    command += ["--seconds", f"{seconds:.0f}", "--weights", *args.weights]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    return [Cell(**json.loads(line)) for line in lines], ran.returncode


# --- The page -------------------------------------------------------------------------------------------------------


def page(cells: Sequence[Cell], failed: Sequence[str], args: argparse.Namespace) -> tuple[str, bool]:
    """The page as Markdown, and whether all losses agree."""
    packages = ("vlm-calibration", "torch", "transformers", "peft", "bitsandbytes")
    optional = [name for name in ("trl", "liger-kernel", "triton") if find_spec(name.replace("-", "_"))]
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    machine = f"{gpu}; {processor()}; {setting(*packages, *optional)}; {time.strftime('%Y-%m-%d')}"
    differences = [(cell, difference(cell, cells)) for cell in cells]
    disagreeing = [
        f"**LOSSES DISAGREE: {c.model}, {c.weights}, {c.task}: {c.side}'s differ from ours by {d:.1%}, more than {LOSS_TOLERANCE:.0%}.**"
        for c, d in differences
        if d is not None and d > LOSS_TOLERANCE
    ]
    trained = [c for c in cells if c.task != "answers"]
    sections = [
        "# Real sizes on one GPU" if args.device == "cuda" else "# Dry run of the GPU benchmark on a CPU",
        machine,
        *disagreeing,
        *(f"**FAILED: {line}**" for line in failed),
        f"Random weights. {BATCH} queries a step; at most five measured steps a side, fewer where they take more than {STEP_SECONDS:g} s.",
        "## Training steps",
        table(STEP_HEADER, (step_row(c, cells) for c in trained)),
        "## Answers",
        f"Batches of {ANSWERED} questions, {NEW_TOKENS} new tokens each.",
        table(
            ("model", "weights", "prompt (tokens)", "answers/s", "peak (GiB)"),
            (answer_row(c) for c in cells if c.task == "answers"),
        ),
        "## Notes",
        NOTES,
    ]
    return "\n\n".join(sections), not disagreeing


STEP_HEADER = (
    *("model", "weights", "task", "side", "steps", "step (s)", "ours is faster", "peak (GiB)"),
    f"largest difference of losses to ours in {COMPARED} steps",
)


def step_row(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    start = [cell.model, cell.weights, cell.task, cell.side]
    if cell.reason:
        return [*start, f"not measured: {cell.reason}", *[""] * (len(STEP_HEADER) - len(start) - 1)]
    ours, seconds = _ours(cell, cells), statistics.median(cell.seconds)
    faster = "" if ours is None else f"{seconds / statistics.median(ours.seconds):.2f}x"
    apart = difference(cell, cells)
    return [
        *start,
        str(len(cell.seconds)),
        f"{seconds:.3f}",
        faster,
        gib(cell.peak),
        "" if apart is None else f"{apart:.1%}",
    ]


def answer_row(cell: Cell) -> list[str]:
    if cell.reason:
        return [cell.model, cell.weights, f"not measured: {cell.reason}", "", ""]
    rate = ANSWERED / statistics.median(cell.seconds)
    return [cell.model, cell.weights, str(cell.rows), f"{rate:.2f}", gib(cell.peak)]


def difference(cell: Cell, cells: Sequence[Cell]) -> float | None:
    """The largest relative difference between a side's losses in the first steps and ours; None without both."""
    ours = _ours(cell, cells)
    if ours is None:
        return None
    pairs = list(zip(cell.losses, ours.losses, strict=False))[:COMPARED]
    return max((abs(a - b) / abs(b) for a, b in pairs), default=None)


def _ours(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """Our cell of the same model, weights and task, for another side that was measured."""
    same = (c for c in cells if (c.model, c.weights, c.task) == (cell.model, cell.weights, cell.task))
    ours = next((c for c in same if c.side == OURS and not c.reason), None)
    return None if cell.side == OURS or cell.reason else ours


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size else "-"


if __name__ == "__main__":
    main()
