"""Stage 2: teach the stated confidence with several responses to one image and question, starting from the adapter of stage 1.

A response that states the target confidence is preferred over responses that state others (CSP, arXiv 2504.14848; `losses.preference`),
or the distribution over all confidences is taught (`losses.distribution`). The responses give the gold answer, or what the reference
itself answers. A training step reads: candidates and their target (`compare`), scores (`score`: one pass over image and prompt for
all candidates, and one of the frozen vision tower for policy and reference), loss.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vlm_calibration.data.candidates import CandidateBatch, Candidates, ValidationBatch
from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.generating import answer_batch
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.losses.candidates import CandidateLoss, CandidateScores
from vlm_calibration.losses.distribution import DistributionLoss, SoftLabel
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
from vlm_calibration.models.forward import shared_vision
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.shared_prefix import Prompts, ResponseScores, Scoring, score_responses
from vlm_calibration.records import DataError
from vlm_calibration.stages import training
from vlm_calibration.stages.dpo_terms import (
    answer_statistics,
    candidate_scores,
    chosen_nll,
    shared_text_drift,
)
from vlm_calibration.stages.optimization import OptimizerSettings, adamw_with_schedule
from vlm_calibration.stages.own_answers import eval_mode, own_answers, own_candidates
from vlm_calibration.stages.preference_targets import (
    OF_GOLD_ANSWERS,
    Comparison,
    LevelDistribution,
    PairPolicy,
    choose_candidates,
    picked,
)
from vlm_calibration.stages.provenance import check_levels, differences_from_training
from vlm_calibration.stages.scoring import Results, Scorer
from vlm_calibration.stages.teachers import FittedTeacher, TargetChooser, TaughtAnswer, TeacherSettings

PAIR_STATISTICS = ("reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer", "kl")


class DPOModule(L.LightningModule):
    """Trains the stated confidence by preferences or by its distribution, starting from a trained adapter.

    Args:
        base: the model below the adapter.
        adapter: folder of the adapter to continue, as stage 1 writes it; None: a new one on the base model.
        lora: settings of the new adapter if `adapter` is None; a given adapter keeps its own. Neither has dropout.
        loss: a preference loss (DPO, SimPO, IPO, Ordinal or Listwise), or a loss of the distribution over confidences
            (SoftLabel, TokenizedBrier or ExpectedBrier) and over answers too (RLCR).
        pairs: which of a query's candidates is chosen and which are rejected.
        teacher: what `pairs.target: fitted` fits.
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
        drift_weight: weight in the loss, at least 0, of keeping what the responses share: of the squared change since the
            reference of the answer's log-likelihood, and of the negative log-likelihood of the ending. At 0, both can collapse.
        scoring: "auto" shares the prefix between candidates if that is exact for the model, "shared" requires it, "plain" does
            not share.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        max_new_tokens: length limit of the answers that are generated, in validation and as own answers. An own answer that it
            cuts off is not rated.
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
        teacher: TeacherSettings = TeacherSettings(),  # noqa: B008  (frozen)
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
        weights = {
            "nll_weight": nll_weight,
            "confidence_weight": confidence_weight,
            "drift_weight": drift_weight,
        }
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise DataError(f"model.{name} must be a finite number of at least 0, found {weight}")
        if reference == "adapter" and adapter is None:
            raise DataError(
                "model.reference: adapter, but model.adapter is not set: set it to the adapter of stage 1, or compare with "
                "the base model (`reference: base`)"
            )
        if isinstance(loss, DistributionLoss) and pairs.rejected != "all":
            raise DataError(
                f"model.loss: {type(loss).__name__} is of the distribution over all candidates, but model.pairs has "
                f"`rejected: {pairs.rejected}`: set it to all"
            )
        if parts is not None and adapter is None:
            raise DataError("model.parts needs a given adapter: set model.lora.parts for a new one")
        if reference == "none" and loss.needs_reference:
            raise DataError(f"model.reference: {type(loss).__name__} needs one, found none")
        if reference == "none" and drift_weight:
            raise DataError("model.drift_weight compares with the reference, but model.reference is none")
        if reference == "none" and pairs.target == "expected":
            raise DataError(
                "model.pairs: `target: expected` needs the reference, but model.reference is none"
            )
        self.base = base
        self.adapter = adapter
        self.lora = lora
        self.loss = loss
        self.pairs = pairs
        self.teacher = teacher
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
        self.skipped = self.cut_off = 0
        self.target = TargetChooser(pairs.target, teacher)
        # Checkpoints hold the trained weights alone; base and reference are loaded again.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        training.check_strategy(self, stage, self.base.quantization)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_data(data)
        if self.device_mesh is not None and not (
            data.candidates.answers == "gold" and self.scoring == "shared"
        ):
            raise DataError(
                "FSDP2 needs the same passes in each process: set data.candidates.answers to gold (experiment/level_dpo) and "
                "model.scoring to shared, or use trainer/ddp"
            )

    def title(self, data: PerturbedQueryDataModule) -> str:
        """What is taught, and on which answers: "stage 2: soft labels on own answers"."""
        taught = "soft labels" if isinstance(self.loss, SoftLabel) else type(self.loss).__name__
        answers = "gold" if data.candidates is None else data.candidates.answers
        return f"stage 2: {taught} on {answers} answers"

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        """Reject data without candidates, or with levels that were measured differently, before the model is loaded."""
        if data.candidates is None:
            raise DataError("data.candidates is not set: preference optimisation needs it")
        if data.candidates.answers == "own":
            if self.reference == "none":
                raise DataError(
                    "data.candidates: `answers: own` are the reference's, but model.reference is none: set it, or use `answers: gold`"
                )
            if self.pairs.target == "fitted" and data.validation is None:
                raise DataError("data.validation is not set: `target: fitted` fits its map on those queries")
        elif self.pairs.target not in OF_GOLD_ANSWERS:
            raise DataError(
                f"model.pairs: `target: {self.pairs.target}` rates the model's own answers: set data.candidates.answers to own"
            )
        check_levels(data.noise.levels, self.base, data)
        if self.adapter is not None:
            differences_from_training({self.adapter: str(find_adapter(self.adapter))}, data)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        model = load_for_training(self.base, training.device_of(self))
        if self.adapter is None:
            adapted = attach_lora(model, replace(self.lora, dropout=0.0))
        else:
            adapted = continue_adapter(model, self.adapter, self.parts, self.reference == "adapter")
        self.model = training.prepare_for_training(self, adapted, self.gradient_checkpointing)

    @cached_property
    def answer_tokenizer(self) -> AnswerTokenizer:
        """Tokenizes own answers with every confidence that can be stated."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert data.candidates is not None
        return AnswerTokenizer(
            data.chat, [data.noise.levels], data.candidates.grid, data.candidates.wrong_answer
        )

    def on_fit_start(self) -> None:
        if self.target.is_ready:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        taught, held_out = (
            {q.answer_type for q in split.queries} for split in (data.sets["train"], data.sets["validation"])
        )
        if missing := sorted(taught - held_out):
            raise DataError(
                f"data.validation has no {' and no '.join(missing)} question, but data.train has: `target: fitted` fits its map "
                "for each answer type on data.validation; add such questions to it"
            )
        self._fit_teacher()

    @torch.no_grad()
    def _fit_teacher(self) -> None:
        """Fit the teacher on the reference's answers to the validation queries: all processes answer their share, and fit the same."""
        rows: list[TaughtAnswer] = []
        for batch in self.trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            if not batch.prompts.queries:
                continue
            with (
                self.trainer.precision_plugin.val_step_context(),  # as in the steps, which use the features
                shared_vision(self.model),
                self.as_reference(),
                eval_mode(self.model),
            ):
                rows += self.target.taught(self._answer(batch.prompts.to(self.device)))
        self.target.fit(rows)
        rank_zero_info(f"teacher: {self.target.fitted!r}")

    def on_train_batch_start(self, batch: CandidateBatch | PromptBatch, batch_idx: int) -> None:
        training.seed_batch(self, batch_idx)

    def training_step(self, batch: CandidateBatch | PromptBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not training.has_samples(self, batch):
            return training.zero_loss(self)
        with shared_vision(self.model):
            prompts, comparison = self.compare(batch)
            policy = self.score(prompts, comparison.compared)  # of K candidates of B queries, [B, K, T]
        comparison, policy = comparison.rated(policy)
        self.cut_off += prompts.n_cut_off
        if not comparison.picks:
            return policy.log_likelihood.sum() * 0.0
        compared, reference, is_correct = comparison.compared, comparison.reference, comparison.is_correct
        scores = candidate_scores(
            policy, reference, compared, comparison.targets, comparison.correct
        )  # [B, K]
        loss = self.loss(scores)
        if self.nll_weight:
            nll = chosen_nll(policy, compared, is_correct, self.answer_weight, self.confidence_weight)
            loss = loss + self.nll_weight * nll
        if self.drift_weight:
            assert reference is not None
            loss = loss + self.drift_weight * shared_text_drift(policy, reference, compared)
        size = len(compared)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        for name, value in self._statistics(scores, policy, comparison).items():
            self.log(f"train/{name}", value, prog_bar=name == "reward_accuracy", batch_size=size)
        self.log("train/skipped", float(self.skipped), batch_size=size)
        self.log("train/cut_off", float(self.cut_off), batch_size=size)
        return loss

    def _statistics(
        self, scores: CandidateScores, policy: ResponseScores, comparison: Comparison
    ) -> dict[str, Tensor]:
        """The statistics that are defined, of the compared candidates and the policy's scores of them."""
        statistics = preference_statistics(self.loss, scores)
        statistics |= answer_statistics(policy, comparison.compared, comparison.is_correct)
        return {name: value for name, value in statistics.items() if not bool(value.isnan())}

    def compare(self, batch: CandidateBatch | PromptBatch) -> tuple[CandidateBatch, Comparison]:
        """The prompts with all their candidates, and what is compared of these. Call it within `shared_vision`."""
        if isinstance(batch, CandidateBatch):
            return batch, self.choose(batch)
        with torch.no_grad(), self.as_reference(), eval_mode(self.model):
            answered = self._answer(batch)
            candidates = own_candidates(answered)
            return candidates, self.choose(candidates, answered)

    def choose(self, batch: CandidateBatch, answered: AnsweredBatch | None = None) -> Comparison:
        """For each query the target, the chosen candidate and the rejected ones, and their scores under the reference if needed.

        Args:
            answered: the reference's own answers, if the candidates give these; the reference is active then.
        """
        of_all = None
        if answered is not None:
            of_all = answered.scored_answers.candidates
        elif self.pairs.target == "expected":
            of_all = self.score_reference(batch, batch.candidates)
        distribution = None if of_all is None else LevelDistribution(of_all.total, batch.candidates)
        targets = self.target(batch, distribution, answered)
        everything = isinstance(self.loss, DistributionLoss)
        picks = choose_candidates(self.pairs, batch, targets, everything=everything)
        comparison = Comparison(batch.candidates, picks, targets, batch.is_correct, None, of_all)
        if not (self.loss.needs_reference or self.drift_weight):
            return comparison
        if of_all is not None:
            return comparison._replace(reference=picked(of_all, picks))
        return comparison._replace(reference=self.score_reference(batch, comparison.compared))

    def _answer(self, batch: PromptBatch) -> AnsweredBatch:
        return own_answers(self.model, batch, self.answer_tokenizer, self.max_new_tokens)

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

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[EstimatedPrediction]]:
        with shared_vision(self.model):
            predictions = answer_batch(
                self.model, batch.prompts, training.tokenizer_of(self), self.max_new_tokens
            )
        self.scorer.update(predictions)
        answers = self.trainer.datamodule.candidates.answers  # type: ignore[attr-defined]
        compared = batch.candidates if answers == "gold" else batch.prompts
        # `vlm-calibration validate` has no fitted teacher, which is fitted when training starts.
        if compared is not None and compared.inputs and self.target.is_ready:
            self._validate_pairs(compared)
        return {"": predictions}

    def _validate_pairs(self, batch: CandidateBatch | PromptBatch) -> None:
        with shared_vision(self.model):
            prompts, comparison = self.compare(batch)
            policy = self.score(prompts, comparison.candidates)
            if comparison.of_all is None and self.reference != "none":
                comparison = comparison._replace(of_all=self.score_reference(prompts, comparison.candidates))
        comparison, policy = comparison.rated(policy)
        if not comparison.picks:
            return
        compared, of_all = comparison.compared, comparison.of_all
        of_compared = picked(policy, comparison.picks)
        scores = candidate_scores(
            of_compared, comparison.reference, compared, comparison.targets, comparison.correct
        )
        statistics = self._statistics(scores, of_compared, comparison)
        if of_all is not None:
            reference = LevelDistribution(of_all.total, comparison.candidates)
            statistics["kl"] = LevelDistribution(policy.total, comparison.candidates).kl_divergence(reference)
        for name, value in statistics.items():
            count = sum(comparison.is_correct) if name == "logp_answer" else len(compared)
            cast(MeanMetric, self.pair_means[name]).update(value, count)

    def on_validation_epoch_end(self) -> None:
        self.results = {"": self.scorer.compute()}
        training.log_results(self, self.results)
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
        training.warn_of_total(self, self.skipped, training.TOO_LONG)
        training.warn_of_total(
            self,
            self.cut_off,
            f"own answers hit model.max_new_tokens, {self.max_new_tokens}, and were not rated",
        )

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(
            training.trained_parameters(self),
            self.optimizer_settings,
            self.trainer.estimated_stepping_batches,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training.keep_trained_weights(self, checkpoint)
        fitted = self.target.fitted
        checkpoint["teacher"] = None if fitted is None else fitted.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training.check_trained_weights(self, checkpoint)
        state = checkpoint.get("teacher")
        self.target.fitted = None if state is None else FittedTeacher.from_state(self.teacher, state)
