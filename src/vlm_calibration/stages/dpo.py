"""Stage 2: teach the stated confidence with several responses to one image and question, starting from the adapter of stage 1.

A response that states the target confidence is preferred over responses that state others (CSP, arXiv 2504.14848; `losses.preference`),
or the distribution over all confidences is taught (`losses.distribution`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vlm_calibration.data.candidates import CandidateBatch, Candidates, ValidationBatch
from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.teacher import FittedTeacher, TaughtAnswer, TeacherSettings
from vlm_calibration.losses.candidates import CandidateLoss
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
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.stages.dpo_terms import (
    Comparison,
    answer_log_likelihood,
    candidate_scores,
    chosen_nll,
    kl_divergence,
    picked,
    shared_text_drift,
)
from vlm_calibration.stages.preference_targets import (
    PairPolicy,
    TargetChooser,
    choose_candidates,
    own_candidates,
)
from vlm_calibration.stages.provenance import check_levels, differences_from_training
from vlm_calibration.stages.training import OptimizerSettings, TrainingStage, device_of

PAIR_STATISTICS = ("reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer", "kl")


class DPOModule(TrainingStage):
    """Trains the stated confidence by preferences or by its distribution, starting from a trained adapter.

    Args:
        base: the model below the adapter.
        adapter: folder of the adapter to continue, as stage 1 writes it; None: a new one on the base model.
        lora: settings of the new adapter if `adapter` is None; a given adapter keeps its own. Neither has dropout.
        loss: a preference loss (DPO, SimPO, IPO, Ordinal or Listwise), or a loss of the distribution over confidences
            (SoftLabel, TokenizedBrier or ExpectedBrier) and over answers too (RLCR).
        pairs: which of a query's candidates is chosen and which are rejected.
        teacher: what `pairs.target: fitted` fits.
        reference: the frozen reference: the given adapter ("adapter"), the model without it ("base"), or "none" if the loss needs none.
        parts: train only the given adapter's layers in these parts of the model; None: all. A new adapter uses `lora.parts`.
        optimizer: AdamW and its schedule.
        nll_weight: weight in the loss, at least 0, of the chosen responses' negative log-likelihood per token (arXiv 2404.19733).
        confidence_weight: weight of the confidence's tokens in that likelihood, at least 0.
        answer_weight: weight of a correct answer's tokens in it: "constant" is 1, "confidence" the stated confidence. Tokens
            of a wrong answer have weight 0.
        drift_weight: weight in the loss, at least 0, of keeping what the responses share: of the squared change since the
            reference of the answer's log-likelihood, and of the negative log-likelihood of the ending. At 0, both can collapse.
        scoring: "auto" shares the prefix of candidates if that is exact for the model, "shared" requires it, "plain" does not share.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        max_new_tokens: length limit of generated answers, in validation and as own answers, which are not rated if it cuts them off.
    """

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
        super().__init__(base, optimizer, gradient_checkpointing, max_new_tokens)
        without, name = reference == "none", type(loss).__name__
        if reference == "adapter" and adapter is None:
            raise DataError("model.reference: adapter, but model.adapter is not set: set it, or use `base`")
        if isinstance(loss, DistributionLoss) and pairs.rejected != "all":
            raise DataError(f"model.loss: {name} compares all candidates: set model.pairs.rejected to all")
        if parts is not None and adapter is None:
            raise DataError("model.parts needs a given adapter: set model.lora.parts for a new one")
        if without and loss.needs_reference:
            raise DataError(f"model.reference: {name} needs one, found none")
        if without and drift_weight:
            raise DataError("model.drift_weight compares with the reference, but model.reference is none")
        if without and pairs.target == "expected":
            raise DataError("model.pairs: `target: expected` needs the reference, but it is none")
        self.adapter = adapter
        self.lora = lora
        self.loss = loss
        self.pairs = pairs
        self.reference = reference
        self.parts = parts
        self.nll_weight = nll_weight
        self.confidence_weight = confidence_weight
        self.answer_weight = answer_weight
        self.drift_weight = drift_weight
        self.scoring = scoring
        self.check_weights("nll_weight", "confidence_weight", "drift_weight")
        # A metric per name: a process need not have values for each.
        self.pair_means = nn.ModuleDict({name: MeanMetric(nan_strategy="ignore") for name in PAIR_STATISTICS})
        self.cut_off = 0
        self.target = TargetChooser(pairs.target, teacher)

    def title(self, data: PerturbedQueryDataModule) -> str:
        taught = "soft labels" if isinstance(self.loss, SoftLabel) else type(self.loss).__name__
        answers = "gold" if data.candidates is None else data.candidates.answers
        return f"stage 2: {taught} on {answers} answers"

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        if data.candidates is None:
            raise DataError("data.candidates is not set: preference optimisation needs it")
        own = data.candidates.answers == "own"
        if self.device_mesh is not None and (own or self.scoring != "shared"):
            raise DataError(
                "FSDP2 needs equal passes: set data.candidates.answers to gold and model.scoring to shared, or use trainer/ddp"
            )
        opposite = isinstance(self.loss, SoftLabel) and self.loss.opposite_weight
        if opposite and not (own and data.candidates.wrong_answer):
            raise DataError(
                "model.loss.opposite_weight needs data.candidates.answers: own and data.candidates.wrong_answer: true"
            )
        if own:
            if self.reference == "none":
                raise DataError(
                    "data.candidates: `answers: own` are the reference's, but model.reference is none: set it, or use `answers: gold`"
                )
            others = {type(data.train), type(data.validation)}
            if data.teacher is not None and type(data.teacher) not in others:
                # `configs/dpo.yaml` asks about the demo's scenes, and a configuration of other data may not have replaced them.
                raise DataError(
                    f"data.teacher is a {type(data.teacher).__name__}, unlike data.train and data.validation: "
                    "give it queries like those, or set it to null for those of data.validation"
                )
            if self.pairs.target == "fitted" and data.taught_on not in data.splits:
                raise DataError(
                    "data.teacher is not set, nor data.validation: `target: fitted` fits its map on those queries"
                )
        elif self.target.estimators:
            raise DataError(
                f"model.pairs: `target: {self.pairs.target}` rates the model's own answers: set data.candidates.answers to own"
            )
        check_levels(data.noise.levels, self.base, data)
        if self.adapter is not None:
            differences_from_training({self.adapter: str(find_adapter(self.adapter))}, data)

    def load_adapted(self) -> Any:
        model = load_for_training(self.base, device_of(self))
        if self.adapter is None:
            return attach_lora(model, replace(self.lora, dropout=0.0))
        return continue_adapter(model, self.adapter, self.parts, self.reference == "adapter")

    @cached_property
    def answer_tokenizer(self) -> AnswerTokenizer:
        """Tokenizes own answers with every confidence that can be stated."""
        data, candidates = self.data, self.data.candidates
        assert candidates is not None
        return AnswerTokenizer(data.chat, data.noise.levels, candidates.grid, candidates.wrong_answer)

    def on_fit_start(self) -> None:
        """Fit the teacher on the reference's answers to `data.teacher`: all processes answer their share, and fit the same."""
        if self.target.is_ready:
            return
        types = {name: {q.answer_type for q in s.queries} for name, s in self.data.sets.items()}
        if missing := sorted(types["train"] - types[self.data.taught_on]):
            raise DataError(
                f"data.{self.data.taught_on} has no {' and no '.join(missing)} question, but data.train has: `target: fitted` needs such questions"
            )
        rows: list[TaughtAnswer] = []
        for batch in self.data.teacher_dataloader():
            if not batch.queries:
                continue
            with (
                self.trainer.precision_plugin.val_step_context(),  # as in the steps, which use the features
                shared_vision(self.model),
                self.as_reference(),
            ):
                rows += self.target.taught(self._answer(batch.to(self.device)))
        self.target.fit(rows)
        rank_zero_info(f"teacher: {self.target.fitted!r}")

    def training_step(self, batch: CandidateBatch | PromptBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not self.has_samples(batch):
            return self.zero_loss()
        with shared_vision(self.model):
            prompts, comparison = self.compare(batch)
            policy = self.score(prompts, comparison.compared)  # of K candidates of B queries, [B, K, T]
        comparison, policy = comparison.rated(policy)
        self.cut_off += prompts.n_cut_off
        if not comparison.picks:
            return policy.log_likelihood.sum() * 0.0
        scores = candidate_scores(policy, comparison)  # [B, K]
        loss = self.loss(scores)
        if self.nll_weight:
            nll = chosen_nll(policy, comparison, self.answer_weight, self.confidence_weight)
            loss = loss + self.nll_weight * nll
        if self.drift_weight:
            loss = loss + self.drift_weight * shared_text_drift(policy, comparison)
        size = len(comparison.picks)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        statistics = preference_statistics(self.loss, scores)
        statistics["logp_answer"] = answer_log_likelihood(policy, comparison)
        for name, value in statistics.items():
            if not bool(value.isnan()):
                self.log(f"train/{name}", value, prog_bar=name == "reward_accuracy", batch_size=size)
        self.log("train/skipped", float(self.skipped), batch_size=size)
        self.log("train/cut_off", float(self.cut_off), batch_size=size)
        return loss

    def compare(self, batch: CandidateBatch | PromptBatch) -> tuple[CandidateBatch, Comparison]:
        """The prompts with all their candidates, and what is compared of these. Call it within `shared_vision`."""
        answered = of_all = None
        needs_reference = self.loss.needs_reference or bool(self.drift_weight)
        is_used = needs_reference or isinstance(batch, PromptBatch) or self.pairs.target == "expected"
        with self.as_reference() if is_used else nullcontext():
            if isinstance(batch, PromptBatch):
                answered = self._answer(batch)
                batch, of_all = own_candidates(answered), answered.scored_answers.candidates
            elif self.pairs.target == "expected":
                of_all = self.score(batch, batch.candidates)
            targets = self.target(batch, of_all, answered)
            everything = isinstance(self.loss, DistributionLoss)
            picks = choose_candidates(self.pairs, batch, targets, everything=everything)
            comparison = Comparison(batch.candidates, picks, targets, batch.is_correct, of_all=of_all)
            if needs_reference:
                scores = picked(of_all, picks) if of_all else self.score(batch, comparison.compared)
                comparison = comparison._replace(reference=scores)
        return batch, comparison

    def _answer(self, batch: PromptBatch) -> AnsweredBatch:
        """The greedy, graded answers of the active adapter, which is the reference; one that the length limit cuts off is empty."""
        answered = AnsweredBatch.generate(self.model, batch, self.answer_tokenizer, self.max_new_tokens)
        # With an end that the model did not give it, it would be another answer.
        rated = [
            answer if complete else replace(answer, text="", predicted=None, confidence=None, correct=False)
            for answer, complete in zip(answered.predictions, answered.complete, strict=True)
        ]
        return replace(answered, predictions=rated)

    def score(self, batch: CandidateBatch, candidates: Candidates) -> ResponseScores:
        """Log-likelihoods of candidates under the active adapter."""
        tokens = [[c.tokens for c in row] for row in candidates]
        return score_responses(self.model, Prompts(batch.inputs, batch.lengths), tokens, self.scoring)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Turn the model into the reference, without gradients and in eval mode, where gradient checkpointing keeps the prompts' cache."""
        training = self.model.training
        adapter = REFERENCE if self.reference == "adapter" else None
        self.model.eval()
        try:
            with torch.no_grad(), using_adapter(self.model, adapter):
                yield
        finally:
            self.model.train(training)

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        assert self.data.candidates is not None
        compared = batch.candidates if self.data.candidates.answers == "gold" else batch.prompts
        with shared_vision(self.model):
            predictions = super().validation_step(batch, batch_idx)
            # `vlm-calibration validate` has no fitted teacher, which is fitted when training starts.
            if compared is not None and compared.inputs and self.target.is_ready:
                self._validate_pairs(compared)
        return predictions

    def _validate_pairs(self, batch: CandidateBatch | PromptBatch) -> None:
        prompts, comparison = self.compare(batch)
        policy = self.score(prompts, comparison.candidates)
        if comparison.of_all is None and self.reference != "none":
            with self.as_reference():
                comparison = comparison._replace(of_all=self.score(prompts, comparison.candidates))
        comparison, policy = comparison.rated(policy)
        if not comparison.picks:
            return
        compared = picked(policy, comparison.picks)
        statistics = preference_statistics(self.loss, candidate_scores(compared, comparison))
        statistics["logp_answer"] = answer_log_likelihood(compared, comparison)
        if comparison.of_all is not None:
            statistics["kl"] = kl_divergence(policy.total, comparison.of_all.total, comparison.candidates)
        for name, value in statistics.items():
            count = sum(comparison.is_correct) if name == "logp_answer" else len(comparison.picks)
            cast(MeanMetric, self.pair_means[name]).update(value, count)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        for name, mean in self.pair_means.items():
            # Without values, as of the KL divergence without a reference, the mean is not defined.
            cast(MeanMetric, mean).update(math.nan)
            value = cast(MeanMetric, mean).compute()
            if not bool(value.isnan()):
                self.log(f"val/{name}", value, rank_zero_only=True)

    def on_train_end(self) -> None:
        super().on_train_end()
        says = f"own answers hit model.max_new_tokens, {self.max_new_tokens}, and were not rated"
        self.warn_of_total(self.cut_off, says)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher"] = self.target.fitted and asdict(self.target.fitted)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["teacher"]
        self.target.fitted = state and FittedTeacher.from_state(self.target.settings, state)
