"""Batches for preference optimisation: every prompt with one candidate response per confidence that can be stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from vlm_calibration.data.collate import (
    ChatFormat,
    PromptBatch,
    PromptCollator,
    TooLong,
    common_prefix,
    move,
    split_too_long,
)
from vlm_calibration.data.noise import Sample, query_rng
from vlm_calibration.perturbation.levels import ConfidenceLevels
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import render_answer, render_response


@dataclass(frozen=True)
class CandidateSettings:
    """The candidate responses to a query: one for each confidence that can be stated.

    Args:
        answers: the answer that all of them give. "gold": the gold answer, or a wrong one in its place for a share of the queries
            (`noise.wrong_answer_rate`), as in the paper. "own": what the reference answers to this very image, generated within
            the training step, so that confidence is learnt for the answers that the model will give.
        grid: percent, a divisor of 100: its multiples can be stated besides the confidences of the noise levels, for means that
            lie between few levels. None: the noise levels alone.
        wrong_answer: add the same responses with a wrong answer, if the source has one; the one that states the target is
            rejected. With own answers to yes/no questions it is the opposite one, which is not rejected if it is right.
        seed: seed of the draw among several wrong answers.
    """

    answers: Literal["gold", "own"] = "gold"
    grid: int | None = None
    wrong_answer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise DataError(f"data.candidates.seed must be at least 0, found {self.seed}")
        if self.grid is not None and (self.grid < 1 or 100 % self.grid):
            raise DataError(f"data.candidates.grid must be a divisor of 100 (percent), found {self.grid}")


class Candidate(NamedTuple):
    """One response to a query.

    Attributes:
        tokens: token ids after the prompt, through the end of the turn; the first `answer_length` are the answer, the last
            `ending_length` the same for every confidence ("%", the end of the turn).
        confidence: the stated confidence, in [0, 1].
        wrong: whether the answer differs from that of the chosen response.
    """

    tokens: tuple[int, ...]
    answer_length: int
    ending_length: int
    confidence: float
    wrong: bool


Candidates = tuple[tuple[Candidate, ...], ...]


class CandidateBatch(NamedTuple):
    """B prompts, each with its candidate responses; the fields not named here are as in `SFTBatch` and `PromptBatch`.

    Attributes:
        inputs: arguments of the model's forward (input_ids int64 [B, L], ...), padded on the right; empty if no sample is left.
        lengths: int64 [B], tokens of each prompt before its responses.
        candidates: of each query one response per confidence, in falling order, then those with a wrong answer, if any.
        n_cut_off: number of the model's own answers without an end, whose responses give the gold answer instead.
    """

    inputs: dict[str, torch.Tensor]
    lengths: torch.Tensor
    candidates: Candidates
    levels: tuple[float, ...]
    is_correct: tuple[bool, ...]
    epochs: tuple[int, ...]
    queries: tuple[Query, ...]
    skipped: tuple[str, ...] = ()
    n_cut_off: int = 0

    def to(self, device: torch.device | str) -> CandidateBatch:
        return self._replace(inputs=move(self.inputs, device), lengths=self.lengths.to(device))


def stated_levels(levels: ConfidenceLevels, answer_type: str, grid: int | None = None) -> tuple[float, ...]:
    """The confidences that can be stated for an answer type, in falling order; a ValueError for one without levels."""
    multiples = set() if grid is None else {percent / 100 for percent in range(0, 101, grid)}
    # Confidences that round to the same percentage are one, the highest.
    by_text = {render_response("", c): c for c in sorted({*levels.confidences(answer_type)} | multiples)}
    return tuple(sorted(by_text.values(), reverse=True))


def tokenize_responses(
    chat: ChatFormat, query: Query, answers: Sequence[str], levels: ConfidenceLevels, grid: int | None = None
) -> tuple[int, tuple[Candidate, ...]]:
    """How many tokens at the end of the prompt the responses replace, and one for each answer (the first is right) and confidence."""
    stated = [(answer, c) for answer in answers for c in stated_levels(levels, query.answer_type, grid)]
    # 11% and 22% have no digit in common: the ending they share follows every confidence.
    probes = [(answers[0], c) for c in (0.11, 0.22)]
    texts = chat.conversations(query.question, [render_response(a, c) for a, c in stated + probes])
    bare_texts = chat.conversations(query.question, [render_answer(a) for a in answers])
    cut, ids = chat.after_prompt(chat.render(query.question), [*texts, *bare_texts])
    bare = dict(zip(answers, ids[len(texts) :], strict=True))

    responses = []
    for (answer, c), tokens in zip(stated + probes, ids, strict=False):
        answer_length = common_prefix(bare[answer], tokens)
        turn = tuple(tokens[: chat.turn_length(tokens, answer_length)])
        responses.append(Candidate(turn, answer_length, 0, c, wrong=answer != answers[0]))
    *responses, first, second = responses
    ending = first.tokens[::-1][: common_prefix(first.tokens[::-1], second.tokens[::-1])]
    return cut, tuple(r._replace(ending_length=common_prefix(r.tokens[::-1], ending)) for r in responses)


@dataclass
class CandidateCollator:
    """Collates samples into a `CandidateBatch`.

    Two queries with the levels 100%, 50% and 0% become::

        inputs["input_ids"]   int64 [2, 5]    <user> <image> Dog? <assistant> <pad>
                                              <user> <image> What? It? <assistant>
        lengths               int64 [2]       4, 5
        candidates[0]         3 responses     Yes . Confidence : 100 % <end>
                                              Yes . Confidence : 50 % <end>
                                              Yes . Confidence : 0 % <end>
        levels                2 floats        0.5, 1.0

    `levels` is the scale of the noise, `max_length` limits a prompt with one response; the rest is as in `SFTCollator`.
    """

    chat: ChatFormat
    levels: ConfidenceLevels
    settings: CandidateSettings
    max_length: int
    on_too_long: TooLong = "raise"

    def __call__(self, samples: Sequence[Sample]) -> CandidateBatch:
        if not samples:
            return CandidateBatch({}, torch.zeros(0, dtype=torch.int64), (), (), (), (), ())
        cuts, candidates = zip(*(self._tokenize(s) for s in samples), strict=True)
        prompts = [self.chat.render(s.query.question) for s in samples]
        inputs = self.chat.inputs_of(samples, prompts, "right")
        lengths = inputs["attention_mask"].sum(dim=1) - torch.tensor(cuts)
        longest = [
            n + max(len(c.tokens) for c in responses)
            for n, responses in zip(lengths.tolist(), candidates, strict=True)
        ]
        fitting, skipped = split_too_long(samples, longest, self.max_length, self.on_too_long)
        if skipped:
            return self(fitting)._replace(skipped=skipped)
        facts = [(s.confidence, s.wrong_answer is None, s.epoch, s.query) for s in samples]
        levels, is_correct, epochs, queries = zip(*facts, strict=True)
        return CandidateBatch(inputs, lengths, candidates, levels, is_correct, epochs, queries)

    def _tokenize(self, sample: Sample) -> tuple[int, tuple[Candidate, ...]]:
        wrong = [w for w in sample.wrong if w != sample.query.answer] if self.settings.wrong_answer else []
        answers = [sample.answer]
        # A response that is wrong itself is not preferred over another wrong one.
        if wrong and sample.wrong_answer is None:
            rng = query_rng(self.settings.seed, sample.epoch, sample.query.id, "wrong")
            answers.append(wrong[int(rng.integers(len(wrong)))])
        return tokenize_responses(self.chat, sample.query, answers, self.levels, self.settings.grid)


class ValidationBatch(NamedTuple):
    """The same samples as prompts to answer and, in preference optimisation, as candidates."""

    prompts: PromptBatch
    candidates: CandidateBatch | None

    def to(self, device: torch.device | str) -> ValidationBatch:
        candidates = self.candidates and self.candidates.to(device)
        return ValidationBatch(self.prompts.to(device), candidates)


def collate_validation(
    prompts: PromptCollator, candidates: CandidateCollator | None, samples: Sequence[Sample]
) -> ValidationBatch:
    return ValidationBatch(prompts(samples), candidates(samples) if candidates else None)
