"""How a conversation is written down: by a processor's chat template, or in the one form that PaliGemma knows.

What a template writes where it asks for an answer is what a model reads before it answers, so training has just that in
front of the response, whatever the template writes in front of one that is given. And every response ends its turn, so that
the model learns to stop, whether or not the template says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from transformers import PaliGemmaProcessor

from vlm_calibration.records import DataError

Side = Literal["left", "right"]
QUESTION, RESPONSE = "QUESTION1", "RESPONSE2"
"""Text that no template changes."""


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class Layout(Protocol):
    """What is needed of a way to write conversations.

    response_type: the type of token that a response has, None where types are not about that.
    """

    response_type: int | None

    def render(self, prompt: str, response: str | None) -> str:
        """Text with one image token: up to where the model is to answer, or with the response and the end of its turn."""

    def adds_special(self, text: str) -> bool:
        """Whether the tokenizer is to add special tokens to rendered text."""

    def inputs(self, texts: list[str], images: list[Any], side: Side) -> dict[str, torch.Tensor]:
        """Padded model inputs of rendered texts and one image each."""


def layout_of(processor: Any) -> Layout:
    """The layout of a processor's conversations.

    Raises:
        DataError: it has no chat template and needs one.
    """
    if isinstance(processor, PaliGemmaProcessor):
        return PaliGemmaLayout(processor)
    if getattr(processor, "chat_template", None) is None:
        raise DataError(f"{type(processor).__name__} has no chat template: give one as `chat_template.jinja`")
    return TemplateLayout(processor)


class TemplateOffsets(NamedTuple):
    """Where a template's conversation is not to be taken as it is, in characters.

    prompted: with which the prompt ends and the conversation does not go on. begun: with which it goes on instead. tail:
    of blank behind a response whose turn the template leaves open, None where it ends the turn.
    """

    prompted: int
    begun: int
    tail: int | None


class TemplateLayout:
    """Conversations in the words of the processor's chat template."""

    response_type: int | None = None

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def render(self, prompt: str, response: str | None) -> str:
        if response is None:
            return self._apply(prompt, None)
        text, turn = self._apply(prompt, response), self._turn
        if turn.prompted or turn.begun:
            asked = self._apply(prompt, None)
            text = asked + text[len(asked) - turn.prompted + turn.begun :]
        if turn.tail is not None:
            text = text[: len(text) - turn.tail] + (self.processor.tokenizer.eos_token or "")
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
    def _turn(self) -> TemplateOffsets:
        asked, answered = self._apply(QUESTION, None), self._apply(QUESTION, RESPONSE)
        shared = common_prefix(asked, answered)
        start = answered.rfind(RESPONSE)
        if start < 0:  # rewritten by the template, so nothing is known of what is around it
            return TemplateOffsets(0, 0, None)
        if QUESTION in answered[shared:]:
            raise DataError(
                f"the chat template of {type(self.processor).__name__} writes a question in one way where it asks for an "
                "answer and in another where there is one: give another template as `chat_template.jinja`"
            )
        # Of a prompt that the conversation continues nothing is replaced.
        begun = start - shared if shared < len(asked) else 0
        tail = answered[start + len(RESPONSE) :]
        return TemplateOffsets(len(asked) - shared, begun, None if tail.strip() else len(tail))

    def adds_special(self, text: str) -> bool:
        # Many templates write the begin-of-sequence token themselves; it must not come twice.
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def inputs(self, texts: list[str], images: list[Any], side: Side) -> dict[str, torch.Tensor]:
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
    """PaliGemma's form (arXiv 2407.07726): image, begin of sequence, prompt, line break, response, end of sequence.

    Image and prompt are read in both directions, the response from left to right, which its tokens' type says. The
    processor would write this form itself and tell the response only from a `suffix`; here it gets it written.
    """

    response_type: int | None = 1

    def __init__(self, processor: PaliGemmaProcessor) -> None:
        self.processor = processor

    def render(self, prompt: str, response: str | None) -> str:
        tokenizer = self.processor.tokenizer
        asked = f"{self.processor.image_token}{tokenizer.bos_token}{prompt}\n"
        return asked if response is None else f"{asked}{response}{tokenizer.eos_token}"

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
