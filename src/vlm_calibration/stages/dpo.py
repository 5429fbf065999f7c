"""Stage 2: preference optimisation of the stated confidence, starting from the adapter of stage 1.

For one perturbed image and one answer, the response that states the target confidence is preferred over responses that state
other confidences (CSP, arXiv 2504.14848), or the distribution over the confidences is taught (`losses.distribution`). A training
step: answer the prompts with the reference unless gold answers are compared (`own_answers`), choose target and candidates
(`teachers`, `preference_targets`), score them (`models.shared_prefix`: one pass over image and prompt for all candidates, one pass
of the frozen vision tower for policy and reference), and compare the scores (`losses`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
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
from vlm_calibration.estimators.base import AnsweredBatch, Estimator
from vlm_calibration.losses.candidates import CandidateLoss
from vlm_calibration.losses.distribution import DistributionLoss
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
from vlm_calibration.records import DataError, Prediction, Query
from vlm_calibration.stages.answering import answer_batch, device_of, tokenizer_of
from vlm_calibration.stages.dpo_terms import (
    answer_statistics,
    candidate_scores,
    chosen_nll,
    shared_text_drift,
    which_correct,
)
from vlm_calibration.stages.optimization import OptimizerSettings, adamw_with_schedule
from vlm_calibration.stages.own_answers import eval_mode, own_answers, own_candidates
from vlm_calibration.stages.preference_targets import (
    OF_GOLD_ANSWERS,
    Comparison,
    LevelDistribution,
    PairPolicy,
    choose_all,
    choose_candidates,
    kl_divergence,
    picked,
)
from vlm_calibration.stages.provenance import check_levels, differences_from_training
from vlm_calibration.stages.scoring import Results, Scorer
from vlm_calibration.stages.teachers import (
    FittedTeacher,
    TaughtAnswer,
    TeacherSettings,
    estimators_of,
    features_of,
    gather,
)
from vlm_calibration.stages.training import (
    check_strategy,
    check_trained_weights,
    has_samples,
    keep_trained_weights,
    log_results,
    prepare_for_training,
    seed_batch,
    trained_parameters,
    warn_of_skipped,
    warn_of_total,
    zero_loss,
)

PAIR_STATISTICS = ("reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer", "kl")


class DPOModule(L.LightningModule):
    """Trains the stated confidence by preferences, starting from a trained adapter.

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
        if isinstance(loss, DistributionLoss) and pairs.rejected != "all":
            raise DataError(
                f"model.loss: {type(loss).__name__} is of the distribution over all candidates, but model.pairs has "
                f"`rejected: {pairs.rejected}`: set it to all"
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
        self.fitted: FittedTeacher | None = None
        self.estimators: list[Estimator] = []
        if pairs.target == "fitted":
            self.estimators = estimators_of(teacher.features)
        elif pairs.target not in OF_GOLD_ANSWERS:
            self.estimators = estimators_of([pairs.target])
        # Checkpoints hold the trained weights alone; base and reference are loaded again.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        check_strategy(self, stage, self.base.quantization)
        if self.device_mesh is not None and not (self._gold and self.scoring == "shared"):
            raise DataError(
                "FSDP2 needs the same passes in each process: set data.candidates.answers to gold (experiment/level_dpo) and "
                "model.scoring to shared, or use trainer/ddp"
            )
        self.check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

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
        model = load_for_training(self.base, device_of(self))
        if self.adapter is None:
            adapted = attach_lora(model, replace(self.lora, dropout=0.0))
        else:
            adapted = continue_adapter(model, self.adapter, self.parts, self.reference == "adapter")
        self.model = prepare_for_training(self, adapted, self.gradient_checkpointing)

    @cached_property
    def answer_tokenizer(self) -> AnswerTokenizer:
        """Tokenizes own answers with every confidence that can be stated."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert data.candidates is not None
        return AnswerTokenizer(
            data.chat, [data.noise.levels], data.candidates.grid, data.candidates.wrong_answer
        )

    def on_fit_start(self) -> None:
        if self.pairs.target == "fitted" and self.fitted is None:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            taught, held_out = (
                {q.answer_type for q in split.queries}
                for split in (data.sets["train"], data.sets["validation"])
            )
            if missing := sorted(taught - held_out):
                raise DataError(
                    f"data.validation has no {' and no '.join(missing)} question, but data.train has: `target: fitted` fits its map "
                    "for each answer type on data.validation; add such questions to it"
                )
            self.fitted = self._fit_teacher()

    @torch.no_grad()
    def _fit_teacher(self) -> FittedTeacher:
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
                answered = self._answer(batch.prompts.to(self.device))
                rates = features_of(self.estimators, answered)
            rows += [
                TaughtAnswer(features, p.correct, p.answer_type, query.image)
                for features, p, query in zip(
                    rates, answered.predictions, answered.batch.queries, strict=True
                )
                if features is not None
            ]
        rows = gather(rows)  # before any error is raised, so that no process waits for another
        if not rows:
            raise DataError(
                "`target: fitted`: the reference gives no answer to a validation query that "
                f"{' and '.join(self.teacher.features)} rate, so there is nothing to fit: use `target: expected`, train stage 1 "
                f"longer, or raise model.max_new_tokens, found {self.max_new_tokens}, if it cuts answers off"
            )
        fitted = FittedTeacher.fit(self.teacher, rows)
        rank_zero_info(f"teacher: {fitted!r}")
        return fitted

    def on_train_batch_start(self, batch: CandidateBatch | PromptBatch, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: CandidateBatch | PromptBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not has_samples(self, batch):
            return zero_loss(self)
        with shared_vision(self.model):
            prompts, comparison = self.compare(batch)
            policy = self.score(prompts, comparison.compared)  # of K candidates of B queries, [B, K, T]
        comparison, policy = comparison.rated(policy)
        self.cut_off += prompts.n_cut_off
        if not comparison.picks:
            return policy.log_likelihood.sum() * 0.0
        compared, reference, is_correct = comparison.compared, comparison.reference, comparison.is_correct
        scores = candidate_scores(
            policy, reference, compared, comparison.targets, which_correct(compared, is_correct)
        )  # [B, K]
        loss = self.loss(scores)
        if self.nll_weight:
            loss = loss + self.nll_weight * chosen_nll(
                policy, compared, is_correct, self.answer_weight, self.confidence_weight
            )
        if self.drift_weight:
            assert reference is not None
            loss = loss + self.drift_weight * shared_text_drift(policy, reference, compared)
        size = len(compared)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        statistics = preference_statistics(self.loss, scores)
        for name, value in (statistics | answer_statistics(policy, compared, is_correct)).items():
            if not bool(value.isnan()):
                self.log(f"train/{name}", value, prog_bar=name == "reward_accuracy", batch_size=size)
        self.log("train/skipped", float(self.skipped), batch_size=size)
        self.log("train/cut_off", float(self.cut_off), batch_size=size)
        return loss

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
        elif self.pairs.needs_reference:
            of_all = self.score_reference(batch, batch.candidates)
        distribution = None if of_all is None else LevelDistribution(of_all.total, batch.candidates)
        targets = self._targets(batch, distribution, answered)
        if isinstance(self.loss, DistributionLoss):
            picks = choose_all(batch, targets)
        else:
            picks = choose_candidates(self.pairs, batch, targets, distribution)
        comparison = Comparison(batch.candidates, picks, targets, batch.is_correct, None, of_all)
        if not (self.loss.needs_reference or self.drift_weight):
            return comparison
        if of_all is not None:
            return comparison._replace(reference=picked(of_all, picks))
        return comparison._replace(reference=self.score_reference(batch, comparison.compared))

    def _targets(
        self,
        batch: CandidateBatch,
        distribution: LevelDistribution | None,
        answered: AnsweredBatch | None,
    ) -> tuple[float, ...]:
        """For each query the target confidence in [0, 1]; NaN without an answer, or for one that the teacher does not rate."""
        targets: Sequence[float]
        if self.pairs.target == "level":
            targets = batch.levels
        elif self.pairs.target == "correct":
            targets = [float(correct) for correct in batch.is_correct]
        elif self.pairs.target == "expected":
            assert distribution is not None
            targets = [distribution.expected(row) for row in range(len(batch.queries))]
        else:
            assert answered is not None
            rated = zip(features_of(self.estimators, answered), batch.queries, strict=True)
            targets = [math.nan if f is None else self._teach(f, query) for f, query in rated]
        if answered is None:
            return tuple(targets)
        rows = zip(targets, answered.answers, strict=True)
        return tuple(math.nan if answer is None else target for target, answer in rows)

    def _teach(self, features: tuple[float, ...], query: Query) -> float:
        if self.pairs.target != "fitted":
            return features[0]
        assert self.fitted is not None
        return self.fitted(features, query.answer_type)

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

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        with shared_vision(self.model):
            predictions = answer_batch(self.model, batch.prompts, tokenizer_of(self), self.max_new_tokens)
        self.scorer.update(predictions)
        compared = batch.candidates if self._gold else batch.prompts
        # `vlm-calibration validate` has no fitted teacher, which is fitted when training starts.
        ready = self.pairs.target != "fitted" or self.fitted is not None
        if compared is not None and compared.inputs and ready:
            self._validate_pairs(compared)
        return {"": predictions}

    @property
    def _gold(self) -> bool:
        """Whether gold answers are compared."""
        candidates = self.trainer.datamodule.candidates  # type: ignore[attr-defined]
        return candidates is None or candidates.answers == "gold"

    def _validate_pairs(self, batch: CandidateBatch | PromptBatch) -> None:
        with shared_vision(self.model):
            prompts, comparison = self.compare(batch)
            policy = self.score(prompts, comparison.candidates)
            if comparison.of_all is None and self.reference != "none":
                comparison = comparison._replace(of_all=self.score_reference(prompts, comparison.candidates))
        comparison, policy = comparison.rated(policy)
        if not comparison.picks:
            return
        compared, is_correct, of_all = comparison.compared, comparison.is_correct, comparison.of_all
        of_compared = picked(policy, comparison.picks)
        scores = candidate_scores(
            of_compared,
            comparison.reference,
            compared,
            comparison.targets,
            which_correct(compared, is_correct),
        )
        statistics = preference_statistics(self.loss, scores)
        statistics |= answer_statistics(of_compared, compared, is_correct)
        if of_all is not None:
            statistics["kl"] = kl_divergence(
                LevelDistribution(policy.total, comparison.candidates),
                LevelDistribution(of_all.total, comparison.candidates),
            )
        for name, value in statistics.items():
            if not bool(value.isnan()):
                count = sum(is_correct) if name == "logp_answer" else len(compared)
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
        warn_of_total(
            self,
            self.cut_off,
            f"own answers hit model.max_new_tokens, {self.max_new_tokens}, and were not rated",
        )

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(
            trained_parameters(self), self.optimizer_settings, self.trainer.estimated_stepping_batches
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained_weights(self, checkpoint)
        checkpoint["teacher"] = None if self.fitted is None else self.fitted.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_trained_weights(self, checkpoint)
        state = checkpoint.get("teacher")
        self.fitted = None if state is None else FittedTeacher.from_state(self.teacher, state)


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
