"""How a model answers: a `System` takes a batch of questions, and estimators rate its answers.

An estimator rates the given answer and does not change it. Its cost is the number of forward passes of the language model per query, as
if it ran alone: responses that are scored together are one pass, and so is each generated token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch

from vlm_calibration.data.collate import ChatFormat, PromptBatch, move
from vlm_calibration.data.noise import ImageCopy
from vlm_calibration.estimators.answer_scoring import (
    AnswerTokenizer,
    ResponsePass,
    ScoredAnswers,
    TokenizedAnswer,
    right_padded,
    score_answers,
)
from vlm_calibration.estimators.predictions import EXPECTED, graded_prediction
from vlm_calibration.estimators.probes import COPIES, Probe
from vlm_calibration.models.adapters import using_adapter
from vlm_calibration.models.generation import PromptCache, generate, second_choice
from vlm_calibration.models.shared_prefix import Prompts
from vlm_calibration.records import ORIGINAL, VERBALIZED, Prediction
from vlm_calibration.text.confidence import end_of_confidence, strip_confidence

OPPOSITE = {"yes": "No", "no": "Yes"}
PROBES = "probes"
"""Name under which the forward passes of all probes are counted."""


class Estimate(NamedTuple):
    """The confidence in [0, 1] in each of B answers, None for an answer without one; and its forward passes."""

    confidence: list[float | None]
    passes: list[int]


class Estimator(ABC):
    """Estimates the confidence in an answer.

    Attributes:
        name: its key in `predictions.jsonl`, and the suffix after "@" in `metrics.json`.
        copies: the perturbed copies of each image that it needs.
    """

    name: ClassVar[str]
    copies: Sequence[ImageCopy] = ()

    @abstractmethod
    def estimate(self, answered: AnsweredBatch) -> Estimate:
        """The confidence in each answer of a batch. Call it under `torch.no_grad` or in inference mode."""


class SystemAnswers(NamedTuple):
    """The answers of a system to B queries.

    Attributes:
        predictions: B graded answers, with the estimates of the system's estimators and the probes that were asked for.
        passes: estimator, or `PROBES` -> the forward passes of each query; for an address the generated tokens.
        distributions: for each query confidence -> probability that the system states it, highest confidence first; empty without
            `ExpectedConfidence`, and where it cannot be had.
    """

    predictions: list[Prediction]
    passes: dict[str, list[int]]
    distributions: list[Mapping[float, float]]

    @staticmethod
    def of(
        answers: Sequence[Prediction],
        estimates: Mapping[str, Estimate],
        distributions: Iterable[Mapping[float, float]],
    ) -> SystemAnswers:
        columns = {name: e.confidence for name, e in estimates.items() if name != VERBALIZED}
        predictions = [
            replace(answer, estimates={name: column[row] for name, column in columns.items()})
            for row, answer in enumerate(answers)
        ]
        passes = {name: estimate.passes for name, estimate in estimates.items()}
        return SystemAnswers(predictions, passes, list(distributions))


class System(ABC):
    """Answers questions about images. `notes`: estimator, or another part of the results, that lacks values -> why."""

    notes: Mapping[str, str] = {}

    @abstractmethod
    def answer(self, batch: PromptBatch, probes: Sequence[Probe] = ()) -> SystemAnswers:
        """Answer a batch of at least one query, which has the copies of images that estimators and probes need."""

    def close(self) -> None:  # noqa: B027  (a model in this process has nothing to close)
        """Close connections."""


@dataclass(eq=False)
class LocalSystem(System):
    """A transformers or peft model in this process, in eval mode, with one of its adapters; None: without any."""

    model: Any
    adapter: str | None
    tokenizer: AnswerTokenizer
    max_new_tokens: int
    estimators: Sequence[Estimator] = ()

    @torch.no_grad()
    def answer(self, batch: PromptBatch, probes: Sequence[Probe] = ()) -> SystemAnswers:
        rates = bool(self.estimators or probes)
        with using_adapter(self.model, self.adapter):
            answered = AnsweredBatch.generate(
                self.model, batch, self.tokenizer, self.max_new_tokens, keep_cache=rates
            )
            estimates = {estimator.name: estimator.estimate(answered) for estimator in self.estimators}
            scored = answered.scored if EXPECTED in estimates else [None] * len(batch.queries)
            distributions = [scores.distribution if scores else {} for scores in scored]
            answers = SystemAnswers.of(answered.predictions, estimates, distributions)
            if probes:
                probed, answers.passes[PROBES] = answered.read_probes(probes)
                rows = zip(answers.predictions, probed, strict=True)
                answers = answers._replace(predictions=[replace(p, probes=own) for p, own in rows])
            return answers


def grade_answers(batch: PromptBatch, texts: Sequence[str]) -> list[Prediction]:
    """Parse and grade the texts that answer a batch."""
    rows = zip(batch.queries, texts, batch.perturbations, batch.noise_steps, strict=True)
    return [graded_prediction(*row, batch.grading) for row in rows]


@dataclass(frozen=True, eq=False)
class AnsweredBatch:
    """A batch with a model's answers.

    Attributes:
        model: a transformers or peft model; the adapter that gave the answers is active.
        batch: B prompts, padded on the left.
        cache: keys and values of the prompts from generation, or None.
        complete: for each answer whether it ends before the limit cuts it off; empty if that is not known.
    """

    model: Any
    batch: PromptBatch
    predictions: Sequence[Prediction]
    answer_passes: Sequence[int]
    tokenizer: AnswerTokenizer
    max_new_tokens: int
    cache: PromptCache | None = None
    complete: Sequence[bool] = ()

    @staticmethod
    def generate(
        model: Any,
        batch: PromptBatch,
        tokenizer: AnswerTokenizer,
        max_new_tokens: int,
        keep_cache: bool = True,
    ) -> AnsweredBatch:
        """The greedy answers of the active adapter, up to the confidence. Call it in eval mode and under `torch.no_grad`."""
        if not batch.queries:
            return AnsweredBatch(model, batch, [], [], tokenizer, max_new_tokens)
        of_model = tokenizer.chat.processor.tokenizer
        texts, passes, complete, cache = generate(
            model, batch.inputs, of_model, max_new_tokens, end_of_confidence, keep_cache=keep_cache
        )
        answers = grade_answers(batch, texts)
        return AnsweredBatch(model, batch, answers, passes, tokenizer, max_new_tokens, cache, complete)

    @property
    def chat(self) -> ChatFormat:
        return self.tokenizer.chat

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts, padded on the right."""
        return right_padded(self.batch.inputs)

    @cached_property
    def answers(self) -> list[str | None]:
        """For each query the answer without its stated confidence; None if there is no answer left to rate."""
        return [self._answer(p.text) for p in self.predictions]

    def _answer(self, text: str) -> str | None:
        image, answer = getattr(self.chat.processor, "image_token", None), strip_confidence(text)
        # An answer that spells the image token would be tokenized as an image.
        return answer if answer and not (image and image in answer) else None

    @cached_property
    def rivals(self) -> dict[int, Prediction]:
        """Row -> the likeliest other answer, graded: the opposite of yes or no; else a greedy answer from the second-likeliest first token.

        Not for a query without an answer, nor where the other text is no answer, is cut off, or gives the same answer.
        """
        texts = [OPPOSITE.get(p.predicted or "", "") for p in self.predictions]
        for row, (text, _) in self._second_choices.items():
            texts[row] = text
        rows = zip(self.answers, self.predictions, grade_answers(self.batch, texts), strict=True)
        return {
            row: rival
            for row, (answer, own, rival) in enumerate(rows)
            if None not in (answer, self._answer(rival.text), rival.predicted)
            and rival.predicted != own.predicted
        }

    @cached_property
    def _second_choices(self) -> dict[int, tuple[str, int]]:
        """Row of a question without yes and no -> a greedy text from the second-likeliest first token, "" if cut off; its forward passes."""
        rows = [row for row, p in enumerate(self.predictions) if p.answer_type != "yes_no"]
        if not rows:
            return {}
        inputs, of_model = self.batch.inputs, self.chat.processor.tokenizer
        sampler = second_choice(inputs["input_ids"].shape[1])
        other = generate(self.model, inputs, of_model, self.max_new_tokens, end_of_confidence, sampler)
        return {row: (other.texts[row] if other.complete[row] else "", other.passes[row]) for row in rows}

    @cached_property
    def _tokenized(self) -> list[TokenizedAnswer]:
        pairs = zip(self.batch.queries, self.answers, strict=True)
        return [self.tokenizer.tokenize(query, answer or query.answer) for query, answer in pairs]

    @cached_property
    def scored_answers(self) -> ScoredAnswers:
        """The scores of each answer with every level, in one pass; of the gold answer for a query without an answer."""
        return score_answers(self.model, self._tokenized, self.prompts, self.cache)

    @cached_property
    def scored(self) -> list[ResponsePass | None]:
        """For each query the scores of its answer with every level; None without an answer."""
        scores = zip(self.scored_answers.by_answer(), self.answers, strict=True)
        return [s if answer is not None else None for s, answer in scores]

    def score_copy(self, copy: ImageCopy, *, with_levels: bool) -> dict[int, ResponsePass]:
        """Row -> the scores of the answer with a perturbed copy of its image, in one pass, for the queries that have the copy.

        With every level after the answer, or with one, for scores that do not depend on them; of the gold answer for a query without an
        answer. ValueError if the copies were not made, which `PerturbedQueryDataModule` does for an `EvaluationModule`.
        """
        copied = self.batch.copies.get(copy)
        if copied is None:
            raise ValueError(f"a batch without the copies of its images that are to be scored: {copy}")
        if not copied.rows:
            return {}
        answers = [self._tokenized[row] for row in copied.rows]
        if not with_levels:
            answers = [
                a._replace(tokens=[a.tokens[0], *a.tokens[len(a.candidates) :]], candidates=a.candidates[:1])
                for a in answers
            ]
        inputs = move(copied.inputs, self.batch.inputs["input_ids"].device)
        scores = score_answers(self.model, answers, right_padded(inputs))
        return dict(zip(copied.rows, scores.by_answer(), strict=True))

    def score_rivals(self) -> dict[int, ResponsePass]:
        """Row -> the scores of the rival of the answer."""
        if not self.rivals:
            return {}
        texts = {row: strip_confidence(rival.text) for row, rival in self.rivals.items()}
        # The other queries keep their rows, which the cache has as well; their scores are dropped.
        queries = enumerate(self.batch.queries)
        tokenized = [self.tokenizer.tokenize(q, texts.get(row, q.answer)) for row, q in queries]
        by_answer = score_answers(self.model, tokenized, self.prompts, self.cache).by_answer()
        return {row: by_answer[row] for row in texts}

    def read_probes(self, probes: Sequence[Probe]) -> tuple[list[dict[str, float | None]], list[int]]:
        """The original confidence in each answer and the likeliest after every probe, and B numbers of forward passes.

        None where a probe does not apply, and for a text without an answer. ValueError as in `score_copy`.
        """
        passes = [scores.passes if scores else 1 for scores in self.scored]
        original = [scores.likeliest_level if scores else None for scores in self.scored]
        probed: list[dict[str, float | None]] = [{ORIGINAL: p, **dict.fromkeys(probes)} for p in original]
        for probe in probes:
            copy = COPIES.get(probe)
            changed = self.score_rivals() if copy is None else self.score_copy(copy, with_levels=True)
            if copy is None:
                for row, (_, generated) in self._second_choices.items():
                    passes[row] += generated
            for row, scores in changed.items():
                passes[row] += scores.passes
                if self.answers[row] is not None:
                    probed[row][probe] = scores.likeliest_level
        return probed, passes
