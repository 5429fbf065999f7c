"""From samples to model inputs, through any processor that has a chat template, and PaliGemma's that needs none.

Which tokens are the response is known by construction: prompt and full conversation are both rendered and tokenised, and
what follows their longest common prefix is the response. The stated confidence is told from the answer in the same way. Processors replace an image token by many, but always before the response, so positions are counted from
the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from vlm_calibration.data.layout import Side, common_prefix, layout_of
from vlm_calibration.data.noise import Sample
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import render_answer, render_response
from vlm_calibration.text.grading import EXACT, Grading
from vlm_calibration.text.prompts import ElicitationPrompt

TooLong = Literal["raise", "skip"]


class SFTBatch(NamedTuple):
    """Samples with the response to learn, padded on the right.

    inputs: what the model's forward takes (input_ids int64 [B, L], attention_mask, pixel_values, ...), empty if there is
        no sample, or every one was too long. labels: int64 [B, L], the token id where it belongs to the response, IGNORE elsewhere.
    confidence_mask: bool [B, L], where a label belongs to the confidence and not to the answer.
    confidence: float32 [B], the confidence to state. is_correct: bool [B], whether the response gives the gold answer.
    queries: B of them. skipped: ids of samples that were too long.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    confidence_mask: torch.Tensor
    confidence: torch.Tensor
    is_correct: torch.Tensor
    queries: tuple[Query, ...]
    skipped: tuple[str, ...]

    @property
    def label_confidence_mask(self) -> torch.Tensor:
        """Whether each of the N label tokens belongs to the confidence, bool [N], in the order of the labels."""
        return self.confidence_mask[self.labels != IGNORE]

    def to(self, device: torch.device | str) -> SFTBatch:
        return self._replace(
            inputs=move(self.inputs, device),
            labels=self.labels.to(device),
            confidence_mask=self.confidence_mask.to(device),
            confidence=self.confidence.to(device),
            is_correct=self.is_correct.to(device),
        )


class RankedAnswers(NamedTuple):
    """The answers between which ranking decides.

    cut: how many tokens at the prompt's end they have in front (most often 0). tokens: token ids of the gold answer, then of
    each wrong one; of the gold answer alone where the query is not graded by ranking.
    """

    cut: int
    tokens: tuple[tuple[int, ...], ...]


class PromptBatch(NamedTuple):
    """Samples to be answered, padded on the left.

    inputs: what generate takes. samples: queries with their noise step and true level, without their pixels. grading: how the
    answers are graded. ranked: of every query, empty if none is graded by ranking.
    """

    inputs: dict[str, torch.Tensor]
    queries: tuple[Query, ...]
    steps: tuple[int, ...]
    levels: tuple[float, ...]
    grading: Grading = EXACT
    ranked: tuple[RankedAnswers, ...] = ()

    def to(self, device: torch.device | str) -> PromptBatch:
        return self._replace(inputs=move(self.inputs, device))


def move(inputs: Mapping[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {k: v.to(device, non_blocking=True) for k, v in inputs.items()}


class ChatFormat:
    """Renders conversations as a processor's model reads them, and tokenises them.

    Args:
        processor: a transformers processor with a chat template, or PaliGemma's.
        prompt: how a question is put to the model.

    Raises:
        DataError: the processor has no chat template.
    """

    def __init__(self, processor: Any, prompt: ElicitationPrompt) -> None:
        self.processor = processor
        self.prompt = prompt
        self.layout = layout_of(processor)

    def render(self, question: str, response: str | None = None) -> str:
        """The conversation as text: up to where the model is to answer, or with the response."""
        return self.layout.render(self.prompt.render(question), response)

    def conversations(self, question: str, responses: Sequence[str]) -> list[str]:
        """`render` with each of several responses; the template runs once where it inserts text as it is."""
        first = self.render(question, responses[0])
        if first.count(responses[0]) != 1:
            return [first, *(self.render(question, r) for r in responses[1:])]
        before, after = first.split(responses[0])
        last = self.render(question, responses[-1])
        if last != before + responses[-1] + after:
            return [first, *(self.render(question, r) for r in responses[1:])]
        return [before + r + after for r in responses]

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered conversations, each image token once."""
        tokenizer = self.processor.tokenizer
        return tokenizer(texts, add_special_tokens=self.layout.adds_special(texts[0]))["input_ids"]

    def behind_prompt(self, prompt: str, conversations: Sequence[str]) -> tuple[int, list[list[int]]]:
        """Token ids of conversations behind the beginning that all of them share with their prompt.

        Returns:
            How many tokens at the prompt's end they do not share (most often 0), and the ids.
        """
        first, *full = self.token_ids([prompt, *conversations])
        start = min(common_prefix(first, ids) for ids in full)
        return len(first) - start, [ids[start:] for ids in full]

    def inputs(self, texts: list[str], images: list[Any], side: Side) -> dict[str, torch.Tensor]:
        """Padded model inputs of one image and one text each; nothing is ever cut."""
        return self.layout.inputs(texts, images, side)

    def inputs_of(self, samples: Sequence[Sample], texts: list[str], side: Side) -> dict[str, torch.Tensor]:
        """`inputs` of samples and what is rendered of each.

        Raises:
            DataError: the processor refuses a sample, which is named.
        """
        try:
            return self.inputs(texts, [s.image for s in samples], side)
        except ValueError:
            for sample, text in zip(samples, texts, strict=True):
                try:
                    self.inputs([text], [sample.image], side)
                except ValueError as error:
                    raise DataError(f"record {sample.query.id!r}: {error}") from error
            raise

    def response_spans(self, sample: Sample) -> tuple[str, list[int], int]:
        """Full text, the token ids of the response, and how many of these belong to the answer.

        The response ends with the end-of-turn token, so that the model learns to stop; what a template writes behind
        it is left out.
        """
        query = sample.query
        self.check(query, [sample.answer])
        text = self.render(query.question, render_response(sample.answer, sample.confidence))
        texts = [
            self.render(query.question),
            text,
            self.render(query.question, render_answer(sample.answer)),
        ]
        prompt, full, answered = self.token_ids(texts)
        start = common_prefix(prompt, full)
        return text, full[start:], common_prefix(answered, full) - start

    def through_end(self, response: Sequence[int], answer_length: int) -> int:
        """Number of leading tokens up to and with the end-of-turn token, the first special one behind the answer."""
        stated = enumerate(response[answer_length:], start=answer_length)
        return next((i + 1 for i, token in stated if token in self.special_ids), len(response))

    @cached_property
    def special_ids(self) -> set[int]:
        """Token ids that no text has: those that the tokenizer marks as special, the end of a turn among them."""
        tokenizer = self.processor.tokenizer
        return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {
            tokenizer.eos_token_id
        }

    def check(self, query: Query, responses: Sequence[str] = ()) -> None:
        """Refuse a query whose text, or that of other answers to it, would be taken for the image.

        Raises:
            DataError: the question or an answer holds a token that stands for the image or a piece of it.
        """
        texts = [("question", query.question), ("answer", query.answer)]
        for name, text in [*texts, *(("wrong answer", r) for r in responses)]:
            for token in self.image_tokens:
                if token in text:
                    raise DataError(
                        f"record {query.id!r}: '{name}' holds {token!r}, which stands for the image: take it out"
                    )

    @cached_property
    def image_tokens(self) -> list[str]:
        """The image's token in a text and, where it is another (Gemma 3), the one that it is replaced by."""
        tokens = [getattr(owner, "image_token", None) for owner in (self.processor, self.processor.tokenizer)]
        return [token for token in dict.fromkeys(tokens) if token]


class SFTCollator:
    """Makes an `SFTBatch` of samples.

    Args:
        max_length: most tokens of a sample, image tokens included.
        on_too_long: "raise" names the sample; "skip" leaves it out of the batch and lists it in `skipped`.
    """

    def __init__(self, chat: ChatFormat, max_length: int, on_too_long: TooLong = "raise") -> None:
        self.chat = chat
        self.max_length = max_length
        self.on_too_long = on_too_long

    def __call__(self, samples: Sequence[Sample]) -> SFTBatch:
        if not samples:
            none = torch.zeros((0, 0), dtype=torch.int64)
            return SFTBatch({}, none, none.bool(), torch.zeros(0), torch.zeros(0).bool(), (), ())
        spans = [self.chat.response_spans(s) for s in samples]
        inputs = self.chat.inputs_of(samples, [text for text, _, _ in spans], "right")
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        fit, skipped = fitting(samples, lengths, self.max_length, self.on_too_long)
        if skipped:
            return self(fit)._replace(skipped=skipped)
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        confidence_mask = torch.zeros(labels.shape, dtype=torch.bool)
        for row, (length, (_, response, answer_length)) in enumerate(zip(lengths, spans, strict=True)):
            start = length - len(response)
            ids = torch.tensor(response)
            if not torch.equal(inputs["input_ids"][row, start:length], ids):
                raise DataError(
                    f"record {samples[row].query.id!r}: {type(self.chat.processor).__name__} changes the text behind "
                    "the image, so the response's tokens cannot be told from the prompt's"
                )
            if self.chat.layout.response_type is not None:
                inputs["token_type_ids"][row, start:length] = self.chat.layout.response_type
            kept = self.chat.through_end(response, answer_length)
            labels[row, start : start + kept] = ids[:kept]
            confidence_mask[row, start + answer_length : start + kept] = True
        return SFTBatch(
            inputs,
            labels,
            confidence_mask,
            torch.tensor([s.confidence for s in samples], dtype=torch.float32),
            torch.tensor([s.wrong_answer is None for s in samples]),
            tuple(s.query for s in samples),
            (),
        )


def fitting(
    samples: Sequence[Sample], lengths: Sequence[int], max_length: int, on_too_long: TooLong
) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples that are not too long, and the ids of the others.

    Raises:
        DataError: a sample is too long, and that is not to be skipped.
    """
    long = {i for i, n in enumerate(lengths) if n > max_length}
    if long and on_too_long == "raise":
        first = min(long)
        raise DataError(
            f"record {samples[first].query.id!r}: {lengths[first]} tokens, more than max_length {max_length}: "
            "raise data.max_length, or leave such records out with `data.on_too_long: skip`"
        )
    kept = [s for i, s in enumerate(samples) if i not in long]
    return kept, tuple(samples[i].query.id for i in sorted(long))


class PromptCollator:
    """Makes a `PromptBatch` of samples; without inputs where there are none.

    Args:
        grading: how the answers are to be graded.
    """

    def __init__(self, chat: ChatFormat, grading: Grading = EXACT) -> None:
        self.chat = chat
        self.grading = grading

    def __call__(self, samples: Sequence[Sample]) -> PromptBatch:
        if not samples:
            return PromptBatch({}, (), (), (), self.grading)
        for sample in samples:
            self.chat.check(sample.query)
        ranking = any(self.grading.ranks(s.query.answer_type) for s in samples)
        texts = [self.chat.render(s.query.question) for s in samples]
        return PromptBatch(
            self.chat.inputs_of(samples, texts, "left"),
            tuple(s.query for s in samples),
            tuple(s.step for s in samples),
            tuple(s.confidence for s in samples),
            self.grading,
            tuple(self._ranked(s) for s in samples) if ranking else (),
        )

    def _ranked(self, sample: Sample) -> RankedAnswers:
        query = sample.query
        wrong = sample.wrong if self.grading.ranks(query.answer_type) else ()
        self.chat.check(query, wrong)
        texts = self.chat.conversations(query.question, [render_answer(a) for a in (query.answer, *wrong)])
        cut, tokens = self.chat.behind_prompt(self.chat.render(query.question), texts)
        return RankedAnswers(cut, tuple(tuple(self._of_answer(ids)) for ids in tokens))

    def _of_answer(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens in front of the end of the turn."""
        end = self.chat.through_end(ids, 1)
        return ids[: end - 1] if ids[end - 1] in self.chat.special_ids else ids[:end]
