"""The models of `tests.performance.gpu`, and of one model in one format of weights the steps of all sides, memory, answers.

Models are published architectures with random weights, or tiny ones of the same families, written like a checkpoint. The Hub is not asked.
Processors are those of `tests/models/processors.py` at the published image sizes, with a small tokenizer: a model keeps its published
vocabulary, of which most ids are then never used.

`python -m tests.performance.gpu_steps MODEL` runs in a process of its own and prints one JSON object a line, a `Cell`. The model is loaded once; every
side adds its adapter to it and takes it away again.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", NO_ALBUMENTATIONS_UPDATE="1", TOKENIZERS_PARALLELISM="false")

import argparse
import gc
import importlib.util
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from tests.models.processors import FAMILIES, SMOLVLM2, Family
from tests.models.published import MODELS
from tests.performance.preference import BATCH, BETA, LR, OurStep, Task, make_samples, rows_of, write_adapter
from transformers import AutoProcessor

from vlm_calibration.data.collate import ChatFormat, PromptCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import load_for_training
from vlm_calibration.text.confidence import ElicitationPrompt, end_of_confidence

STEPS = {"cuda": (2, 5), "cpu": (1, 1)}
"""Steps to warm up and measured steps of a side."""
STEP_SECONDS = 8.0
"""A side's measured steps end after so many seconds, but not before the first."""
ANSWERED, NEW_TOKENS = 8, 16
FAILED = "failed:"
"""Beginning of the reason of a side that ended with an error, which stderr has."""
OURS, TRL, LIGER = "ours", "TRL", "Liger"
TASKS = {
    "sft": Task("SFT", 0, {}),
    **{f"dpo{n}": Task(f"DPO, {n} rejected", n, {}) for n in (1, 4, 10)},
}
BF16 = torch.bfloat16


@dataclass(frozen=True)
class BenchModel:
    """A model of the benchmark.

    Attributes:
        family: key of `FAMILIES`.
        side: pixels a side of the images that it is asked about.
        images: settings of the family's image processor; None: those of a tiny model, which this then is.
    """

    family: str
    side: int
    images: dict[str, Any] | None = None

    @property
    def tiny(self) -> bool:
        return self.images is None


QWEN2_5: dict[str, Any] = {"patch": 14, "pixels": (56 * 56, 1280 * 28 * 28)}
QWEN3: dict[str, Any] = {"patch": 16, "pixels": (64 * 64, 1280 * 32 * 32)}
REAL = {
    "qwen2_5_vl_3b": BenchModel("qwen2_5_vl", 1024, QWEN2_5),
    "qwen2_5_vl_7b": BenchModel("qwen2_5_vl", 1024, QWEN2_5),
    "qwen3_vl_4b": BenchModel("qwen3_vl", 1024, QWEN3),
    "smolvlm2_2_2b": BenchModel("smolvlm", 1024, SMOLVLM2),
}
"""Name in `tests/models/published.py` -> model; an image of 1024 x 1024 pixels has 1,225, 1,024 and 1,377 tokens."""
TINY = {f"tiny {family}": BenchModel(family, 48) for family in ("qwen2_5_vl", "qwen3_vl", "smolvlm")}
SETS = {"real": REAL, "tiny": TINY}


def write_random(name: str, folder: Path, device: str) -> None:
    """Write a model in bfloat16, whose weights are drawn on a device, its processor and, in `adapter/`, a LoRA adapter without zero weights."""
    entry = {**REAL, **TINY}[name]
    family = FAMILIES[entry.family](**(entry.images or {}))
    torch.manual_seed(0)
    if entry.tiny:
        model = family.model(dtype=torch.bfloat16)
    else:
        with torch.device(device):
            config = with_tokens_of(family, MODELS[name].config())
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    write_adapter(model, folder)


def with_tokens_of(family: Family, config: Any) -> Any:
    """A published configuration with the special tokens of a family's tokenizer.

    Raises:
        ValueError: the tokenizer has more tokens than the published vocabulary.
    """
    spec, text = family.spec, config.get_text_config()
    if spec.vocabulary > text.vocab_size:
        raise ValueError(
            f"{family.name}: {spec.vocabulary} tokens, of which the model knows {text.vocab_size}"
        )
    for part in (config, text):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = spec.pad, spec.begin, spec.end
    tokens = spec.qwen_tokens if family.name.startswith("qwen") else {"image_token_id": spec.image}
    for key, token in tokens.items():
        setattr(config, key, token)
    return config


@dataclass
class Cell:
    """What was measured of one side at one task.

    Attributes:
        weights: "bf16" or "nf4".
        task: title of the task; "answers" for the evaluation.
        reason: why nothing was measured; the other fields are then empty.
        seconds: of each measured step, or batch of answers, without collating.
        losses: of all steps, warm-up first.
        peak: bytes allocated at the peak of the GPU's memory; 0 on a CPU.
        rows: longest prompt of the answers in tokens.
    """

    model: str
    weights: str
    task: str
    side: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    rows: int = 0


class Bench:
    """Measurements of one model.

    Args:
        name: key of `REAL` or `TINY`.
        folder: model, processor and adapter, as `write_random` writes them.
        weights: "bf16" or "nf4".
        device: "cuda" or "cpu".
        deadline: no cell begins after this time of `time.monotonic`.
    """

    def __init__(self, name: str, folder: Path, weights: str, device: str, deadline: float) -> None:
        self.name, self.folder, self.weights, self.deadline = name, folder, weights, deadline
        # With its number, by which accelerate compares the device of a quantised model.
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.tiny = name in TINY
        self.base = BaseModel(
            str(folder), dtype="bfloat16", quantization="nf4" if weights == "nf4" else "none"
        )
        self.held = 0
        self._collect()
        self.model = load_for_training(self.base, self.device)
        if self.base.quantization == "none":
            self.model.to(self.device)
        self._collect()
        self.held, self.leaked = self._allocated(), 0
        self.warm_up, self.steps = STEPS[device]
        self.samples = alike_samples(
            max(ANSWERED, BATCH * (self.warm_up + self.steps)), {**REAL, **TINY}[name].side
        )

    # --- Cells ----------------------------------------------------------------------------------------------------

    def cells(self) -> Iterator[Cell]:
        """Measure everything, a cell at a time."""
        for task in TASKS.values():
            for side in (OURS, TRL, LIGER) if task.rejected else (OURS, TRL):
                yield self._measured(task.title, side, partial(self._train, task))
        yield self._measured("answers", OURS, self._answer)

    def _measured(self, task: str, side: str, measure: Callable[[Cell], None]) -> Cell:
        cell = Cell(self.name, self.weights, task, side)
        package = {OURS: None, LIGER: "liger_kernel"}.get(side, "trl")
        if package is not None and importlib.util.find_spec(package) is None:
            cell.reason = f"{package} is not installed"
        elif time.monotonic() > self.deadline:
            cell.reason = "no time was left"
        if cell.reason:
            return cell
        try:
            measure(cell)
        except torch.cuda.OutOfMemoryError as error:
            first = str(error).splitlines()[0]
            cell = Cell(self.name, self.weights, task, side, reason=f"out of memory: {first}")
        except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, LookupError) as error:
            # One side that fails must not cost the others, which a GPU may not measure again; the page and the status say it.
            traceback.print_exc()
            cell = Cell(self.name, self.weights, task, side, reason=f"{FAILED} {type(error).__name__}")
        return cell

    def _train(self, task: Task, cell: Cell) -> None:
        with self._borrowed() as model:
            step = self._side(cell.side, task, model)
            for i in range(self.warm_up + self.steps):
                if i == self.warm_up:
                    self._reset_peak()
                start = self._now()
                loss, collating = step(i)
                taken = self._now() - start - collating
                cell.losses.append(loss)
                if i >= self.warm_up:
                    cell.seconds.append(taken)
                if sum(cell.seconds) > STEP_SECONDS:
                    break
            cell.peak = self._peak()

    def _side(self, side: str, task: Task, model: Any) -> Callable[[int], tuple[float, float]]:
        """Steps of a side by their number."""
        if side == OURS:
            ours = OurStep(task, self.folder, not self.tiny, model, BF16)
            return lambda i: ours(self.samples[BATCH * i : BATCH * (i + 1)])
        from tests.performance.trl_peer import LigerStep, TRLStep

        Peer = LigerStep if side == LIGER else TRLStep
        rows = rows_of(task, self.folder, self.samples)
        size = BATCH * max(1, task.rejected)
        theirs = Peer(
            self.folder,
            rows,
            batch=size,
            lr=LR,
            beta=BETA,
            restricted=True,
            checkpointing=not self.tiny,
            scratch=self.folder / "trl",
            model=model,
            bf16=True,
        )
        return lambda i: theirs(rows[size * i : size * (i + 1)])

    def _answer(self, cell: Cell) -> None:
        chat = ChatFormat(AutoProcessor.from_pretrained(self.folder), ElicitationPrompt())
        batch = PromptCollator(chat)(self.samples[:ANSWERED]).to(self.device)
        cell.rows = batch.inputs["input_ids"].shape[1]
        self.model.eval()
        self._collect()

        def run() -> None:
            with torch.autocast(self.device.type, dtype=BF16):
                generate(self.model, batch.inputs, chat.processor.tokenizer, NEW_TOKENS, end_of_confidence)

        run()
        self._reset_peak()
        for _ in range(2):
            start = self._now()
            run()
            cell.seconds.append(self._now() - start)
        cell.peak = self._peak()

    # --- Memory ---------------------------------------------------------------------------------------------------

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int:
        """Bytes at the peak since the last reset."""
        return torch.cuda.max_memory_allocated() - self.leaked if self.device.type == "cuda" else 0

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    @contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """The model for one side, which may wrap layers and replace methods of it; then as it was."""
        forward = self.model.__dict__.get("forward")
        self._collect()
        try:
            yield self.model
        finally:
            for name, layer in list(self.model.named_modules()):
                if isinstance(layer, BaseTunerLayer):
                    parent, _, child = name.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
            self.model.__dict__.pop("peft_config", None)
            self.model.__dict__.pop("forward", None)
            if forward is not None:
                self.model.forward = forward

    def _collect(self) -> None:
        """Free what earlier cells left, and note what cannot be freed."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.leaked = self._allocated() - self.held

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def alike_samples(n: int, side: int) -> list[Sample]:
    """Samples whose responses have equally many tokens.

    The SFT losses of both sides are then the same: TRL's is a mean over tokens, ours over queries.
    """
    drawn = (sample for sample in make_samples(4 * n + 16, side) if 0.1 <= sample.confidence < 0.995)
    return list(islice(drawn, n))


def main(arguments: list[str] | None = None) -> None:
    """Print the cells of one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=[*REAL, *TINY])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--weights", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--seconds", type=float, default=600.0, help="no cell begins later")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + args.seconds
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random(args.model, folder, args.device)
        for weights in args.weights:
            bench = Bench(args.model, folder, weights, args.device, deadline)
            for cell in bench.cells():
                print(json.dumps(asdict(cell)), flush=True)
            del bench
            gc.collect()


if __name__ == "__main__":
    main()
