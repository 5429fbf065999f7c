"""Measures what anchored levels teach: the base model's accuracy by kind and strength of perturbation, and by its own certainty."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.dataset import query_id_of_level
from vlm_calibration.data.module import INSTANCES, LEVELS, PerturbedQueryDataModule
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.generating import GenerationRecorder
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.models.sharding import wait_for_others
from vlm_calibration.perturbation.answer_likelihoods import write_likelihoods
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.records import ANSWER_TYPES, DataError, Query
from vlm_calibration.stages.answering import (
    answer_batch,
    check_shardable,
    device_of,
    rank_answers,
    shard_as_asked,
    tokenizer_of,
)
from vlm_calibration.stages.provenance import provenance_of

MAX_BINS = 8
MIN_QUERIES_PER_BIN = 50
"""Bins of the likelihood: at most `MAX_BINS`, each with at least this many queries; our choice. Ten more queries in each would
move an accuracy by a percent or two, less than the differences between bins."""


class LevelAnswers(Metric):
    """Collects N answers of all processes: what was asked, whether it was answered correctly, and the answer's likelihood."""

    full_state_update = False
    query: list[Tensor]
    answer_type: list[Tensor]
    level: list[Tensor]
    correct: list[Tensor]
    likelihood: list[Tensor]
    columns = ("query", "answer_type", "level", "correct", "likelihood")

    def __init__(self) -> None:
        super().__init__()
        for name in self.columns:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self, query: Tensor, answer_type: Tensor, level: Tensor, correct: Tensor, likelihood: Tensor
    ) -> None:
        """Add N answers.

        Args:
            query: int64 [N], `number_of` the query.
            answer_type: int64 [N], index into `ANSWER_TYPES`.
            level: int64 [N], index of the perturbation.
            correct: bool [N].
            likelihood: float32 [N], in [0, 1]; NaN where it was not measured.
        """
        for name, values in zip(self.columns, (query, answer_type, level, correct, likelihood), strict=True):
            getattr(self, name).append(values)

    def compute(self) -> dict[str, np.ndarray]:
        """Column -> its values, of all processes."""
        return {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self.columns}


def number_of(query_id: str) -> int:
    """A number in the range of int64 that stands for a query in tensors."""
    return int.from_bytes(hashlib.blake2b(query_id.encode(), digest_size=8).digest(), signed=True)


class LevelFitModule(L.LightningModule):
    """Answers the queries of `data.levels` at every level of each kind of perturbation with the base model and writes a level table.

    Queries that `data.grading` ranks need no generation, unless likelihoods are written: an answer is correct if it is likelier
    than the wrong ones.

    Args:
        base: the base model.
        out: JSON file to write.
        likelihoods: Parquet file to write: how likely the base model holds its own answer to each query of `data.train`,
            untouched, with which `AnchoredLevels` tells hard images from easy ones. None: `data.train` is not answered, and the
            table has no bins of the likelihood.
        max_new_tokens: length limit of an answer.
    """

    model: Any
    asks = LEVELS
    """The data set that the data module provides for `test`."""

    def __init__(
        self,
        base: BaseModel,
        out: str = "runs/levels.json",
        likelihoods: str | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__()
        self.base = base
        self.out = out
        self.likelihoods = likelihoods
        self.max_new_tokens = max_new_tokens

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            check_shardable(self, self.base)
            self.model = shard_as_asked(self, load_base(self.base, device_of(self))).eval()

    @property
    def _data(self) -> PerturbedQueryDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_test_start(self) -> None:
        self.perturbations = self._data.noise.perturbations
        # The likelihood of an answer does not depend on the confidences that are scored after it.
        self.tokenizer = AnswerTokenizer(self._data.chat, [LinearLevels(2)])
        self.answers = {name: LevelAnswers().to(self.device) for name in (LEVELS, INSTANCES)}
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        for answers in self.answers.values():
            # A process without queries takes part in the exchange as well.
            answers.update(empty, empty, empty, empty.bool(), empty.float())

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not batch.queries:
            return
        untouched = [perturbation == CLEAN for perturbation in batch.perturbations]
        likelihood: Sequence[float | None] = [None] * len(batch.queries)
        if any(untouched) and self.likelihoods is not None:
            correct, likelihood = self._answer_with_likelihood(batch)
        elif all(batch.grading.ranks(query.answer_type) for query in batch.queries):
            correct = [bool(is_correct) for is_correct in rank_answers(self.model, batch)]
        else:
            answers = answer_batch(self.model, batch, tokenizer_of(self), self.max_new_tokens)
            correct = [answer.correct for answer in answers]
        name = (LEVELS, INSTANCES)[dataloader_idx]
        own_id = query_id_of_level if name == LEVELS else str
        columns = (
            [number_of(own_id(q.id)) for q in batch.queries],
            [ANSWER_TYPES.index(q.answer_type) for q in batch.queries],
            [self.perturbations.index(p) for p in batch.perturbations],
            correct,
            # An answer that is none, such as "maybe" to a yes/no question, is not held at all.
            [float(p or 0) if clean else torch.nan for p, clean in zip(likelihood, untouched, strict=True)],
        )
        self.answers[name].update(*(torch.tensor(column, device=self.device) for column in columns))

    def _answer_with_likelihood(self, batch: PromptBatch) -> tuple[list[bool], list[float | None]]:
        """Whether the model's own answers are correct, and how likely it holds them."""
        recorder = GenerationRecorder(self.model, keep_cache=True)
        answers = answer_batch(recorder, batch, tokenizer_of(self), self.max_new_tokens)
        answered = AnsweredBatch(
            self.model, batch, answers, recorder.passes, self.tokenizer, self.max_new_tokens, recorder.cache
        )
        return [answer.correct for answer in answers], AnswerLikelihood().estimate(answered).confidence

    def on_test_epoch_end(self) -> None:
        wait_for_others(self.model)
        counts = count_levels(self.answers[LEVELS].compute(), self.perturbations)
        provenance = provenance_of(self.base, self._data, counts)
        self.levels = AnchoredLevels.fit(counts, provenance=provenance)
        try:
            self.levels.table.check_usable()
        except ValueError as error:
            raise DataError(f"{self.out} is not written: {error}") from error
        instances = self.answers[INSTANCES].compute()
        if not self.trainer.is_global_zero:
            return
        self.levels.save(self.out)
        if self.likelihoods is not None:
            by_number = dict(zip(instances["query"].tolist(), instances["likelihood"].tolist(), strict=True))
            queries: Sequence[Query] = self._data.tested_queries[INSTANCES]
            measured = {q.id: by_number[n] for q in queries if (n := number_of(q.id)) in by_number}
            write_likelihoods(Path(self.likelihoods), measured, provenance)


def count_levels(
    answers: Mapping[str, np.ndarray], perturbations: Sequence[Perturbation]
) -> dict[str, AnswerTypeCounts]:
    """Count the correct answers by answer type, kind, strength and bin of the likelihood.

    Args:
        answers: columns of `LevelAnswers`.
        perturbations: what `level` is an index of.

    Raises:
        DataError: there is no answer of a type at a level.
    """
    counts = {}
    for index, answer_type in enumerate(ANSWER_TYPES):
        own = answers["answer_type"] == index
        if own.any():
            columns = {name: values[own] for name, values in answers.items()}
            counts[answer_type] = _count(answer_type, columns, perturbations)
    return counts


def _count(
    answer_type: str, answers: Mapping[str, np.ndarray], perturbations: Sequence[Perturbation]
) -> AnswerTypeCounts:
    if np.isnan(answers["likelihood"]).all():
        answers = {**answers, "likelihood": np.zeros(len(answers["query"]))}
    measured = ~np.isnan(answers["likelihood"])
    likelihood_of = dict(
        zip(answers["query"][measured].tolist(), answers["likelihood"][measured].tolist(), strict=True)
    )
    # Without an untouched image (its record could not be loaded then), a query has no bin.
    known = np.array([query in likelihood_of for query in answers["query"].tolist()])
    likelihood = np.array([likelihood_of[query] for query in answers["query"][known].tolist()])
    level, correct = answers["level"][known], answers["correct"][known]
    values = np.array(list(likelihood_of.values()))
    for n_bins in range(max(1, min(MAX_BINS, len(values) // MIN_QUERIES_PER_BIN)), 0, -1):
        quantiles = np.quantile(values, np.arange(1, n_bins) / n_bins) if n_bins > 1 else np.empty(0)
        # Equal quantiles, where many answers are equally likely, are one edge.
        edges = np.unique(quantiles[quantiles > values.min(initial=1.0)])
        bins = np.searchsorted(edges, likelihood, side="right")
        shape = (len(edges) + 1, len(perturbations))
        n, n_correct = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        np.add.at(n, (bins, level), 1)
        np.add.at(n_correct, (bins, level), correct)
        if n.all():
            return AnswerTypeCounts(
                tuple(_kind_counts(perturbations, *rows) for rows in zip(n, n_correct, strict=True)),
                tuple(edges.tolist()),
            )
    kind, strength = perturbations[int(np.argmin(n[0]))]
    raise DataError(
        f"no {answer_type} query with {kind} of strength {strength:g}: data.levels has only queries about absent objects, whose "
        "images `data.noise.absent: clean` leaves untouched"
    )


def _kind_counts(
    perturbations: Sequence[Perturbation], n: np.ndarray, n_correct: np.ndarray
) -> dict[str, tuple[LevelCount, ...]]:
    """Kind -> its counts, that of untouched images first."""
    rows = [
        (kind, LevelCount(strength, int(total), int(right)))
        for (kind, strength), total, right in zip(perturbations, n, n_correct, strict=True)
    ]
    (_, untouched), *perturbed = rows
    kinds = dict.fromkeys(kind for kind, _ in perturbed)
    return {kind: (untouched, *(row for k, row in perturbed if k == kind)) for kind in kinds}
