"""A step of stage 2 on own or gold answers, and the same by hand: each query alone, each response in a forward of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_calibration.data.candidates import Candidate
from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import Sample
from vlm_calibration.estimators import base
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.losses.candidates import CandidateLoss
from vlm_calibration.losses.distribution import RLCR, SoftLabel
from vlm_calibration.losses.preference import DPO
from vlm_calibration.models.adapters import using_adapter
from vlm_calibration.models.forward import shared_vision
from vlm_calibration.models.generation import generate
from vlm_calibration.records import Query
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.dpo_terms import Comparison
from vlm_calibration.stages.training import trained_parameters
from vlm_calibration.text.confidence import (
    end_of_confidence,
    render_answer,
    render_response,
    strip_confidence,
)
from vlm_calibration.text.grading import grade

from ..estimators.naive import Alone

MAPS = {"yes_no": ((0.7, 0.4), -0.3), "short": ((-0.2, 0.9), 0.6)}
"""Of a teacher that a step has if its target is fitted."""


class Stated(NamedTuple):
    """One response: an answer with a confidence.

    Attributes:
        confidence: the stated one.
        own: whether it gives the reference's answer.
        correct: whether its answer is correct.
        ids: its tokens, through the end of the turn.
        log_p: of each token.
        answer: how many of them are the answer.
    """

    confidence: float
    own: bool
    correct: bool
    ids: list[int]
    log_p: list[float]
    answer: int

    @property
    def total(self) -> float:
        return math.fsum(self.log_p)

    @property
    def s(self) -> float:
        """log p of all that follows the answer."""
        return math.fsum(self.log_p[self.answer :])


class OwnStep:
    """A module outside a Trainer, the first samples of its training data, and the values that it logs.

    The policy's weights are moved away from the reference's by `moved`.
    """

    def __init__(
        self,
        module: DPOModule,
        queries: PerturbedQueryDataModule,
        monkeypatch: pytest.MonkeyPatch,
        n: int = 6,
        moved: float = 0.03,
    ) -> None:
        self.module, self.queries, self.monkeypatch = module, queries, monkeypatch
        self.logged: dict[str, float] = {}
        self.written: dict[str, str] = {}
        self._texts: dict[tuple[str, bool], str] = {}
        module.configure_model()
        module.trainer = SimpleNamespace(datamodule=queries)  # type: ignore[assignment]
        monkeypatch.setattr(module, "log", lambda name, value, **_: self.logged.update({name: float(value)}))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained_parameters(module):
                parameter += moved * torch.randn(parameter.shape, generator=generator)
        queries.setup("fit")
        loader = queries.train_dataloader()
        self.collate: Any = loader.collate_fn.args[0]
        self.samples: list[Sample] = [loader.dataset[0, i] for i in range(n)]
        self.levels = queries.noise.levels.confidences("yes_no")

    @property
    def batch(self) -> Any:
        """The prompts, with gold answers the candidates."""
        return self.collate(self.samples)

    def step(self, batch: Any = None) -> Tensor:
        return self.module.training_step(self.batch if batch is None else batch, 0)

    def compare(self) -> tuple[Any, Comparison]:
        with shared_vision(self.module.model):
            return self.module.compare(self.batch)

    def write(self, answers: dict[int, str]) -> None:
        """Let the reference answer queries with given texts: row -> text."""
        self.written = {self.samples[row].query.id: text for row, text in answers.items()}

        def written(batch: PromptBatch, texts: Sequence[str]) -> list[Any]:
            return [
                graded_prediction(query, self.written.get(query.id, text), None, None)
                for query, text in zip(batch.queries, texts, strict=True)
            ]

        self.monkeypatch.setattr(base, "grade_answers", written)

    @contextmanager
    def _using(self, reference: bool) -> Iterator[None]:
        model = self.module.model
        training = model.training
        name = ("reference" if self.module.reference == "adapter" else None) if reference else "default"
        model.eval()
        with using_adapter(model, name):
            yield
        model.train(training)

    def alone(self, row: int) -> Alone:
        sample = self.samples[row]
        return Alone(self.module.model, self.queries.chat, sample.image, sample.query.question)

    def text(self, row: int, reference: bool = True) -> str:
        """What the reference generates for one query alone, or the policy."""
        sample, chat = self.samples[row], self.queries.chat
        key = sample.query.id, reference
        if key[0] in self.written:
            return self.written[key[0]]
        if key not in self._texts:
            inputs = chat.inputs([chat.render(sample.query.question)], [sample.image], "left")
            model, tokenizer, limit = self.module.model, chat.processor.tokenizer, self.module.max_new_tokens
            with self._using(reference):
                [self._texts[key]] = generate(model, inputs, tokenizer, limit, end_of_confidence).texts
        return self._texts[key]

    def answer(self, row: int) -> str:
        """The answer of the responses to one query: the gold answer, or what the reference generates."""
        candidates = self.queries.candidates
        is_gold = candidates is not None and candidates.answers == "gold"
        return self.samples[row].answer if is_gold else strip_confidence(self.text(row))

    def ask(self, row: int, question: Callable[[Alone], Any], reference: bool = True) -> Any:
        """What the reference, or the policy, says to a question about one query alone."""
        with self._using(reference):
            return question(self.alone(row))

    def log_p(self, row: int, candidate: Candidate, reference: bool) -> list[float]:
        """log p of the tokens of a candidate, in a forward of its own."""
        text = self.queries.processor.tokenizer.decode(candidate.tokens[: candidate.answer_length])
        response = render_response(text.strip().rstrip("."), candidate.confidence)
        ids, log_p = self.ask(row, lambda alone: alone.response(alone.prompt, response), reference)
        assert ids == list(candidate.tokens)
        return log_p  # type: ignore[no-any-return]

    def is_correct(self, row: int) -> bool:
        return _correct(self.samples[row].query, self.text(row))

    def stated(self, row: int, reference: bool, opposite: bool = False) -> list[Stated]:
        """Each response to one query, the highest confidence first; those with the opposite answer after the others."""
        query, own = self.samples[row].query, self.answer(row)
        answers = [own]
        if opposite and query.answer_type == "yes_no":
            answers.append("No" if own.lower().startswith("yes") else "Yes")
        rows = []
        with self._using(reference):
            alone = self.alone(row)
            for answer in answers:
                bare, _ = alone.response(alone.prompt, render_answer(answer))
                for level in sorted(self.levels, reverse=True):
                    ids, log_p = alone.response(alone.prompt, render_response(answer, level))
                    length = next(i for i, (a, b) in enumerate(zip(bare, ids, strict=False)) if a != b)
                    rows.append(Stated(level, answer == own, _correct(query, answer), ids, log_p, length))
        return rows


MakeStep = Callable[..., OwnStep]


def _correct(query: Query, answer: str) -> bool:
    return grade(answer, query.answer, query.answer_type, query.synonyms).correct


def softmax(values: Sequence[float]) -> np.ndarray:
    weights = np.exp(np.array(values) - max(values))
    return weights / weights.sum()


def loss_by_hand(loss: CandidateLoss, policy: list[Stated], reference: list[Stated], target: float) -> float:
    """The loss of one query, from its formula."""
    own = [r for r in policy if r.own]
    c = np.array([r.confidence for r in own])
    if isinstance(loss, SoftLabel):
        value = -float(softmax(-(((c - target) / loss.width) ** 2) / 2) @ [r.s for r in own])
        if opposite := [r for r in policy if not r.own]:
            c = np.array([r.confidence for r in opposite])
            q = softmax(-(((c - (1 - target)) / loss.width) ** 2) / 2)
            value -= loss.opposite_weight * float(q @ [r.s for r in opposite])
        return value
    if isinstance(loss, RLCR):
        log_p = [r.s for r in own] if len(own) == len(policy) else [r.total for r in policy]
        reward = [r.correct - (r.confidence - r.correct) ** 2 for r in policy]
        return -float(softmax(log_p) @ reward) - float(np.logaddexp.reduce(log_p))
    assert isinstance(loss, DPO)
    rewards = [loss.beta * (p.total - r.total) for p, r in zip(policy, reference, strict=True)]
    chosen = nearest(c, target)
    compared = [k for k, r in enumerate(policy) if r.own and k != chosen]
    if own[0].correct:
        compared += [k for k, r in enumerate(policy) if not r.own and r.confidence == c[chosen]]
    return float(np.mean([math.log1p(math.exp(rewards[k] - rewards[chosen])) for k in compared]))


def nearest(levels: Sequence[float], target: float) -> int:
    """Index of the level nearest to a target; of two equally near ones, the higher."""
    return min(range(len(levels)), key=lambda k: (round(abs(levels[k] - target), 9), -levels[k]))
