"""Stage 2: preference optimisation of the stated confidence, starting from the adapter of stage 1.

For one noised image and one answer, the response that states the target confidence is preferred over responses that state
other confidences (CSP, arXiv 2504.14848). A training step: choose the candidates (`preference_targets`), score them
(`models.shared_prefix`: one pass over image and prompt for all candidates, one pass of the frozen vision tower for policy and
reference), and compare the scores (`losses.preference`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vlm_calibration.data.candidates import CandidateBatch, Candidates, ValidationBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.losses.candidates import CandidateLoss
from vlm_calibration.losses.preference import DPO, preference_statistics
from vlm_calibration.losses.sequence import AnswerWeight
from vlm_calibration.models.adapters import (
    REFERENCE,
    LoraSettings,
    ModelPart,
    attach_lora,
    continue_adapter,
    using_adapter,
)
from vlm_calibration.models.base import find_adapter
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.shared_prefix import Prompts, ResponseScores, Scoring, score_responses
from vlm_calibration.models.vision import shared_vision
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.stages.answering import answer_batch, device_of, tokenizer_of
from vlm_calibration.stages.dpo_terms import answer_statistics, candidate_scores, chosen_nll, logp_drift
from vlm_calibration.stages.optimization import OptimizerSettings, adamw_with_schedule
from vlm_calibration.stages.preference_targets import (
    IsotonicMap,
    LevelDistribution,
    PairPolicy,
    choose_candidates,
    fit_recalibration,
    kl_divergence,
)
from vlm_calibration.stages.provenance import check_image_size, check_levels
from vlm_calibration.stages.scoring import Results, Scorer
from vlm_calibration.stages.training import (
    check_trained_weights,
    keep_trained_weights,
    log_results,
    prepare_for_training,
    seed_batch,
    trained_parameters,
    warn_of_skipped,
    zero_loss,
)

PAIR_STATISTICS = ("reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer", "kl")


class DPOModule(L.LightningModule):
    """Trains the stated confidence by preferences, starting from a trained adapter.

    Args:
        base: the model below the adapter.
        adapter: folder of the adapter to continue, as stage 1 writes it; None: a new one on the base model.
        lora: settings of the new adapter if `adapter` is None; a given adapter keeps its own.
        loss: a preference loss (DPO, SimPO, IPO, Ordinal or Listwise), or a loss of the distribution over confidences
            (SoftLabel, TokenizedBrier or ExpectedBrier) and over answers too (RLCR).
        pairs: which of a query's candidates is chosen and which are rejected.
        reference: the frozen reference of the loss: the given adapter ("adapter"), the model without adapter ("base"), or
            "none" for losses that need no reference.
        parts: train only the given adapter's layers in these parts of the model; None: all of them. A new adapter uses
            `lora.parts`.
        optimizer: AdamW and its schedule.
        nll_weight: weight of the chosen responses' negative log-likelihood per token in the loss, at least 0
            (arXiv 2404.19733).
        confidence_weight: weight of the confidence's tokens in that likelihood, at least 0.
        answer_weight: weight of a correct answer's tokens in it: "constant" is 1, "confidence" the stated confidence. Tokens
            of a wrong answer have weight 0.
        drift_weight: weight in the loss, at least 0, of the squared change since the reference of the log-likelihood of what
            the responses share, the answer and the ending. At 0, both can collapse.
        scoring: "auto" shares the prefix between candidates if that is exact for the model, "shared" requires it, "plain" does
            not share.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        max_new_tokens: length limit of the answers generated in validation.
    """

    model: Any
    results: Results

    def __init__(
        self,
        base: BaseModel,
        adapter: str | None = None,
        lora: LoraSettings = LoraSettings(),  # noqa: B008  (frozen)
        loss: CandidateLoss = DPO(),  # noqa: B008  (frozen)
        pairs: PairPolicy = PairPolicy(),  # noqa: B008  (frozen)
        reference: Literal["adapter", "base", "none"] = "adapter",
        parts: list[ModelPart] | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(lr=2e-5),  # noqa: B008  (frozen)
        nll_weight: float = 0.0,
        confidence_weight: float = 1.0,
        answer_weight: AnswerWeight = "confidence",
        drift_weight: float = 0.0,
        scoring: Scoring = "auto",
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__()
        for name, weight in (
            ("nll_weight", nll_weight),
            ("confidence_weight", confidence_weight),
            ("drift_weight", drift_weight),
        ):
            if not 0 <= weight < math.inf:
                raise DataError(f"model.{name} must be a finite number of at least 0, found {weight}")
        if reference == "adapter" and adapter is None:
            raise DataError(
                "model.reference: adapter, but model.adapter is not set: set it to the adapter of stage 1, or compare with "
                "the base model (`reference: base`)"
            )
        if parts is not None and adapter is None:
            raise DataError("model.parts needs a given adapter: set model.lora.parts for a new one")
        if reference == "none":
            _check_without_reference(loss, pairs, drift_weight)
        self.base = base
        self.adapter = adapter
        self.lora = lora
        self.loss = loss
        self.pairs = pairs
        self.reference = reference
        self.parts = parts
        self.optimizer_settings = optimizer
        self.nll_weight = nll_weight
        self.confidence_weight = confidence_weight
        self.answer_weight = answer_weight
        self.drift_weight = drift_weight
        self.scoring = scoring
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self.scorer = Scorer()
        # A metric per name, because the processes need not have values for the same names.
        self.pair_means = nn.ModuleDict({name: MeanMetric() for name in PAIR_STATISTICS})
        self.skipped = 0
        self.recalibration: IsotonicMap | None = None
        # Checkpoints hold the trained weights alone; base and reference are loaded again.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        self.check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        """Reject data without candidates, or with levels that were measured differently, before the model is loaded."""
        if data.candidates is None:
            raise DataError("data.candidates is not set: preference optimisation needs it")
        check_levels(data.noise.levels, self.base, data)
        if self.adapter is not None:
            check_image_size({self.adapter: str(find_adapter(self.adapter))}, data)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        model = load_for_training(self.base, device_of(self))
        if self.adapter is None:
            adapted = attach_lora(model, self.lora)
        else:
            adapted = continue_adapter(model, self.adapter, self.parts, self.reference == "adapter")
        self.model = prepare_for_training(self, adapted, self.gradient_checkpointing)

    def on_fit_start(self) -> None:
        if self.pairs.target == "recalibrated" and self.recalibration is None:
            self.recalibration = fit_recalibration(self)

    def on_train_batch_start(self, batch: CandidateBatch, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: CandidateBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not batch.inputs:
            return zero_loss(self)
        with shared_vision(self.model):
            compared, reference = self.choose(
                batch
            )  # K candidates of each of B queries, the chosen one first
            policy = self.score(batch, compared)  # log_likelihood [B, K, T]
        scores = candidate_scores(policy, reference, compared, *_labels(compared, batch.is_correct))  # [B, K]
        loss = self.loss(scores)
        if self.nll_weight:
            loss = loss + self.nll_weight * chosen_nll(
                policy, compared, batch.is_correct, self.answer_weight, self.confidence_weight
            )
        if self.drift_weight:
            assert reference is not None
            loss = loss + self.drift_weight * logp_drift(policy, reference, compared)
        size = len(batch.queries)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        statistics = preference_statistics(self.loss, scores)
        for name, value in (statistics | answer_statistics(policy, compared, batch.is_correct)).items():
            if not bool(value.isnan()):
                self.log(f"train/{name}", value, prog_bar=name == "reward_accuracy", batch_size=size)
        self.log("train/skipped", float(self.skipped), batch_size=size)
        return loss

    def choose(self, batch: CandidateBatch) -> tuple[Candidates, ResponseScores | None]:
        """For each query the chosen candidate, then the rejected ones, and their scores under the reference if needed."""
        scores, distribution = None, None
        if self.pairs.needs_reference:
            scores = self.score_reference(batch, batch.candidates)
            distribution = LevelDistribution(scores.total, batch.candidates)
        picks = choose_candidates(self.pairs, batch, distribution, self.recalibration)
        compared = tuple(
            tuple(row[i] for i in pick) for row, pick in zip(batch.candidates, picks, strict=True)
        )
        if not (self.loss.needs_reference or self.drift_weight):
            return compared, None
        if scores is None:
            return compared, self.score_reference(batch, compared)
        # A row with fewer candidates repeats its first one, which is masked because the policy has no tokens there.
        width = max(map(len, picks))
        index = torch.tensor([[*p, *[p[0]] * (width - len(p))] for p in picks], device=scores.tokens.device)
        rows = torch.arange(len(picks), device=index.device)[:, None]
        return compared, ResponseScores(*(values[rows, index] for values in scores))

    def score(self, batch: CandidateBatch, candidates: Candidates) -> ResponseScores:
        """Log-likelihoods of candidates under the active adapter."""
        tokens = [[c.tokens for c in row] for row in candidates]
        return score_responses(self.model, Prompts(batch.inputs, batch.lengths), tokens, self.scoring)

    @torch.no_grad()
    def score_reference(self, batch: CandidateBatch, candidates: Candidates) -> ResponseScores:
        """Log-likelihoods of candidates under the reference."""
        with self.as_reference():
            return self.score(batch, candidates)

    def as_reference(self) -> AbstractContextManager[None]:
        """Turn the model into the reference within a context."""
        return using_adapter(self.model, REFERENCE if self.reference == "adapter" else None)

    def on_validation_start(self) -> None:
        self.scorer.reset()
        for mean in self.pair_means.values():
            cast(MeanMetric, mean).reset()

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        with shared_vision(self.model):
            predictions = answer_batch(self.model, batch.prompts, tokenizer_of(self), self.max_new_tokens)
        self.scorer.update(predictions)
        # `vlm-calibration validate` has no map for `target: recalibrated`, which is fitted when training starts.
        ready = self.pairs.target != "recalibrated" or self.recalibration is not None
        if batch.candidates is not None and batch.candidates.inputs and ready:
            self._validate_pairs(batch.candidates)
        return {"": predictions}

    def _validate_pairs(self, batch: CandidateBatch) -> None:
        with shared_vision(self.model):
            compared, reference = self.choose(batch)
            policy = self.score(batch, compared)
            distributions = [LevelDistribution(self.score(batch, batch.candidates).total, batch.candidates)]
            if self.reference != "none":
                total = self.score_reference(batch, batch.candidates).total
                distributions.append(LevelDistribution(total, batch.candidates))
        scores = candidate_scores(policy, reference, compared, *_labels(compared, batch.is_correct))
        statistics = preference_statistics(self.loss, scores)
        statistics |= answer_statistics(policy, compared, batch.is_correct)
        if self.reference != "none":
            statistics["kl"] = kl_divergence(*distributions)
        for name, value in statistics.items():
            if not bool(value.isnan()):
                count = sum(batch.is_correct) if name == "logp_answer" else len(batch.queries)
                cast(MeanMetric, self.pair_means[name]).update(value, count)

    def on_validation_epoch_end(self) -> None:
        self.results = {"": self.scorer.compute()}
        log_results(self, self.results)
        with warnings.catch_warnings():
            # Without a reference there is no KL divergence, and a metric without values is not logged.
            warnings.filterwarnings(
                "ignore", message="The ``compute`` method of metric MeanMetric was called before"
            )
            means = {name: cast(MeanMetric, mean).compute() for name, mean in self.pair_means.items()}
        for name, value in means.items():
            if not bool(value.isnan()):
                self.log(f"val/{name}", value, rank_zero_only=True)

    def on_train_end(self) -> None:
        warn_of_skipped(self, self.skipped)

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(
            trained_parameters(self), self.optimizer_settings, self.trainer.estimated_stepping_batches
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained_weights(self, checkpoint)
        checkpoint["recalibration"] = None if self.recalibration is None else dict(self.recalibration.knots)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_trained_weights(self, checkpoint)
        knots = checkpoint.get("recalibration")
        self.recalibration = None if knots is None else IsotonicMap(knots)


def _labels(compared: Candidates, is_correct: Sequence[bool]) -> tuple[list[float], list[list[bool]]]:
    """For each query the chosen confidence, and whether the answer of each candidate is correct."""
    correct = [[c.wrong != own for c in row] for row, own in zip(compared, is_correct, strict=True)]
    return [row[0].confidence for row in compared], correct


def _check_without_reference(loss: CandidateLoss, pairs: PairPolicy, drift_weight: float) -> None:
    """Raise a DataError for settings that need the reference, for a module that has none."""
    if loss.needs_reference:
        raise DataError(f"model.reference: {type(loss).__name__} needs one, found none")
    if drift_weight:
        raise DataError("model.drift_weight compares with the reference, but model.reference is none")
    if pairs.needs_reference:
        raise DataError(
            f"model.pairs: `target: {pairs.target}`, `on_policy: {pairs.on_policy}` needs the reference, but "
            "model.reference is none"
        )
