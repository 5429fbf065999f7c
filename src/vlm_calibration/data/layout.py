"""Text formats of conversations: a processor's chat template, or PaliGemma's only format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from transformers import PaliGemmaProcessor

from vlm_calibration.records import DataError

Side = Literal["left", "right"]
QUESTION, RESPONSE = "QUESTION1", "RESPONSE2"
"""Probe texts that templates leave unchanged."""


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class TemplateOffsets(NamedTuple):
    """Differences between a template's generation prompt and its full conversation, in characters.

    The conversation omits `prompt_only` at the end of the prompt and has `conversation_only` in their place. `open_tail` is the white
    space after a response whose turn the template leaves open; None if it ends the turn.
    """

    prompt_only: int
    conversation_only: int
    open_tail: int | None


class TemplateLayout:
    """Conversations in the format of the processor's chat template.

    The text before a response is exactly the generation prompt, which the model reads before it answers, even if the template writes a
    given response differently; and every response ends its turn, so that the model learns to stop.
    """

    response_type: int | None = None
    """Token type of a response's tokens; None if token types do not mark the response."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def render(self, prompt: str, response: str | None) -> str:
        """Text with one image token: up to where the model's answer begins, or with a response and the end of its turn."""
        if response is None:
            return self._apply(prompt, None)
        text, offsets = self._apply(prompt, response), self._offsets
        if offsets.prompt_only or offsets.conversation_only:
            before = self._apply(prompt, None)
            text = before + text[len(before) - offsets.prompt_only + offsets.conversation_only :]
        if offsets.open_tail is not None:
            text = text[: len(text) - offsets.open_tail] + (self.processor.tokenizer.eos_token or "")
        return text

    def _apply(self, prompt: str, response: str | None) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None
        )

    @cached_property
    def _offsets(self) -> TemplateOffsets:
        prompt, conversation = self._apply(QUESTION, None), self._apply(QUESTION, RESPONSE)
        shared = common_prefix(prompt, conversation)
        start = conversation.rfind(RESPONSE)
        if start < 0:  # the template rewrites responses, so they cannot be located
            return TemplateOffsets(0, 0, None)
        if QUESTION in conversation[shared:]:
            raise DataError(
                f"the chat template of {type(self.processor).__name__} writes a question differently in a prompt and in a "
                "conversation with its answer: use another template as `chat_template.jinja`"
            )
        # A conversation that continues the prompt replaces nothing of it.
        conversation_only = start - shared if shared < len(prompt) else 0
        tail = conversation[start + len(RESPONSE) :]
        return TemplateOffsets(len(prompt) - shared, conversation_only, None if tail.strip() else len(tail))

    def adds_special(self, text: str) -> bool:
        """Whether the tokenizer must add special tokens to a rendered text."""
        # Many templates write the begin-of-sequence token themselves, and it must not appear twice.
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def inputs(self, texts: list[str], images: list[Any], side: Side) -> dict[str, torch.Tensor]:
        """Padded model inputs of rendered texts with one image each."""
        batch = self.processor(
            text=texts,
            images=[[image] for image in images],
            padding=True,
            padding_side=side,
            truncation=False,
            add_special_tokens=self.adds_special(texts[0]),
            return_tensors="pt",
        )
        return dict(batch)


class PaliGemmaLayout:
    """PaliGemma's format (arXiv 2407.07726): image, begin of sequence, prompt, line break, response, end of sequence.

    Attention is bidirectional over image and prompt and causal over the response, which has its own token type. The
    processor takes a response only as its `suffix`, so its tokenizer and image processor are called directly.
    """

    response_type: int | None = 1

    def __init__(self, processor: PaliGemmaProcessor) -> None:
        self.processor = processor

    def render(self, prompt: str, response: str | None) -> str:
        tokenizer = self.processor.tokenizer
        text = f"{self.processor.image_token}{tokenizer.bos_token}{prompt}\n"
        return text if response is None else f"{text}{response}{tokenizer.eos_token}"

    def adds_special(self, text: str) -> bool:
        return False

    def inputs(self, texts: list[str], images: list[Any], side: Side) -> dict[str, torch.Tensor]:
        image_token = self.processor.image_token
        expanded = [t.replace(image_token, image_token * self.processor.image_seq_length, 1) for t in texts]
        batch = self.processor.tokenizer(
            expanded,
            padding=True,
            padding_side=side,
            truncation=False,
            add_special_tokens=False,
            return_tensors="pt",
        )
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        return {**batch, **pixels, "token_type_ids": torch.zeros_like(batch["input_ids"])}


Layout = TemplateLayout | PaliGemmaLayout


def layout_of(processor: Any) -> Layout:
    """The text format of a processor's conversations; raises a DataError if it needs a chat template and has none."""
    if isinstance(processor, PaliGemmaProcessor):
        return PaliGemmaLayout(processor)
    if getattr(processor, "chat_template", None) is None:
        raise DataError(f"{type(processor).__name__} has no chat template: add one as `chat_template.jinja`")
    return TemplateLayout(processor)
