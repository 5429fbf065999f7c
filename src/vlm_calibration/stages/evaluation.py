"""Evaluates the base model, any number of adapters, and models behind an address, on the same noised images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any, TypedDict, cast

import lightning as L
from torch import nn

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.module import TESTED, DataNeeds, PerturbedQueryDataModule
from vlm_calibration.data.noise import ImageCopy
from vlm_calibration.endpoint.client import Endpoint
from vlm_calibration.endpoint.system import EndpointSystem
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import PROBES, Estimator, LocalSystem, System
from vlm_calibration.estimators.predictions import EXPECTED
from vlm_calibration.estimators.probes import COPIES, Probe, check_probes
from vlm_calibration.estimators.verbal import VerbalizedConfidence, rounded
from vlm_calibration.models.adapters import load_adapters
from vlm_calibration.models.base import BaseModel, base_of_adapters, find_adapter
from vlm_calibration.models.forward import shared_vision
from vlm_calibration.models.loading import load_base
from vlm_calibration.perturbation.levels import AnchoredLevels, Perturbation
from vlm_calibration.records import VERBALIZED, DataError, Prediction, category_groups
from vlm_calibration.stages.provenance import check_levels, differences_from_training
from vlm_calibration.stages.scoring import Results, Scorer
from vlm_calibration.stages.training import device_of, refuse_sharding


class BatchAnswers(TypedDict):
    """The answers to a batch of B queries, which `test_step` returns.

    Attributes:
        answers: system -> B answers.
        passes: system -> estimator, or `PROBES` -> the forward passes of each of B queries; empty without estimators and probes.
    """

    answers: Mapping[str, Sequence[Prediction]]
    passes: Mapping[str, Mapping[str, Sequence[int]]]


BASE = "base"
ORACLE = "oracle"
SCORED = TESTED[0]


class EvaluationModule(L.LightningModule):
    """Evaluates *systems* on the same images: the base model, adapters on it, models behind an address, and the level oracle.

    The base model and its adapters share one copy of the weights; without them no model is loaded.

    Args:
        base: the base model; None: the base model that the adapters name, with the dtype and quantisation of their training. Endpoints
            alone need none, except for the size at which images are perturbed.
        adapters: name -> a run directory, the folder of a peft adapter, or its name on the Hub.
        with_base: evaluate the base model too, as the system "base".
        endpoints: name -> a model behind an OpenAI-compatible address.
        oracle_levels: file written by `vlm-calibration levels fit`. Adds the system "oracle": the base model's answers with its
            measured accuracy at the true kind and strength of perturbation, which models are not given, as their confidence; no
            other loss of evidence counts.
        max_new_tokens: length limit of an answer.
        estimators: further estimators of the confidence in the models' answers. Each adds a key to `predictions.jsonl`, and
            to `metrics.json` the calibration metrics as `METRIC@ESTIMATOR` and its cost as `forward_passes@ESTIMATOR`.
            With both of the teacher's features and `data.calibration`, `METRIC@teacher` is what a teacher fitted on the latter makes of them.
        probes: what is changed before the confidence in an answer is read again, to see what it listens to: "image", "object" and
            "distractor" blank the image, the key object or another object, and "answer" gives the likeliest other answer. Each adds
            a forward pass for each query of `data.test`; `metrics.json` has its effect as `probe_NAME_change` (`estimators.probes`).
    """

    model: Any
    results: Results
    run_digest: str | None = None
    """Of the record of this run, whose answers it resumes from; None: it does not resume."""

    def __init__(
        self,
        base: BaseModel | None = None,
        adapters: dict[str, str] | None = None,
        with_base: bool = True,
        oracle_levels: str | None = None,
        max_new_tokens: int = 64,
        estimators: list[Estimator] | None = None,
        probes: list[Probe] | None = None,
        endpoints: dict[str, Endpoint] | None = None,
    ) -> None:
        super().__init__()
        adapters, endpoints = adapters or {}, endpoints or {}
        taken = {BASE, ORACLE}
        for setting, name in [*product(["adapters"], adapters), *product(["endpoints"], endpoints)]:
            # The name becomes a folder, and a key in peft's modules.
            if name in taken or not re.fullmatch(r"[\w-]+", name):
                reason = "is taken" if name in taken else "must be of letters, digits, '_' and '-'"
                raise DataError(f"model.{setting}: the name {name!r} {reason}")
            taken.add(name)
        if oracle_levels is not None and not with_base:
            raise DataError("model.oracle_levels needs the base model's answers: set model.with_base")
        if not adapters and not endpoints and not with_base:
            raise DataError("nothing to evaluate: set model.adapters, model.endpoints or model.with_base")
        self.adapters = {name: str(find_adapter(adapter)) for name, adapter in adapters.items()}
        self.local: list[str] = [*([BASE] if with_base else []), *self.adapters]
        self.base = base or (base_of_adapters(self.adapters) if self.local else None)
        self.oracle = AnchoredLevels(oracle_levels) if oracle_levels is not None else None
        self.max_new_tokens = max_new_tokens
        self.probes = check_probes(probes or ())
        rates = bool(estimators or self.probes)
        self.estimators: list[Estimator] = [VerbalizedConfidence(), *(estimators or ())] if rates else []
        names = [estimator.name for estimator in self.estimators]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"model.estimators: {twice[0]!r} appears twice")
        self.endpoints = {
            name: EndpointSystem(name, endpoint, self.estimators, max_new_tokens)
            for name, endpoint in endpoints.items()
        }
        self.systems = [*self.local, *self.endpoints, *([ORACLE] if self.oracle else [])]
        further = [name for name in names if name != VERBALIZED]
        self.scorer_of = {
            name: Scorer((), [] if name == ORACLE else further, self.probes if name in self.local else ())
            for name in self.systems
        }
        self.scorers = nn.ModuleList(self.scorer_of.values())
        self.results = {}
        self.differences: Mapping[str, str] = {}
        # System -> how many of its stated confidences are among the scored ones (True), and how many are not.
        self._stated: dict[str, Counter[bool]] = {name: Counter() for name in self.systems if name != ORACLE}

    def setup(self, stage: str) -> None:
        refuse_sharding(self)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_data(data)
        for endpoint in self.endpoints.values():
            endpoint.prompt = data.prompt

    def teardown(self, stage: str) -> None:
        for endpoint in self.endpoints.values():
            endpoint.close()

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        """Check, before a model is loaded, that the oracle's levels were measured for such data; warn of other prompts or image sizes."""
        if self.oracle is not None:
            assert self.base is not None
            if self.oracle.table.ranked:
                raise DataError(
                    f"model.oracle_levels: {self.oracle.source} ranks given answers and does not say how often an answer is correct: "
                    "measure levels without data.grading.rank_levels"
                )
            check_levels(self.oracle, self.base, data)
            for setting, split in data.settings.items():
                if setting.partition(".")[0] not in TESTED or split.noise == "none":
                    continue
                try:
                    for perturbation in split.policy(data.noise).perturbations:
                        self.oracle.accuracy(perturbation, self.oracle.answer_types[0])
                except ValueError as error:
                    raise DataError(f"model.oracle_levels, for data.{setting}: {error}") from error
        base = {BASE: self.base.name_or_path} if self.base is not None and BASE in self.local else {}
        self.differences = differences_from_training({**base, **self.adapters}, data)

    def configure_model(self) -> None:
        if self.local and not hasattr(self, "model"):
            assert self.base is not None
            # Frozen parts can be shared between systems.
            model = load_adapters(load_base(self.base, device_of(self)), self.adapters)
            self.model = model.requires_grad_(False).eval()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise DataError("--ckpt_path: an evaluation reads adapters: give model.init_args.adapters")

    @property
    def data_needs(self) -> DataNeeds:
        copies: dict[str, list[ImageCopy]] = {}
        for name in TESTED if self.local else ():
            copies[name] = [copy for e in self.estimators for copy in e.copies]
            # No score includes the calibration set, so it is not probed.
            copies[name] += [COPIES[p] for p in self.probes if p in COPIES] if name == SCORED else []
        return DataNeeds(copies=copies, images=bool(self.endpoints))

    def on_test_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for kind in {query.answer_type for queries in data.tested_queries.values() for query in queries}:
            if self.oracle and kind not in self.oracle.answer_types:
                raise DataError(f"model.oracle_levels: no levels were measured for answer type {kind!r}")
        # What answers, in the order of `systems`.
        self.answering: dict[str, System] = {}
        if self.local:
            settings = (AnswerTokenizer(data.chat), self.max_new_tokens, self.estimators)
            for name in self.local:
                self.answering[name] = LocalSystem(self.model, None if name == BASE else name, *settings)
        self.answering |= self.endpoints
        groups = {g for query in data.sets["test"].queries for g in category_groups(query.category)}
        for scorer in self.scorer_of.values():
            scorer.set_groups(groups)
            scorer.to(self.device)

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> BatchAnswers:
        answers: dict[str, list[Prediction]] = {system: [] for system in self.systems}
        is_scored = TESTED[dataloader_idx] == SCORED
        passes: dict[str, dict[str, list[int]]] = {}
        if batch.queries:
            with shared_vision(self.model) if self.local else nullcontext():
                for name, system in self.answering.items():
                    probes = self.probes if is_scored and name in self.local else ()
                    predictions, passes[name], _ = system.answer(batch, probes)
                    answers[name] = [*map(_rounded, predictions)]
            if self.oracle:
                answers[ORACLE] = [self._oracle(p) for p in answers[BASE]]
        if self.probes or EXPECTED in (e.name for e in self.estimators):
            self._check_scored(answers)
        output = BatchAnswers(answers=answers, passes=passes)
        if batch.queries and is_scored:
            self.count(output)
        return output

    def _check_scored(self, answers: Mapping[str, Sequence[Prediction]]) -> None:
        """Refuse a system of whose confidences 10 or more, and most, are not whole percents, which alone are scored after its answers."""
        for system, counts in self._stated.items():
            stated = [p.confidence for p in answers[system] if p.confidence is not None]
            unscored = [c for c in stated if round(100 * c, 6) % 1]
            counts.update({True: len(stated) - len(unscored), False: len(unscored)})
            if unscored and counts[False] >= 10 and counts[False] > counts[True]:
                raise DataError(
                    f"model.estimators: {counts[False]} of the first {counts.total()} confidences that {system!r} states are not whole "
                    f"percents, such as {100 * unscored[0]:g}%, but only those are scored: ask for them in data.prompt, or leave out "
                    "ExpectedConfidence and model.probes"
                )

    def count(self, batch: BatchAnswers) -> None:
        """Count a batch in the results, whether this run or an earlier one answered it."""
        for system, scorer in self.scorer_of.items():
            scorer.update(batch["answers"][system], batch["passes"].get(system))

    @property
    def notes(self) -> dict[str, dict[str, str]]:
        """System -> what of its results cannot be had, with the reason, and how this run differs from its training."""
        no_probes = {PROBES: "an endpoint does not score a given answer"} if self.probes else {}
        notes = {system: {**endpoint.notes, **no_probes} for system, endpoint in self.endpoints.items()}
        return notes | {system: {"not as trained": text} for system, text in self.differences.items()}

    def _oracle(self, prediction: Prediction) -> Prediction:
        lost = Perturbation(cast(str, prediction.perturbation), cast(float, prediction.strength))
        accuracy = cast(AnchoredLevels, self.oracle).accuracy(lost, prediction.answer_type)
        return replace(prediction, confidence=accuracy, estimates={}, probes={})

    def on_test_epoch_end(self) -> None:
        self.results = {system: scorer.compute() for system, scorer in self.scorer_of.items()}
        for system, values in self.results.items():
            overall = {f"test/{system}/{k}": v for k, v in values.items() if "/" not in k}
            self.log_dict(overall, rank_zero_only=True)


def _rounded(p: Prediction) -> Prediction:
    """With as many digits of estimates and probes as do not depend on the batch size."""
    estimates, probes = ({n: rounded(c) for n, c in values.items()} for values in (p.estimates, p.probes))
    return replace(p, estimates=estimates, probes=probes)
