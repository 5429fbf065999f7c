"""Stage 2: preference optimisation of the stated confidence, from the adapter that stage 1 trained.

For one noised image and one answer, the response that states the target confidence is preferred over those that state
others (CSP, arXiv 2504.14848). All candidates of a query share one pass over image and prompt, and policy and reference share
the frozen vision tower.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.pairs import (
    Candidate,
    IsotonicMap,
    PairBatch,
    PairPolicy,
    ValidationBatch,
    choose,
    nearest,
)
from vlm_calibration.losses.preference import (
    DPO,
    CandidateScores,
    PreferenceLoss,
    preference_statistics,
)
from vlm_calibration.losses.sequence import AnswerWeight, response_nll, token_weights
from vlm_calibration.models.adapters import (
    REFERENCE,
    LoraSettings,
    ModelPart,
    attach_lora,
    continue_adapter,
    using_adapter,
)
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.shared_prefix import Prompts, ResponseScores, Scoring, score_responses
from vlm_calibration.models.vision import shared_vision
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.stages.answering import answer_batch, tokenizer_of
from vlm_calibration.stages.device import device_of, ready_to_train
from vlm_calibration.stages.drift import logp_drift
from vlm_calibration.stages.level_distribution import LevelDistribution, divergence
from vlm_calibration.stages.optimization import OptimizerSettings
from vlm_calibration.stages.provenance import check_levels
from vlm_calibration.stages.recalibration import fit_recalibration
from vlm_calibration.stages.scoring import Results, Scorer
from vlm_calibration.stages.training import (
    check_trained,
    keep_trained,
    log_results,
    no_loss,
    optimizers_of,
    seed_batch,
    warn_of_skipped,
)

Chosen = tuple[tuple[Candidate, ...], ...]
PAIR_STATISTICS = ("reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer", "kl")


class DPOModule(L.LightningModule):
    """Trains the stated confidence by preferences, starting from a trained adapter.

    Args:
        base: the model below the adapter.
        adapter: folder of the adapter to go on from, as stage 1 writes it; None: a new one on the base model.
        lora: the new adapter, where `adapter` is None. One that is given keeps its own settings.
        loss: the preference loss: DPO, SimPO, IPO, Hinge, Ordinal or Listwise.
        reference: what the loss compares with, frozen: the adapter as it was ("adapter"), the model without it ("base"), or
            nothing ("none", for losses that take no reference).
        parts: train only the given adapter's layers in these parts of the model; None: all of them. A new adapter has
            `lora.parts`.
        optimizer: AdamW and its schedule.
        nll_weight: weight of the chosen responses' negative log-likelihood per token beside the loss, at least 0
            (arXiv 2404.19733).
        confidence_weight, answer_weight: weights of the tokens within it, as in stage 1; those of a wrong answer have none.
        drift_weight: weight of the anchor beside the loss, at least 0: of the squared change since the reference of how
            likely is what responses share, the answer and the ending. Without it both can fall apart.
        scoring: "auto" shares the prefix between candidates where that is exact, "shared" insists on it, "plain" does not.
        gradient_checkpointing: recompute activations in the backward pass.
        max_new_tokens: length limit of the answers generated in validation.
    """

    model: Any
    results: Results

    def __init__(
        self,
        base: BaseModel,
        adapter: str | None = None,
        lora: LoraSettings = LoraSettings(),  # noqa: B008  (frozen)
        loss: PreferenceLoss = DPO(),  # noqa: B008  (frozen)
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
                "model.reference: adapter, but model.adapter is not set: give the adapter of stage 1, or "
                "compare with the base model (`reference: base`)"
            )
        if parts is not None and adapter is None:
            raise DataError("model.parts is for an adapter that is given: set model.lora.parts of a new one")
        if reference == "none" and loss.needs_reference:
            raise DataError(f"model.reference: {type(loss).__name__} needs one, found none")
        if reference == "none" and drift_weight:
            raise DataError("model.drift_weight compares with the reference, but model.reference is none")
        self.base = base
        self.adapter = adapter
        self.lora = lora
        self.loss = loss
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
        # Means over all processes, which need not have seen values of the same names.
        self.pair_means = nn.ModuleDict({name: MeanMetric() for name in PAIR_STATISTICS})
        self.skipped = 0
        self.recalibration: IsotonicMap | None = None
        # Checkpoints hold what is trained; base and reference come from where they came from.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        self.check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        """Refuse data whose levels were measured for something else, before a model is loaded."""
        check_levels(data.noise.levels, self.base, data)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        model = load_for_training(self.base, device_of(self))
        if self.adapter is None:
            adapted = attach_lora(model, self.lora)
        else:
            adapted = continue_adapter(model, self.adapter, self.parts, self.reference == "adapter")
        self.model = ready_to_train(self, adapted, self.gradient_checkpointing)

    @property
    def policy(self) -> PairPolicy:
        """Which responses are compared, as the data says."""
        pairs = self.trainer.datamodule.pairs  # type: ignore[attr-defined]
        if pairs is None:
            raise DataError("data.pairs is not set: preference optimisation needs it")
        if pairs.needs_reference and self.reference == "none":
            raise DataError(
                f"data.pairs: `target: {pairs.target}` and `on_policy` ask the reference, but model.reference is none"
            )
        return pairs

    def on_fit_start(self) -> None:
        if self.policy.target == "recalibrated" and self.recalibration is None:
            self.recalibration = fit_recalibration(self)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not batch.inputs:
            return no_loss(self)
        with shared_vision(self.model):
            chosen, reference = self.compared(batch)
            found = self.score(batch, chosen)
        scores = candidate_scores(found, reference, chosen)
        loss = self.loss(scores)
        if self.nll_weight:
            nll = chosen_nll(found, chosen, batch, self.answer_weight, self.confidence_weight)
            loss = loss + self.nll_weight * nll
        if self.drift_weight:
            assert reference is not None
            loss = loss + self.drift_weight * logp_drift(found, reference, chosen)
        self._log(loss, scores, found, chosen, batch)
        return loss

    def _log(
        self, loss: Tensor, scores: CandidateScores, found: ResponseScores, chosen: Chosen, batch: PairBatch
    ) -> None:
        size = len(batch.queries)
        values = {**preference_statistics(self.loss, scores), **answer_statistics(found, chosen, batch)}
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        for name, value in values.items():
            if not bool(value.isnan()):
                self.log(f"train/{name}", value, prog_bar=name == "reward_accuracy", batch_size=size)
        self.log("train/skipped", float(self.skipped), batch_size=size)

    def score(self, batch: PairBatch, candidates: Chosen) -> ResponseScores:
        """Log-likelihoods under the model as it is now."""
        tokens = [[c.tokens for c in row] for row in candidates]
        return score_responses(self.model, Prompts(batch.inputs, batch.lengths), tokens, self.scoring)

    @torch.no_grad()
    def score_reference(self, batch: PairBatch, candidates: Chosen) -> ResponseScores:
        """Log-likelihoods under the reference."""
        with self.as_reference():
            return self.score(batch, candidates)

    def as_reference(self) -> AbstractContextManager[None]:
        """A context in which the model is the reference."""
        return using_adapter(self.model, REFERENCE if self.reference == "adapter" else None)

    def compared(self, batch: PairBatch) -> tuple[Chosen, ResponseScores | None]:
        """For each query the chosen candidate and behind it the rejected ones, and how likely the reference holds them."""
        policy = self.policy
        needed = self.loss.needs_reference or self.drift_weight > 0
        if not policy.needs_reference:
            picks = [
                choose(policy, row, nearest([c.confidence for c in row], level), query, epoch)
                for row, level, query, epoch in zip(
                    batch.candidates, batch.levels, batch.queries, batch.epochs, strict=True
                )
            ]
            chosen = _picked(batch, picks)
            return chosen, self.score_reference(batch, chosen) if needed else None
        found = self.score_reference(batch, batch.candidates)
        belief = LevelDistribution(found.total, batch.candidates)
        picks = [self._pick(policy, batch, belief, row) for row in range(len(batch.queries))]
        width = max(map(len, picks))
        index = torch.tensor([[*p, *[p[0]] * (width - len(p))] for p in picks], device=belief.total.device)
        rows = torch.arange(len(picks), device=index.device)[:, None]
        reference = ResponseScores(*(values[rows, index] for values in found)) if needed else None
        return _picked(batch, picks), reference

    def _pick(self, policy: PairPolicy, batch: PairBatch, belief: LevelDistribution, row: int) -> list[int]:
        levels = [c.confidence for c in batch.candidates[row] if not c.wrong]
        wanted, query = batch.levels[row], batch.queries[row]
        if policy.target != "level":
            wanted = belief.expected(row)
        if policy.target == "recalibrated":
            assert self.recalibration is not None
            wanted = self.recalibration(wanted, query.answer_type)
        own = belief.own(row)
        return choose(policy, batch.candidates[row], nearest(levels, wanted), query, batch.epochs[row], own)

    def on_validation_start(self) -> None:
        self.scorer.reset()
        for mean in self.pair_means.values():
            cast(MeanMetric, mean).reset()

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        with shared_vision(self.model):
            predictions = answer_batch(self.model, batch.prompts, tokenizer_of(self), self.max_new_tokens)
        self.scorer.update(predictions)
        # The map of `recalibrated` is fitted when training starts: `vlm-calibration validate` has none.
        ready = self.policy.target != "recalibrated" or self.recalibration is not None
        if batch.pairs is not None and batch.pairs.inputs and ready:
            self._validate_pairs(batch.pairs)
        return {"": predictions}

    def _validate_pairs(self, batch: PairBatch) -> None:
        with shared_vision(self.model):
            chosen, reference = self.compared(batch)
            found = self.score(batch, chosen)
            believed = LevelDistribution(self.score(batch, batch.candidates).total, batch.candidates)
            before = None
            if self.reference != "none":
                before = LevelDistribution(
                    self.score_reference(batch, batch.candidates).total, batch.candidates
                )
        scores = candidate_scores(found, reference, chosen)
        values = {**preference_statistics(self.loss, scores), **answer_statistics(found, chosen, batch)}
        if before is not None:
            values["kl"] = divergence(believed, before)
        for name, value in values.items():
            if not bool(value.isnan()):
                counted = sum(batch.is_correct) if name == "logp_answer" else len(batch.queries)
                cast(MeanMetric, self.pair_means[name]).update(value, counted)

    def on_validation_epoch_end(self) -> None:
        self.results = {"": self.scorer.compute()}
        log_results(self, self.results)
        with warnings.catch_warnings():
            # Expected: there is no divergence without a reference. What has no value is not logged.
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
        return optimizers_of(self, self.optimizer_settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(self, checkpoint)
        checkpoint["recalibration"] = None if self.recalibration is None else dict(self.recalibration.knots)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_trained(self, checkpoint)
        knots = checkpoint.get("recalibration")
        self.recalibration = None if knots is None else IsotonicMap(knots)


def _picked(batch: PairBatch, picks: list[list[int]]) -> Chosen:
    return tuple(tuple(row[i] for i in pick) for row, pick in zip(batch.candidates, picks, strict=True))


def candidate_scores(
    found: ResponseScores, reference: ResponseScores | None, chosen: Chosen
) -> CandidateScores:
    """What the losses take, of candidates of which each query's first is the chosen one."""
    width = found.total.shape[1]
    distance = [
        [1.0 if c.wrong else abs(c.confidence - row[0].confidence) for c in row] + [0.0] * (width - len(row))
        for row in chosen
    ]
    before = None if reference is None else reference.total
    return CandidateScores(
        found.total, before, found.lengths, found.total.new_tensor(distance), found.lengths > 0
    )


def chosen_nll(
    found: ResponseScores,
    chosen: Chosen,
    batch: PairBatch,
    answer_weight: AnswerWeight = "confidence",
    confidence_weight: float = 1.0,
) -> Tensor:
    """Negative log-likelihood per token of the chosen responses, weighed as by `token_weights`, a mean over queries.

    What follows the answer counts as the confidence.
    """
    log_likelihood, tokens = found.log_likelihood[:, 0], found.tokens[:, 0]
    firsts = [first for first, *_ in chosen]
    lengths = torch.tensor([first.answer_length for first in firsts], device=tokens.device)
    confidence = log_likelihood.new_tensor([first.confidence for first in firsts])
    weights = token_weights(
        torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None],
        confidence[:, None],
        torch.tensor(batch.is_correct, device=tokens.device)[:, None],
        answer_weight,
        confidence_weight,
    )
    rows, _ = tokens.nonzero(as_tuple=True)
    return response_nll(log_likelihood[tokens], rows, weights[tokens], len(chosen))


@torch.no_grad()
def answer_statistics(found: ResponseScores, chosen: Chosen, batch: PairBatch) -> dict[str, Tensor]:
    """logp_answer: log-likelihood of the gold answer's tokens, a mean over queries; nan if no response gives it.

    It falls when a model collapses: margins grow, and all responses become unlikely.
    """
    values = [
        found.log_likelihood[row, 0, : candidates[0].answer_length].sum()
        for row, candidates in enumerate(chosen)
        if batch.is_correct[row]
    ]
    mean = torch.stack(values).mean() if values else found.log_likelihood.new_tensor(math.nan)
    return {"logp_answer": mean}
