"""Compare preference and SFT training steps of this package with TRL's, on the same model, data and LoRA initialisation.

Run with `python -m tests.performance.preference`; prints a Markdown table. A step is collating a batch of two queries,
forward, reference, loss, backward, clipping and AdamW. Both sides alternate in one process, so that other load on the
machine affects them alike; ratios are of the same round. The losses of each step are compared too; if they differ, the script ends with
status 1. Memory is measured by `tests.performance.gpu`.

The model is a LLaVA with a language model of 39M parameters, a vocabulary of 49k and 256 image tokens; the reference is
the model without its adapter. TRL runs as it does on this machine ("stock") and with the output head at labelled
positions only ("restricted"), as it does with Triton.
"""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NO_ALBUMENTATIONS_UPDATE="1", TOKENIZERS_PARALLELISM="false"
)

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from peft import load_peft_weights, set_peft_model_state_dict
from tests.performance.machine import processor, setting
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vlm_calibration.data.candidates import CandidateCollator, CandidateSettings, tokenize_responses
from vlm_calibration.data.collate import ChatFormat, SFTCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.demo.scenes import CLASSES
from vlm_calibration.losses.preference import DPO
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.perturbation.levels import NOISE, LinearLevels, Perturbation
from vlm_calibration.records import Query
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import PairPolicy, choose, nearest
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings
from vlm_calibration.text.confidence import ElicitationPrompt, render_response

from ..demo.architecture import CHAT_TEMPLATE, IMAGE, build_processor

SIDE, PATCH, VOCABULARY = 256, 16, 49152
BATCH, LR, BETA, CLIP = 2, 1e-4, 0.1, 1.0
TOLERANCE = 1e-4
LORA = LoraSettings(r=16, alpha=32, dropout=0.0)
LEVELS = LinearLevels()

OURS, RESTRICTED, STOCK = "ours", "TRL, restricted", "TRL, stock"
ARMS = (OURS, RESTRICTED, STOCK)

Step = Callable[[int], tuple[float, float]]
"""Trains on the batch of this number; returns the loss, and the seconds that collating took."""


@dataclass(frozen=True)
class Task:
    """A training task: its name in the table, rejected responses a query (0 for SFT), and the minimum speed relative to TRL, by arm."""

    title: str
    rejected: int
    faster: dict[str, float] = field(default_factory=dict)


TASKS = {
    "dpo1": Task("DPO, 1 rejected", 1, {RESTRICTED: 1.8, STOCK: 6.0}),
    "dpo4": Task("DPO, 4 rejected", 4, {RESTRICTED: 7.0, STOCK: 25.0}),
    "sft": Task("SFT", 0, {RESTRICTED: 1.0}),
}


def llava(side: int, tower_layers: int, image: int, text: dict[str, Any], **settings: Any) -> LlavaConfig:
    """A LLaVA with a small SigLIP tower, for images of so many pixels a side, whose placeholder is the token `image`."""
    vision = SiglipVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(num_key_value_heads=2, vocab_size=VOCABULARY, **text, **settings),
        image_token_index=image,
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **settings,
    )


def write_model(folder: Path) -> None:
    """Write a random model, its processor and, in `adapter/`, a random LoRA adapter without zero weights."""
    tokenizer = build_processor().tokenizer
    image_processor = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    text = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = llava(
        SIDE,
        6,
        tokenizer.convert_tokens_to_ids(IMAGE),
        {**text, **tokens, "max_position_embeddings": 2048, "bos_token_id": None},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    write_adapter(model, folder)


def write_adapter(model: Any, folder: Path) -> None:
    """Write a random LoRA adapter of a model, without zero weights, to `adapter/` in a folder."""
    adapted = attach_lora(model, LORA)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # at its usual 0, policy and reference agree, and all losses with them
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder / "adapter")


def make_samples(n: int, side: int = SIDE) -> list[Sample]:
    """Queries about square images of noise of so many pixels a side, with prompts of different lengths."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(n):
        question = " ".join(rng.choice(CLASSES, size=rng.integers(5, 25)))
        query = Query(f"q{i}", "noise", question, ("Yes", "No")[i % 2], "yes_no")
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        drawn = Perturbation(NOISE, float(rng.choice(LEVELS.strengths())))
        samples.append(Sample(query, image, LEVELS.confidence(drawn), drawn, round(1000 * drawn.strength)))
    return samples


def policy_of(task: Task) -> PairPolicy:
    return PairPolicy(target="level", rejected="uniform", n_rejected=task.rejected)


class OurStep:
    """Training steps of this package's stages, with the collators of its data module.

    Args:
        task: what is trained.
        folder: model, processor and, in `adapter/`, the LoRA adapter to start from.
        checkpointing: recompute activations in the backward pass.
        model: the model of the folder as `load_for_training` returns it.
        autocast: dtype of the arithmetic in mixed precision; None: that of the weights.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        checkpointing: bool,
        model: Any,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.autocast, self.device = autocast, model.device
        chat = ChatFormat(AutoProcessor.from_pretrained(folder), ElicitationPrompt())
        base = BaseModel(str(folder))
        # Without warm-up, and with a cosine that ends at its start, the rate is constant, as TRL's is here.
        optimizer = OptimizerSettings(lr=LR, warmup_fraction=0.0, final_fraction=1.0)
        adapter = str(folder / "adapter")
        self.collate: Any
        self.module: Any
        if task.rejected:
            self.collate = CandidateCollator(chat, LEVELS, CandidateSettings(), max_length=4096)
            self.module = DPOModule(
                base,
                adapter,
                DPO(beta=BETA),
                pairs=policy_of(task),
                reference="base",
                optimizer=optimizer,
                scoring="shared",
                gradient_checkpointing=checkpointing,
            )
        else:
            self.collate = SFTCollator(chat, max_length=4096)
            self.module = SFTModule(base, LORA, optimizer, gradient_checkpointing=checkpointing)
        with mock.patch(f"{self.module.__module__}.load_for_training", return_value=model):
            self.module.configure_model()
        if not task.rejected:
            set_peft_model_state_dict(self.model, load_peft_weights(adapter))
        # All that is asked of its Trainer by a step, and by the optimizer's schedule.
        self.module.trainer = SimpleNamespace(estimated_stepping_batches=1000)
        self.module.log = lambda *_, **__: None
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def model(self) -> Any:
        return self.module.model

    def __call__(self, samples: Sequence[Sample]) -> tuple[float, float]:
        """Run one training step; returns its loss, and the seconds of it that collating took."""
        start = time.perf_counter()
        batch = self.collate(samples).to(self.device)
        collated = time.perf_counter() - start
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), collated

    def loss(self, batch: Any) -> Tensor:
        """The loss of a collated batch."""
        kind = self.device.type
        with torch.autocast(kind, dtype=self.autocast) if self.autocast else nullcontext():
            return self.module.training_step(batch, 0)


def rows_of(task: Task, folder: Path, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The samples as rows for TRL, one for each rejected response, with the pairs that our side draws."""
    from tests.performance.trl_peer import as_row

    chat = ChatFormat(AutoProcessor.from_pretrained(folder), ElicitationPrompt())
    rows = []
    for sample in samples:
        query = sample.query
        _, candidates = tokenize_responses(chat, query, [sample.answer], LEVELS)
        target = nearest([c.confidence for c in candidates], sample.confidence)
        picks = (
            choose(policy_of(task), candidates, target, query, sample.epoch) if task.rejected else [target]
        )
        prompt = chat.render(query.question)
        texts = [render_response(sample.answer, candidates[i].confidence) for i in picks]
        # Our labels end with the turn; TRL would also learn the line break that some templates write behind it.
        full = chat.conversations(query.question, texts)
        chosen, *rejected = (text.removeprefix(prompt).rstrip() for text in full)
        if task.rejected:
            rows += [as_row(sample.image, prompt=prompt, chosen=chosen, rejected=text) for text in rejected]
        else:
            rows.append(as_row(sample.image, prompt=prompt, completion=chosen))
    return rows


def make_arm(arm: str, task: Task, folder: Path, n_batches: int) -> Step:
    """The training steps of one side on the batches of this benchmark."""
    samples = make_samples(BATCH * n_batches)
    model = load_for_training(BaseModel(str(folder), dtype="float32"))
    if arm == OURS:
        ours = OurStep(task, folder, False, model)
        return lambda i: ours(samples[BATCH * i : BATCH * (i + 1)])
    from tests.performance.trl_peer import TRLStep

    rows = rows_of(task, folder, samples)
    size = BATCH * max(1, task.rejected)
    theirs = TRLStep(
        folder,
        rows,
        batch=size,
        lr=LR,
        beta=BETA,
        restricted=arm == RESTRICTED,
        checkpointing=False,
        scratch=folder / "trl",
        model=model,
    )
    return lambda i: theirs(rows[size * i : size * (i + 1)])


class Timing(NamedTuple):
    """Of one side the seconds of each step, and all losses, that of the warm-up step first."""

    steps: list[float]
    losses: list[float]


def time_task(task: Task, folder: Path, rounds: int) -> dict[str, Timing]:
    """Time alternating steps of all arms, after one warm-up round; the order rotates, because each step changes the caches."""
    steps = {arm: make_arm(arm, task, folder, rounds + 1) for arm in ARMS}
    timings = {arm: Timing([], []) for arm in ARMS}
    for i in range(rounds + 1):
        for arm in ARMS[i % len(ARMS) :] + ARMS[: i % len(ARMS)]:
            gc.collect()
            start = time.perf_counter()
            timings[arm].losses.append(steps[arm](i)[0])
            timings[arm].steps.append(time.perf_counter() - start)
    for timing in timings.values():
        del timing.steps[0]
    return timings


def difference(timings: dict[str, Timing], arm: str) -> float:
    """The largest relative difference between an arm's losses and ours."""
    pairs = zip(timings[OURS].losses, timings[arm].losses, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


HEADER = ("what", "side", "step (s)", "ours is faster", "to be at least", "largest difference of losses")


def lines(task: Task, timings: dict[str, Timing]) -> list[str]:
    """The rows of one task."""
    table = []
    for arm, timing in timings.items():
        cells = [task.title, arm, f"{statistics.median(timing.steps):.3f}"]
        ratios = [theirs / ours for theirs, ours in zip(timing.steps, timings[OURS].steps, strict=True)]
        ratio, target = statistics.median(ratios), task.faster.get(arm)
        cells.append("" if arm == OURS else f"{ratio:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
        cells.append(f"{target:g}x: {'met' if round(ratio, 2) >= target else 'missed'}" if target else "")
        cells.append("" if arm == OURS else f"{difference(timings, arm):.1e}")
        table.append(f"| {' | '.join(cells)} |")
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--what", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    if missing := [name for name in ("trl", "datasets") if find_spec(name) is None]:
        raise SystemExit(f"{missing[0]} is not installed: pip install -e '.[bench]'")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    agree = True
    print(
        f"{processor()}, one thread, {args.rounds} interleaved rounds, {BATCH} queries a step, "
        f"{setting('torch', 'transformers', 'peft', 'trl')}\n"
    )
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        for task in (TASKS[what] for what in args.what):
            timings = time_task(task, folder, args.rounds)
            print("\n".join(lines(task, timings)), flush=True)
            agree &= all(difference(timings, arm) <= TOLERANCE for arm in ARMS)
    print(
        f"\nMedians; ratios are medians of paired rounds (smallest to largest). A query with {TASKS['dpo4'].rejected} "
        f"rejected responses is as many pairs to TRL. Losses of all {args.rounds + 1} steps "
        f"{'agree' if agree else 'DISAGREE'} to four digits (relative difference at most {TOLERANCE:g})."
    )
    if not agree:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
