"""Conversations as text and tokens (`ChatFormat`), and the batches of supervised fine-tuning and of generation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import PaliGemmaProcessor

from vlm_calibration.data.noise import ImageCopy, Sample
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import ElicitationPrompt, render_answer, render_response
from vlm_calibration.text.grading import EXACT, Grading

TooLong = Literal["raise", "skip"]
Side = Literal["left", "right"]


class SFTBatch(NamedTuple):
    """B conversations with the response to learn, padded on the right.

    Attributes:
        inputs: arguments of the model's forward (input_ids int64 [B, L], pixel_values, ...); empty if no sample is left.
        labels: int64 [B, L], the token id at each response token, IGNORE elsewhere.
        confidence_mask: bool [B, L], where a label belongs to the stated confidence and not to the answer.
        confidence: float32 [B] in [0, 1], the confidence to state.
        is_correct: bool [B], whether the response gives the gold answer.
        skipped: ids of the samples that were too long.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    confidence_mask: torch.Tensor
    confidence: torch.Tensor
    is_correct: torch.Tensor
    queries: tuple[Query, ...]
    skipped: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> SFTBatch:
        names = ("labels", "confidence_mask", "confidence", "is_correct")
        moved = {name: getattr(self, name).to(device) for name in names}
        return self._replace(inputs=move(self.inputs, device), **moved)


class RankedAnswers(NamedTuple):
    """The answers to rank as token ids, which replace `cut` tokens at the end of the prompt: the gold one, then each wrong one."""

    cut: int
    tokens: tuple[tuple[int, ...], ...]


class CopiedPrompts(NamedTuple):
    """Arguments of `generate`, in main memory, for the queries with indices `rows`, whose images have a perturbed copy."""

    rows: tuple[int, ...]
    inputs: dict[str, torch.Tensor]


class PromptBatch(NamedTuple):
    """B prompts to answer, padded on the left.

    Attributes:
        inputs: arguments of `generate` (input_ids int64 [B, L], ...); empty without queries, or if no model here answers.
        queries: the B queries, and for each of them:
        perturbations: what happened to its image.
        noise_steps: the diffusion step of its noise; None for other kinds of perturbation.
        levels: the confidence in [0, 1] of its perturbation.
        grading: rule that grades the answers; None: gold answers are not known.
        ranked: the answers to rank; empty without any.
        copies: the prompts with each perturbed copy of the images.
        epochs: the epoch that it is drawn in.
        skipped: ids of the samples that were too long.
        images: its image, uint8 [H, W, 3]; empty unless an endpoint answers.
    """

    inputs: dict[str, torch.Tensor]
    queries: tuple[Query, ...]
    perturbations: tuple[Perturbation, ...]
    noise_steps: tuple[int | None, ...]
    levels: tuple[float, ...]
    grading: Grading | None = EXACT
    ranked: tuple[RankedAnswers, ...] = ()
    copies: Mapping[ImageCopy, CopiedPrompts] = {}
    epochs: tuple[int, ...] = ()
    skipped: tuple[str, ...] = ()
    images: tuple[np.ndarray, ...] = ()

    def to(self, device: torch.device | str) -> PromptBatch:
        """Move the inputs to a device; copies, which are many, are moved when each is used."""
        return self._replace(inputs=move(self.inputs, device))


def move(inputs: Mapping[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {k: v.to(device, non_blocking=True) for k, v in inputs.items()}


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class ChatFormat:
    """Renders conversations in the format of a processor's chat template, and tokenizes them; a DataError if it has none.

    The text before a response is exactly the generation prompt, which the model reads before it answers, even if the template writes a
    given response differently; and every response ends its turn, so that the model learns to stop.

    PaliGemma's format (arXiv 2407.07726) is image, begin of sequence, prompt, line break, response, end of sequence. Attention is
    bidirectional over image and prompt and causal over the response, which has its own token type. The processor takes a response
    only as its `suffix`, so its tokenizer and image processor are called directly.
    """

    def __init__(self, processor: Any, prompt: ElicitationPrompt) -> None:
        self.processor, self.prompt = processor, prompt
        self.is_paligemma = isinstance(processor, PaliGemmaProcessor)
        if not self.is_paligemma and getattr(processor, "chat_template", None) is None:
            name = type(processor).__name__
            raise DataError(f"{name} has no chat template: add one as `chat_template.jinja`")

    def render(self, question: str, response: str | None = None) -> str:
        """Text with one image token, to the end of the prompt, or of the turn of a response."""
        prompt = self.prompt.render(question)
        text = self._apply(prompt, response)
        if response is None:
            return text
        prompt_only, conversation_only, open_tail = self._offsets
        if prompt_only or conversation_only:
            before = self._apply(prompt, None)
            text = before + text[len(before) - prompt_only + conversation_only :]
        if open_tail is not None:
            text = text[: len(text) - open_tail] + (self.processor.tokenizer.eos_token or "")
        return text

    def _apply(self, prompt: str, response: str | None) -> str:
        tokenizer = self.processor.tokenizer
        if self.is_paligemma:
            text = f"{self.processor.image_token}{tokenizer.bos_token}{prompt}\n"
            return text if response is None else f"{text}{response}{tokenizer.eos_token}"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        is_prompt = response is None
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)

    @cached_property
    def _offsets(self) -> tuple[int, int, int | None]:
        """How a template's conversation differs from its prompt, in characters.

        How many it omits at the end of the prompt, how many it has in their place, and the length of the white space after a response
        whose turn the template leaves open; None if it ends the turn.
        """
        question, response = "QUESTION1", "RESPONSE2"  # which templates leave unchanged
        prompt, conversation = self._apply(question, None), self._apply(question, response)
        shared = common_prefix(prompt, conversation)
        start = conversation.rfind(response)
        if start < 0:  # the template rewrites responses, so they cannot be located
            return 0, 0, None
        if question in conversation[shared:]:
            differs = "writes a question differently in a prompt and in a conversation with its answer"
            advice = "use another template as `chat_template.jinja`"
            raise DataError(f"the chat template of {type(self.processor).__name__} {differs}: {advice}")
        # A conversation that continues the prompt replaces nothing of it.
        conversation_only = start - shared if shared < len(prompt) else 0
        tail = conversation[start + len(response) :]
        return len(prompt) - shared, conversation_only, None if tail.strip() else len(tail)

    def conversations(self, question: str, responses: Sequence[str]) -> list[str]:
        """`render` with each response; a template that inserts text unchanged runs for the first and last alone."""
        first, last = (self.render(question, responses[i]) for i in (0, -1))
        if first.count(responses[0]) == 1:
            before, after = first.split(responses[0])
            if last == before + responses[-1] + after:
                return [before + r + after for r in responses]
        return [self.render(question, r) for r in responses]

    def _adds_special(self, text: str) -> bool:
        # Many templates write the begin-of-sequence token themselves, and it must not appear twice.
        bos = self.processor.tokenizer.bos_token
        return not (self.is_paligemma or (bos and text.startswith(bos)))

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered conversations, with image tokens not expanded."""
        return self.processor.tokenizer(texts, add_special_tokens=self._adds_special(texts[0]))["input_ids"]

    # Processors expand the image token before the response, so positions are counted from the end.
    def after_prompt(self, prompt: str, conversations: Sequence[str]) -> tuple[int, list[list[int]]]:
        """How many tokens at the end of the prompt the conversations replace (mostly 0), and their token ids from there on."""
        first, *full = self.token_ids([prompt, *conversations])
        start = min(common_prefix(first, ids) for ids in full)
        return len(first) - start, [ids[start:] for ids in full]

    def inputs(self, texts: list[str], images: list[Any], side: Side) -> dict[str, torch.Tensor]:
        """Padded model inputs of rendered texts with one image each; nothing is truncated."""
        settings = {"padding": True, "padding_side": side, "truncation": False, "return_tensors": "pt"}
        settings["add_special_tokens"] = self._adds_special(texts[0])
        if not self.is_paligemma:
            return dict(self.processor(text=texts, images=[[image] for image in images], **settings))
        image_token = self.processor.image_token
        expanded = [t.replace(image_token, image_token * self.processor.image_seq_length, 1) for t in texts]
        batch = self.processor.tokenizer(expanded, **settings)
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        return {**batch, **pixels, "token_type_ids": torch.zeros_like(batch["input_ids"])}

    def inputs_of(self, samples: Sequence[Sample], texts: list[str], side: Side) -> dict[str, torch.Tensor]:
        """`inputs` of samples and their rendered texts; a sample that the processor rejects is named by a DataError."""
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
        """The conversation as text, the token ids after its prompt, and how many of these are the answer."""
        question = sample.query.question
        stated = self.render(question, render_response(sample.answer, sample.confidence))
        bare = self.render(question, render_answer(sample.answer))
        _, (response, answer) = self.after_prompt(self.render(question), [stated, bare])
        return stated, response, common_prefix(answer, response)

    def turn_length(self, response: Sequence[int], answer_length: int) -> int:
        """Number of tokens through the end of the turn, the first special token after the answer; the model learns to stop by it."""
        after_answer = enumerate(response[answer_length:], start=answer_length)
        return next((i + 1 for i, token in after_answer if token in self.special_ids), len(response))

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids of the tokenizer's special tokens, including the end of the turn."""
        tokenizer = self.processor.tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        return special | {tokenizer.eos_token_id}

    def check(self, query: Query, answers: Sequence[str] = ()) -> None:
        """A DataError if the question, its answer or one of `answers` contains a token that stands for the image."""
        # The placeholder of the image in a text and, where it differs (Gemma 3), the token it is expanded to.
        tokens = [getattr(owner, "image_token", None) for owner in (self.processor, self.processor.tokenizer)]
        texts = [("question", query.question), ("answer", query.answer)]
        for name, text in [*texts, *(("wrong answer", a) for a in answers)]:
            if token := next((t for t in tokens if t and t in text), None):
                what = f"holds {token!r}, which stands for the image: take it out"
                raise DataError(f"record {query.id!r}: '{name}' {what}")


@dataclass
class SFTCollator:
    """Collates samples into an `SFTBatch`.

    One sample becomes (`_` is IGNORE)::

        input_ids        <user> <image> Dog? <assistant> Yes . Confidence : 80 % <end> <pad>
        labels           _      _       _    _           Yes . Confidence : 80 % <end> _
        confidence_mask  0      0       0    0           0   0 1          1 1  1 1     0

    Args:
        max_length: limit of a sample in tokens, expanded image tokens included.
        on_too_long: "raise" an error that names the sample, or "skip" it and list it in `skipped`.
    """

    chat: ChatFormat
    max_length: int
    on_too_long: TooLong = "raise"

    def __call__(self, samples: Sequence[Sample]) -> SFTBatch:
        if not samples:
            empty = torch.zeros((0, 0), dtype=torch.int64)
            return SFTBatch({}, empty, empty.bool(), torch.zeros(0), torch.zeros(0).bool(), ())
        spans = [self.chat.response_spans(s) for s in samples]
        inputs = self.chat.inputs_of(samples, [text for text, _, _ in spans], "right")
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        fitting, skipped = split_too_long(samples, lengths, self.max_length, self.on_too_long)
        if skipped:
            return self(fitting)._replace(skipped=skipped)
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        confidence_mask = torch.zeros(labels.shape, dtype=torch.bool)
        for row, (length, (_, response, answer_length)) in enumerate(zip(lengths, spans, strict=True)):
            start, ids = length - len(response), torch.tensor(response)
            if not torch.equal(inputs["input_ids"][row, start:length], ids):
                problem = f"{type(self.chat.processor).__name__} changes the text after the image"
                name = samples[row].query.id
                raise DataError(f"record {name!r}: {problem}, so the response's tokens cannot be located")
            if self.chat.is_paligemma:
                inputs["token_type_ids"][row, start:length] = 1
            learned = self.chat.turn_length(response, answer_length)
            labels[row, start : start + learned] = ids[:learned]
            confidence_mask[row, start + answer_length : start + learned] = True
        confidence = torch.tensor([s.confidence for s in samples], dtype=torch.float32)
        is_correct = torch.tensor([s.wrong_answer is None for s in samples])
        queries = tuple(s.query for s in samples)
        return SFTBatch(inputs, labels, confidence_mask, confidence, is_correct, queries)


def split_too_long(
    samples: Sequence[Sample], lengths: Sequence[int], max_length: float, on_too_long: TooLong
) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples of at most `max_length` tokens, and the ids of the others; under "raise" a DataError names the first."""
    if (too_long := [i for i, n in enumerate(lengths) if n > max_length]) and on_too_long == "raise":
        first = too_long[0]
        raise DataError(
            f"record {samples[first].query.id!r}: {lengths[first]} tokens, more than max_length {max_length}: "
            "raise data.max_length, shrink large images by data.max_pixels, or skip such records with `data.on_too_long: skip`"
        )
    fitting = [s for s, n in zip(samples, lengths, strict=True) if n <= max_length]
    return fitting, tuple(samples[i].query.id for i in too_long)


@dataclass
class PromptCollator:
    """Collates samples into a `PromptBatch`, without inputs if `chat` is None, with the images if `keep_images`.

    With `ranks` it has the answers to rank of open queries. `max_length` limits a prompt; the rest is as in `SFTCollator`.
    """

    chat: ChatFormat | None
    grading: Grading | None = EXACT
    max_length: float = math.inf
    on_too_long: TooLong = "raise"
    keep_images: bool = False
    ranks: bool = False

    def __call__(self, samples: Sequence[Sample]) -> PromptBatch:
        batch = PromptBatch(
            {},
            tuple(s.query for s in samples),
            tuple(s.perturbation for s in samples),
            tuple(s.noise_step for s in samples),
            tuple(s.confidence for s in samples),
            self.grading,
            epochs=tuple(s.epoch for s in samples),
            images=tuple(s.image for s in samples) if self.keep_images else (),
        )
        if (chat := self.chat) is None or not samples:
            return batch
        for sample in samples:
            chat.check(sample.query)
        texts = [chat.render(s.query.question) for s in samples]
        inputs = chat.inputs_of(samples, texts, "left")
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        fitting, skipped = split_too_long(samples, lengths, self.max_length, self.on_too_long)
        if skipped:
            return self(fitting)._replace(skipped=skipped)
        if self.ranks and any(s.query.answer_type == "open" for s in samples):
            batch = batch._replace(ranked=tuple(_ranked(chat, s) for s in samples))
        copies = {}
        for copy in samples[0].copies:
            images = {row: image for row, s in enumerate(samples) if (image := s.copies[copy]) is not None}
            changed = [samples[row]._replace(image=image) for row, image in images.items()]
            copied = chat.inputs_of(changed, [texts[row] for row in images], "left") if changed else {}
            copies[copy] = CopiedPrompts(tuple(images), copied)
        return batch._replace(inputs=inputs, copies=copies)


def _ranked(chat: ChatFormat, sample: Sample) -> RankedAnswers:
    query = sample.query
    wrong = sample.wrong if query.answer_type == "open" else ()
    texts = chat.conversations(query.question, [render_answer(a) for a in (query.answer, *wrong)])
    cut, answers = chat.after_prompt(chat.render(query.question), texts)
    tokens = []
    for ids in answers:
        end = chat.turn_length(ids, 1)
        tokens.append(tuple(ids[: end - 1] if ids[end - 1] in chat.special_ids else ids[:end]))
    return RankedAnswers(cut, tuple(tokens))
