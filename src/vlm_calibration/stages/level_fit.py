"""Measures the accuracy of the base model at each noise step, which anchored levels teach."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torchmetrics import Metric

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.module import LEVELS
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.perturbation.levels import AnchoredLevels, StepCount
from vlm_calibration.records import ANSWER_TYPES, DataError
from vlm_calibration.stages.answering import answer_batch, device_of, rank_answers, tokenizer_of
from vlm_calibration.stages.provenance import provenance_of


class StepCounts(Metric):
    """Counts of correct and of all answers per answer type and noise step: int64 [types, steps, 2], summed over processes."""

    full_state_update = False
    counts: torch.Tensor

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.add_state(
            "counts", torch.zeros(len(ANSWER_TYPES), n_steps, 2, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, answer_type: torch.Tensor, step_index: torch.Tensor, correct: torch.Tensor) -> None:
        """Count N answers.

        Args:
            answer_type: int64 [N], index into `ANSWER_TYPES`.
            step_index: int64 [N], index of the noise step.
            correct: bool [N].
        """
        ones = torch.ones_like(step_index)
        self.counts.index_put_((answer_type, step_index, ones * 0), correct.long(), accumulate=True)
        self.counts.index_put_((answer_type, step_index, ones), ones, accumulate=True)

    def compute(self) -> torch.Tensor:
        return self.counts


class LevelFitModule(L.LightningModule):
    """Answers the queries of `data.levels` at every noise step with the base model and writes a level table.

    Queries that `data.grading` ranks need no generation: an answer is correct if it is likelier than the wrong ones.

    Args:
        base: the base model.
        out: JSON file to write.
        max_new_tokens: length limit of an answer.
    """

    model: Any
    asks = LEVELS
    """The data set that the data module provides for `test`."""

    def __init__(self, base: BaseModel, out: str = "runs/levels.json", max_new_tokens: int = 64) -> None:
        super().__init__()
        self.base = base
        self.out = out
        self.max_new_tokens = max_new_tokens

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = load_base(self.base, device_of(self)).eval()

    def on_test_start(self) -> None:
        self.steps = self.trainer.datamodule.noise.levels.steps  # type: ignore[attr-defined]
        self.counts = StepCounts(len(self.steps)).to(self.device)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        if not batch.queries:
            return
        if all(batch.grading.ranks(query.answer_type) for query in batch.queries):
            correct = [bool(is_correct) for is_correct in rank_answers(self.model, batch)]
        else:
            answers = answer_batch(self.model, batch, tokenizer_of(self), self.max_new_tokens)
            correct = [answer.correct for answer in answers]
        self.counts.update(
            torch.tensor([ANSWER_TYPES.index(q.answer_type) for q in batch.queries], device=self.device),
            torch.tensor([self.steps.index(step) for step in batch.steps], device=self.device),
            torch.tensor(correct, device=self.device),
        )

    def on_test_epoch_end(self) -> None:
        table = self.counts.compute().tolist()
        measured = {
            kind: [StepCount(step, n, correct) for step, (correct, n) in zip(self.steps, rows, strict=True)]
            for kind, rows in zip(ANSWER_TYPES, table, strict=True)
            if any(n for _, n in rows)
        }
        for kind, counts in measured.items():
            for step, n, _ in counts:
                if n == 0:
                    raise DataError(
                        f"no {kind} query at noise step {step}: data.levels has only queries about absent objects, whose images "
                        "`data.noise.absent: clean` leaves clean"
                    )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.levels = AnchoredLevels.fit(measured, provenance=provenance_of(self.base, data, measured))
        try:
            self.levels.table.check_usable()
        except ValueError as error:
            raise DataError(f"{self.out} is not written: {error}") from error
        if self.trainer.is_global_zero:
            self.levels.save(self.out)
