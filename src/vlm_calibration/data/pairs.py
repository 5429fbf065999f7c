"""Candidates for preference optimisation: which confidence is preferred, and over which others.

A batch carries every response that may be compared, one for each level. Which of them is chosen and which are rejected is
decided when the batch is trained on, since the target may depend on what the reference model believes about the image;
given that, it is a pure function of (seed, epoch, query id).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from vlm_calibration.data.collate import (
    ChatFormat,
    PromptBatch,
    PromptCollator,
    TooLong,
    fitting,
    move,
)
from vlm_calibration.data.layout import common_prefix
from vlm_calibration.data.noise import Sample, query_rng
from vlm_calibration.perturbation.levels import ConfidenceLevels
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import render_answer, render_response


@dataclass(frozen=True)
class PairPolicy:
    """What is preferred over what.

    Args:
        target: the confidence that the chosen response states. "expected": the one nearest to what the reference expects,
            averaged over all that may be stated, on this very image. "recalibrated": the same after an isotonic map fitted
            on the validation queries before training. "level": the level of the noise (the paper's).
            Greedy decoding states the mode of what a model believes, and calibrated is its mean: preferring the level
            sharpens the mode, preferring the mean moves the mode there.
        grid: percent, dividing 100: beside the levels of the noise, every multiple of it may be stated. Where the noise has
            few levels, their mean lies between them. None: the levels of the noise alone.
        rejected: which other levels are rejected. "all" of them; or `n_rejected` drawn at random ("uniform"), the
            furthest from the target ("far"), or the nearest ("adjacent").
        n_rejected: how many; 1 by default. Not to be given with "all".
        on_policy: where the reference itself would state another level than the target, reject that one among them;
            "all" holds it in any case.
        wrong_answer: reject a wrong answer too, stated with the target's confidence, where the source knows one.
        seed: of what is drawn.
    """

    target: Literal["expected", "recalibrated", "level"] = "expected"
    grid: int | None = None
    rejected: Literal["all", "uniform", "far", "adjacent"] = "all"
    n_rejected: int | None = None
    on_policy: bool = False
    wrong_answer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grid is not None and (self.grid < 1 or 100 % self.grid):
            raise DataError(
                f"pairs.grid must be a whole number of percent that divides 100, found {self.grid}"
            )
        if self.n_rejected is not None and (self.rejected == "all" or self.n_rejected < 1):
            raise DataError(
                f"pairs.n_rejected must be at least 1, and not be given with `rejected: all`, found {self.n_rejected}"
            )
        if self.seed < 0:
            raise DataError(f"pairs.seed must be at least 0, found {self.seed}")

    @property
    def needs_reference(self) -> bool:
        """Whether what is compared depends on what the reference believes about all levels."""
        return self.target != "level" or self.on_policy


class Candidate(NamedTuple):
    """One response.

    tokens: its token ids behind the prompt, through the end of the turn. answer_length: how many of them are the answer.
    ending_length: how many at the end are the same whatever confidence is stated. confidence: what it states, in [0, 1].
    wrong: it gives another answer than the chosen response.
    """

    tokens: tuple[int, ...]
    answer_length: int
    ending_length: int
    confidence: float
    wrong: bool


class PairBatch(NamedTuple):
    """Prompts with every response that may be compared.

    inputs: what the model's forward takes, padded on the right; empty if there is no sample, or every one was too long. lengths: int64 [B],
    tokens of each prompt before its responses. candidates: for each query one response a level, in falling order of
    confidence, then the same with a wrong answer where pairs have one. levels: for each query the confidence that its noise
    earns. is_correct: whether the responses give the gold answer. epochs: in which each is seen. skipped: ids of samples that
    were too long.
    """

    inputs: dict[str, torch.Tensor]
    lengths: torch.Tensor
    candidates: tuple[tuple[Candidate, ...], ...]
    levels: tuple[float, ...]
    is_correct: tuple[bool, ...]
    epochs: tuple[int, ...]
    queries: tuple[Query, ...]
    skipped: tuple[str, ...]

    def to(self, device: torch.device | str) -> PairBatch:
        return self._replace(inputs=move(self.inputs, device), lengths=self.lengths.to(device))


def stated_levels(levels: ConfidenceLevels, answer_type: str, grid: int | None = None) -> tuple[float, ...]:
    """The confidences that are stated for this type of answer, highest first.

    Args:
        grid: percent, as in `PairPolicy`.
    """
    between = set() if grid is None else {percent / 100 for percent in range(0, 101, grid)}
    found = sorted({levels.confidence(step, answer_type) for step in levels.steps} | between)
    # Of levels that read alike, being less than a percent apart, the highest.
    return tuple({render_response("", c): c for c in found}.values())[::-1]


def nearest(levels: Sequence[float], confidence: float) -> int:
    """Index of the level nearest to a confidence, the higher one of two."""
    return min(range(len(levels)), key=lambda i: (round(abs(levels[i] - confidence), 9), -levels[i]))


def choose(
    policy: PairPolicy,
    candidates: Sequence[Candidate],
    target: int,
    query: Query,
    epoch: int,
    own: int | None = None,
) -> list[int]:
    """Indices of the chosen candidate, which comes first, and of the rejected ones.

    Args:
        target: index of the candidate whose confidence is preferred. own: index of the one that the reference itself would
            state; needed if `policy.on_policy`.
    """
    others = [i for i, c in enumerate(candidates) if not c.wrong and i != target]
    if policy.rejected != "all":
        rng = query_rng(policy.seed, epoch, query.id, "rejected")
        drawn = rng.permutation(others).tolist()
        sign = {"uniform": 0, "far": -1, "adjacent": 1}[policy.rejected]
        away = [abs(c.confidence - candidates[target].confidence) for c in candidates]
        # A stable sort of a random order: ties fall at random.
        drawn.sort(key=lambda i: sign * round(away[i], 9))
        if policy.on_policy and own is not None and own != target:
            drawn.sort(key=lambda i: i != own)
        others = drawn[: policy.n_rejected or 1]
    confidence = candidates[target].confidence
    wrong = [i for i, c in enumerate(candidates) if c.wrong and c.confidence == confidence]
    return [target, *others, *wrong]


class PairCollator:
    """Makes a `PairBatch` of samples.

    Args:
        levels: the confidences that may be stated.
        policy: says whether to add responses with a wrong answer, and how they are drawn.
        max_length: most tokens of a prompt with one response. on_too_long: as in `SFTCollator`.
    """

    def __init__(
        self,
        chat: ChatFormat,
        levels: ConfidenceLevels,
        policy: PairPolicy,
        max_length: int,
        on_too_long: TooLong = "raise",
    ) -> None:
        self.chat = chat
        self.levels = levels
        self.policy = policy
        self.max_length = max_length
        self.on_too_long = on_too_long

    def __call__(self, samples: Sequence[Sample]) -> PairBatch:
        if not samples:
            return _EMPTY
        found = [self._of_sample(s) for s in samples]
        prompts = [self.chat.render(s.query.question) for s in samples]
        inputs = self.chat.inputs_of(samples, prompts, "right")
        cut = torch.tensor([n for n, _ in found])
        lengths = inputs["attention_mask"].sum(dim=1) - cut
        longest = [
            n + max(len(c.tokens) for c in cs) for n, (_, cs) in zip(lengths.tolist(), found, strict=True)
        ]
        kept, skipped = fitting(samples, longest, self.max_length, self.on_too_long)
        if skipped:
            return self(kept)._replace(skipped=skipped)
        return PairBatch(
            inputs,
            lengths,
            tuple(candidates for _, candidates in found),
            tuple(s.confidence for s in samples),
            tuple(s.wrong_answer is None for s in samples),
            tuple(s.epoch for s in samples),
            tuple(s.query for s in samples),
            (),
        )

    def _of_sample(self, sample: Sample) -> tuple[int, tuple[Candidate, ...]]:
        wrong = [w for w in sample.wrong if w != sample.query.answer] if self.policy.wrong_answer else []
        self.chat.check(sample.query, [sample.answer, *wrong])
        answers = [sample.answer]
        # A response that is wrong already is not preferred over another wrong one.
        if wrong and sample.wrong_answer is None:
            rng = query_rng(self.policy.seed, sample.epoch, sample.query.id, "wrong")
            answers.append(wrong[int(rng.integers(len(wrong)))])
        return self.candidates(sample.query, answers)

    def candidates(self, query: Query, answers: Sequence[str]) -> tuple[int, tuple[Candidate, ...]]:
        """One response for each answer and level; those with another than the first answer are wrong.

        Returns:
            How many tokens at the end of the prompt the responses do not share (most often 0), and the responses.
        """
        levels = stated_levels(self.levels, query.answer_type, self.policy.grid)
        stated = [(a, c) for a in answers for c in levels]
        # Two numbers without a digit in common show what follows on any number.
        probes = [(answers[0], c) for c in (0.11, 0.22)]
        texts = self.chat.conversations(query.question, [render_response(a, c) for a, c in stated + probes])
        answered = self.chat.conversations(query.question, [render_answer(a) for a in answers])
        prompt, *ids = self.chat.token_ids([self.chat.render(query.question), *texts, *answered])
        full, ends = ids[: len(texts)], ids[len(texts) :]
        probed = full[len(stated) :]
        start = min(common_prefix(prompt, f) for f in full)

        def response(which: int, tokens: Sequence[int]) -> tuple[tuple[int, ...], int]:
            answer_length = common_prefix(ends[which], tokens) - start
            kept = self.chat.through_end(tokens[start:], answer_length)
            return tuple(tokens[start : start + kept]), answer_length

        one, other = (response(0, tokens)[0][::-1] for tokens in probed)
        ending = one[: common_prefix(one, other)]
        found = []
        for (answer, confidence), conversation in zip(stated, full[: len(stated)], strict=True):
            which = answers.index(answer)
            tokens, answer_length = response(which, conversation)
            ending_length = common_prefix(tokens[::-1], ending)
            found.append(Candidate(tokens, answer_length, ending_length, confidence, which > 0))
        return len(prompt) - start, tuple(found)


class ValidationBatch(NamedTuple):
    """The same samples as prompts to be answered and, in preference optimisation, as pairs."""

    prompts: PromptBatch
    pairs: PairBatch | None

    def to(self, device: torch.device | str) -> ValidationBatch:
        return ValidationBatch(self.prompts.to(device), self.pairs.to(device) if self.pairs else None)


class ValidationCollator:
    """Makes a `ValidationBatch` of samples."""

    def __init__(self, prompts: PromptCollator, pairs: PairCollator | None) -> None:
        self.prompts = prompts
        self.pairs = pairs

    def __call__(self, samples: Sequence[Sample]) -> ValidationBatch:
        return ValidationBatch(self.prompts(samples), self.pairs(samples) if self.pairs else None)


_EMPTY = PairBatch({}, torch.zeros(0, dtype=torch.int64), (), (), (), (), (), ())


class IsotonicMap(NamedTuple):
    """A monotone map from confidence to accuracy per answer type: knots in rising order, linear between them."""

    knots: Mapping[str, tuple[Sequence[float], Sequence[float]]]

    def __call__(self, confidence: float, answer_type: str) -> float:
        """The accuracy that was measured at this confidence; the confidence itself for a type that was not."""
        if math.isnan(confidence):
            raise ValueError("confidence is not a number")
        if answer_type not in self.knots:
            return confidence
        return float(np.interp(confidence, *self.knots[answer_type]))


def fit_isotonic_map(
    confidence: Sequence[float], correct: Sequence[bool], answer_type: Sequence[str]
) -> IsotonicMap:
    """Isotonic regression of correctness on confidence, for each answer type (Zadrozny and Elkan, 2002)."""
    knots = {}
    for kind in sorted(set(answer_type)):
        rows = sorted(
            (c, float(r)) for c, r, t in zip(confidence, correct, answer_type, strict=True) if t == kind
        )
        x = np.array([c for c, _ in rows])
        unique, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        means = np.bincount(inverse, weights=[r for _, r in rows]) / counts
        fit = isotonic_regression(means, weights=counts.astype(np.float64)).x
        knots[kind] = (unique.tolist(), np.clip(fit, 0.0, 1.0).tolist())
    return IsotonicMap(knots)
