"""The isotonic map of the reference's expected confidence, fitted on the validation queries before training."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from vlm_calibration.data.pairs import Candidate, IsotonicMap, PairBatch, fit_isotonic_map
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.models.vision import shared_vision
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.stages.answering import answer_batch, tokenizer_of
from vlm_calibration.stages.level_distribution import LevelDistribution
from vlm_calibration.text.confidence import strip_confidence


class HasReference(Protocol):
    """What is needed of a module here."""

    model: Any
    max_new_tokens: int

    def as_reference(self) -> AbstractContextManager[None]:
        """A context in which the model is the reference."""

    def score_reference(
        self, batch: PairBatch, candidates: tuple[tuple[Candidate, ...], ...]
    ) -> ResponseScores:
        """Log-likelihoods under the reference."""


@torch.no_grad()
def fit_recalibration(module: Any) -> IsotonicMap:
    """Let the reference answer the validation queries, and map the confidence it expects in its answer to its accuracy.

    Every process takes its share of the queries, and all fit the same map.

    Args:
        module: a LightningModule in training that `HasReference`.

    Raises:
        DataError: there are no validation queries.
    """
    data = module.trainer.datamodule
    if data.validation is None:
        raise DataError("data.validation is not set: `target: recalibrated` fits its map on those queries")
    rows: list[tuple[float, bool, str]] = []
    training = module.model.training
    module.model.eval()  # gradient checkpointing would keep generation from using its cache
    for batch in data.val_dataloader():
        prompts, pairs = batch.prompts.to(module.device), batch.pairs.to(module.device)
        if not pairs.inputs:
            continue
        with shared_vision(module.model):
            with module.as_reference():
                answers = answer_batch(module.model, prompts, tokenizer_of(module), module.max_new_tokens)
            answers = [a for a in answers if a.id not in pairs.skipped]
            rows += _expected(module, pairs, answers, data.pair_collator)
    module.model.train(training)
    rows = _of_all_processes(rows)  # before anything is raised, so that no process waits for another
    if not rows:
        raise DataError(
            "the reference gave no answer that could be read to any validation query, so there is nothing to fit the map of "
            "`target: recalibrated` on: use `target: expected`, or train stage 1 longer"
        )
    return fit_isotonic_map(*zip(*rows, strict=True))


def _expected(
    module: HasReference, pairs: PairBatch, answers: list[Prediction], collator: Any
) -> list[tuple[float, bool, str]]:
    """(expected confidence, whether right, answer type) of each answer that could be read."""
    read = [row for row, answer in enumerate(answers) if answer.predicted]
    found = [
        collator.candidates(query, [strip_confidence(answer.text) or query.answer])
        for query, answer in zip(pairs.queries, answers, strict=True)
    ]
    candidates = tuple(c for _, c in found)
    # How much of a prompt's end a response takes into its first token depends on the answer.
    cut = torch.tensor([n for n, _ in found], device=pairs.lengths.device)
    pairs = pairs._replace(lengths=pairs.inputs["attention_mask"].sum(dim=1) - cut)
    belief = LevelDistribution(module.score_reference(pairs, candidates).total, candidates)
    return [(belief.expected(row), answers[row].correct, answers[row].answer_type) for row in read]


def _of_all_processes(rows: list[Any]) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]
