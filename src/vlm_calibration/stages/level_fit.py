"""Measures what anchored levels teach: the base model's accuracy by kind and strength of perturbation, and by its own certainty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.dataset import EvalSplit, query_id_of_level
from vlm_calibration.data.module import INSTANCES, LEVELS, DataNeeds, PerturbedQueryDataModule
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer, right_padded
from vlm_calibration.estimators.base import LocalSystem, grade_answers
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.models.shared_prefix import Prompts, score_responses
from vlm_calibration.perturbation.level_table import AnswerTypeCounts, LevelCount, Measured, write_likelihoods
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.progress import track
from vlm_calibration.records import ANSWER_TYPES, DataError, Prediction
from vlm_calibration.settings import digest
from vlm_calibration.stages.answer_log import AnswerLog, ResumeState
from vlm_calibration.stages.evaluation import BASE, BatchAnswers
from vlm_calibration.stages.provenance import provenance_of
from vlm_calibration.stages.training import device_of, refuse_sharding

LIKELIHOOD = AnswerLikelihood.name
MAX_BINS = 8
MIN_QUERIES_PER_BIN = 50
"""Bins of the likelihood: at most `MAX_BINS`, each with at least this many queries; our choice. Ten more queries in each would
move an accuracy by a percent or two, less than the differences between bins."""


class LevelFitModule(L.LightningModule):
    """Answers the queries of `data.levels` at every level of each kind of perturbation with the base model and writes a level table.

    The answers are in an `AnswerLog` in the run directory, from which an interrupted run resumes, and which stays if the table is refused.
    With `data.grading.rank_levels`, open queries need no generation, unless likelihoods are written: see `rank_answers`.

    Args:
        base: the base model.
        out: JSON file to write.
        likelihoods: Parquet file to write: how likely the base model holds its own answer to each query of `data.train`,
            untouched, with which `AnchoredLevels` tells hard images from easy ones. None: `data.train` is not answered, and the
            table has no bins of the likelihood.
        max_new_tokens: length limit of an answer.
    """

    model: Any
    answers: AnswerLog
    run_digest: str | None = None
    """Of the record of this run, whose answers it resumes from; None: it does not resume."""
    start_over = False
    """Whether all queries are asked again, whatever an earlier run answered."""

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

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds((LEVELS,) if self.likelihoods is None else (LEVELS, INSTANCES), ())

    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        return [Path(path) for path in (self.out, self.likelihoods) if path is not None]

    def setup(self, stage: str) -> None:
        refuse_sharding(self)
        data, asked = self._data, (LEVELS,) if self.likelihoods is None else (LEVELS, "train")
        contents = {name: contents_of(data.read_splits(name), f"data.{name}") for name in asked}
        self._contents = contents.get("train", {})
        # The record leaves the bytes of images out; answers about other images are not counted with these.
        run = None if self.run_digest is None else digest([self.run_digest, repr(contents)])
        folder = Path(self.trainer.default_root_dir)
        answers = self.answers = AnswerLog(folder, self.global_rank, data.tested_queries, run)
        # Lightning tells callbacks alone of an error.
        self.trainer.callbacks.append(LambdaCallback(on_exception=lambda *_: answers.close()))  # type: ignore[attr-defined]
        self._state = ResumeState() if self.start_over else answers.find(self.trainer.limit_test_batches)
        data.answered = self._state.answered or {}

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = load_base(self.base, device_of(self)).eval()

    @property
    def _data(self) -> PerturbedQueryDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_test_start(self) -> None:
        # The likelihood of an answer does not depend on the confidences that are scored after it.
        self.tokenizer = AnswerTokenizer(self._data.chat, LinearLevels(2))
        if self._state.message:
            rank_zero_info(self._state.message)
        if self._state.answered is None:
            self.answers.clear()
            # No process answers before all have removed the files.
            self.trainer.strategy.barrier("cleared")

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        answers = self._answer(batch) if batch.queries else []
        name = (LEVELS, INSTANCES)[dataloader_idx]
        self.answers.add(name, BatchAnswers(answers={BASE: answers}, passes={}))

    def _answer(self, batch: PromptBatch) -> list[Prediction]:
        """The model's own answers, those to untouched images with their likelihood if it is written; a ranked one may be empty."""
        ranked = rank_answers(self.model, batch)
        untouched = [perturbation == CLEAN for perturbation in batch.perturbations]
        estimators = [AnswerLikelihood()] if any(untouched) and self.likelihoods is not None else []
        if estimators or None in ranked:
            system = LocalSystem(self.model, None, self.tokenizer, self.max_new_tokens, estimators)
            answers = system.answer(batch).predictions
        else:
            answers = grade_answers(batch._replace(grading=None), [""] * len(batch.queries))
        graded = []
        for answer, rank, clean in zip(answers, ranked, untouched, strict=True):
            # An answer that is none, such as "maybe" to a yes/no question, is not held at all.
            held = {name: float(np.float32(p or 0)) for name, p in answer.estimates.items() if clean}
            correct = answer.correct if rank is None else rank
            graded.append(replace(answer, estimates=held, correct=correct))
        return graded

    def on_test_epoch_end(self) -> None:
        self.answers.close()
        self.trainer.strategy.barrier("answers")
        counts = count_levels(self._logged(LEVELS), self._data.noise.perturbations)
        provenance = provenance_of(self.base, self._data, counts)
        try:
            self.levels = AnchoredLevels.fit(counts, provenance=provenance)
            self.levels.table.check_usable()
        except ValueError as error:
            kept = self.answers.folder / self.answers.pattern
            raise DataError(f"{self.out} is not written: {error}; {kept} has the answers") from error
        if not self.trainer.is_global_zero:
            return
        self.levels.save(self.out)
        if self.likelihoods is not None:
            for answer_type, of_type in counts.items():
                if (n := int(of_type.untouched[0].sum())) < (enough := 2 * MIN_QUERIES_PER_BIN):
                    needed = f"to tell hard images from easy ones, levels need {enough}"
                    rank_zero_warn(f"data.levels has {n} queries with {answer_type} answers: {needed}")
            likelihoods = {answer.id: answer.estimates[LIKELIHOOD] for answer in self._logged(INSTANCES)}
            measured = {
                query.id: Measured(cast(float, likelihoods[query.id]), self._contents[query.id])
                for query in self._data.tested_queries[INSTANCES]
                if query.id in likelihoods and query.id in self._contents
            }
            write_likelihoods(Path(self.likelihoods), measured, provenance)

    def _logged(self, name: str) -> Iterator[Prediction]:
        """The answers of all processes to a data set, also those of an interrupted run."""
        return (answer for batch in self.answers.batches(name) for answer in batch["answers"][BASE])

    def teardown(self, stage: str) -> None:
        """Remove the answers once the record says that the run is finished."""
        if self.trainer.is_global_zero:
            self.answers.clear()


def contents_of(splits: Mapping[str, EvalSplit], where: str) -> dict[str, int]:
    """Query id -> digest of its question and image, which must be readable unless its query may be left out."""
    contents = {}
    for source in (split.source for split in splits.values()):
        queries = source.queries()
        for query in track(queries, f"reading the images of {where}", len(queries), "queries"):
            try:
                contents[query.id] = source.content_digest(query)
            except DataError:
                if source.on_bad_record == "raise":
                    raise
    return contents


@torch.no_grad()
def rank_answers(model: Any, batch: PromptBatch) -> list[bool | None]:
    """Whether the gold answer is likelier, per token, than every wrong one, by one forward pass; None for queries that are not ranked."""
    if not batch.ranked:
        return [None] * len(batch.queries)
    inputs, lengths = right_padded(batch.inputs)
    cut = torch.tensor([ranked.cut for ranked in batch.ranked], device=lengths.device)
    tokens = [ranked.tokens for ranked in batch.ranked]
    scores = score_responses(model, Prompts(inputs, lengths - cut), tokens)
    mean = scores.total / scores.lengths.clamp(min=1)
    mean = mean.masked_fill(scores.lengths == 0, -torch.inf)
    likeliest = zip((mean[:, :1] > mean[:, 1:]).all(1).tolist(), batch.queries, strict=True)
    return [is_likeliest if query.answer_type == "open" else None for is_likeliest, query in likeliest]


def count_levels(
    answers: Iterable[Prediction], perturbations: Sequence[Perturbation]
) -> dict[str, AnswerTypeCounts]:
    """Count the correct answers by answer type, kind, strength and bin of the likelihood; each query is once at each level.

    The first of `perturbations` leaves the image untouched; answers to it may have a likelihood. Raises a DataError if there is no
    answer of a type at a level.
    """
    level_of = {perturbation: index for index, perturbation in enumerate(perturbations)}
    rows = pd.DataFrame(
        (
            (
                answer.answer_type,
                query_id_of_level(answer.id),
                level_of[Perturbation(cast(str, answer.perturbation), cast(float, answer.strength))],
                answer.correct,
                answer.estimates.get(LIKELIHOOD, np.nan),
            )
            for answer in answers
        ),
        columns=["answer_type", "query", "level", "correct", "likelihood"],
    )
    given = [answer_type for answer_type in ANSWER_TYPES if answer_type in set(rows["answer_type"])]
    return {t: _count(t, rows[rows["answer_type"] == t], perturbations) for t in given}


def _count(answer_type: str, rows: pd.DataFrame, perturbations: Sequence[Perturbation]) -> AnswerTypeCounts:
    own = rows.groupby("query")["likelihood"].transform("first")
    # Without an untouched image (its record could not be loaded then), a query has no bin.
    rows = rows.assign(likelihood=0.0 if own.isna().all() else own).dropna()
    # The last column counts the queries that are asked untouched alone.
    is_perturbed = rows.groupby("query")["level"].transform("max") > 0
    level = rows["level"].where(is_perturbed, len(perturbations))
    values = rows.drop_duplicates("query")["likelihood"]
    for n_bins in range(max(1, min(MAX_BINS, len(values) // MIN_QUERIES_PER_BIN)), 0, -1):
        quantiles = np.quantile(values, np.arange(1, n_bins) / n_bins)
        # Equal quantiles, where many answers are equally likely, are one edge.
        edges = np.unique(quantiles[quantiles > values.min()])
        bins = np.searchsorted(edges, rows["likelihood"], side="right")
        counts = np.zeros((len(edges) + 1, len(perturbations) + 1, 2), dtype=np.int64)  # n and n_correct
        np.add.at(counts, (bins, level), np.stack([np.ones(len(rows), dtype=np.int64), rows["correct"]], -1))
        if counts[:, :-1, 0].all():
            strengths = [*(strength for _, strength in perturbations), 0.0]
            by_level = zip(strengths, counts.transpose(1, 2, 0).tolist(), strict=True)
            untouched, *perturbed, never_perturbed = (LevelCount(s, *map(tuple, c)) for s, c in by_level)
            by_kind: dict[str, tuple[LevelCount, ...]] = {}
            for (kind, _), count in zip(perturbations[1:], perturbed, strict=True):
                by_kind[kind] = (*by_kind.get(kind, (untouched,)), count)
            return AnswerTypeCounts(by_kind, tuple(edges.tolist()), never_perturbed)
    kind, strength = perturbations[1 + int(np.argmin(counts[0, 1:-1, 0]))]
    raise DataError(
        f"no {answer_type} query with {kind} of strength {strength:g}: `data.noise.absent: clean` leaves all of data.levels untouched"
    )
