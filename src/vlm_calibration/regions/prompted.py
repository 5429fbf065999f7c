"""A describer that prompts a VLM: slower than rules, but not limited to known question forms or to English."""

import re
from collections.abc import Sequence

import numpy as np
import torch

from vlm_calibration.data.collate import ChatFormat, move
from vlm_calibration.data.module import load_processor
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError, Query
from vlm_calibration.regions.describer import Describer, Description
from vlm_calibration.text.confidence import ElicitationPrompt

DEFAULT_TEMPLATE = """Question about the image: {question}
Correct answer: {answer}
Which objects does one have to see in the image to answer? List short noun phrases, separated by commas, without any other words. \
Put the word "absent" before each object that the answer says is not there. If there are none, write "none"."""

_MARKER = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s*")
_ABSENT = re.compile(r"^(?:absent|no|not)\b[\s:]*|\s*\((?:absent|not there|not present)\)$")


class PromptedDescriber(Describer):
    """Prompts a vision-language model with the image, and parses the list that it generates.

    Args:
        base: the model.
        template: prompt with the placeholders {question} and {answer}.
        max_new_tokens: length limit of the list.
        max_phrases: maximum number of objects per query; the first ones listed are taken.
    """

    def __init__(
        self,
        base: BaseModel,
        template: str = DEFAULT_TEMPLATE,
        max_new_tokens: int = 64,
        max_phrases: int = 8,
    ) -> None:
        super().__init__(max_phrases)
        try:
            template.format(question="", answer="")
        except (LookupError, ValueError) as error:
            rule = "the only placeholders are {question} and {answer}"
            raise DataError(f"describer.template: {rule}: {error!r}") from error
        self.base, self.template, self.max_new_tokens = base, template, max_new_tokens

    def load(self, device: torch.device) -> None:
        processor = load_processor(self.base.name_or_path, self.base.revision, self.base.trust_remote_code)
        self.chat = ChatFormat(processor, ElicitationPrompt("{question}"))
        model = load_base(self.base, device)
        self.model = model if self.base.quantization != "none" else model.to(device)

    def describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        if not queries:
            return []
        prompts = [self.template.format(question=q.question, answer=q.answer) for q in queries]
        texts = [self.chat.render(prompt) for prompt in prompts]
        inputs = move(self.chat.inputs(texts, list(images), "left"), self.model.device)
        answers = generate(self.model, inputs, self.chat.processor.tokenizer, self.max_new_tokens).texts
        return [self.parse(answer) for answer in answers]

    def parse(self, answer: str) -> Description:
        """Parse a list of objects: separated by commas or lines, numbered or not, with "absent" in front or behind."""
        objects: list[str] = []
        absent: list[str] = []
        for part in re.split(r"[,;\n]", answer):
            phrase = _MARKER.sub("", part).strip(" .\"'`*").lower()
            name = re.sub(r"^(?:an?|the)\s+", "", _ABSENT.sub("", phrase).strip())
            # Detectors are not trained on more than eight words, which are a sentence.
            if name and name not in ("none", "nothing") and len(name.split()) <= 8:
                (absent if _ABSENT.search(phrase) else objects).append(name)
        return self.build_description(objects, absent)
