"""P(True): the model is shown its own answer and asked whether it is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.layout import common_prefix
from vlm_calibration.estimators.answer_scoring import right_padded, score_counted, strip_common_suffix
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.prompts import ElicitationPrompt

TEMPLATE = (
    "Question: {question}\nProposed answer: {answer}\nIs the proposed answer true or false?\n"
    "Answer with True or False only."
)


class _FollowUp(NamedTuple):
    """cut: tokens of the first prompt's end that the follow-up does not share. behind: what it has in their place.

    unshared: how many tokens at the end of that the responses do not share. responses: token ids of true and false.
    """

    cut: int
    behind: list[int]
    unshared: int
    responses: tuple[list[int], list[int]]


class PTrue(Estimator):
    """The probability of "True" against "False" as the answer to a question about the answer (Kadavath et al., arXiv 2207.05221).

    The same image, with a prompt of its own. It means something of models that follow instructions; one that knows only the
    form of its own training answers at random.

    Args:
        template: the question, with the placeholders `{question}` and `{answer}`.
        true, false: the answers to it.

    Raises:
        DataError: a template without these placeholders or with others, or two answers that are the same.
    """

    name = "p_true"

    def __init__(self, template: str = TEMPLATE, true: str = "True", false: str = "False") -> None:
        try:
            filled = template.format(question="\0", answer="\1")
        except (LookupError, ValueError, AttributeError) as error:
            raise DataError(
                f"PTrue.template {template!r}: only {{question}} and {{answer}} can be filled in"
            ) from error
        if "\0" not in filled or "\1" not in filled:
            raise DataError(f"PTrue.template {template!r} needs both {{question}} and {{answer}}")
        if not true.strip() or not false.strip() or true.strip() == false.strip():
            raise DataError(f"PTrue needs two different answers, found {true!r} and {false!r}")
        self.template = template
        self.true = true
        self.false = false

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        pairs = zip(answered.batch.queries, answered.answers, strict=True)
        asked = [self._follow_up(answered.chat, query, answer or "-") for query, answer in pairs]
        inputs = answered.batch.inputs
        prompts = right_padded(inputs, [f.cut for f in asked], [f.behind for f in asked])
        cut, unshared = (
            torch.tensor(n, device=prompts.lengths.device)
            for n in ([f.cut for f in asked], [f.unshared for f in asked])
        )
        kept = inputs["attention_mask"].sum(1) - cut
        prompts = prompts._replace(lengths=prompts.lengths - unshared)
        responses = [f.responses for f in asked]
        scores, passes = score_counted(answered.model, prompts, responses, answered.known, kept)
        p = torch.softmax(scores.total.double(), -1)[:, 0].tolist()
        return Estimate(
            [
                value if answer is not None else None
                for value, answer in zip(p, answered.answers, strict=True)
            ],
            passes,
        )

    def _follow_up(self, chat: ChatFormat, query: Query, answer: str) -> _FollowUp:
        asking = ChatFormat(chat.processor, ElicitationPrompt("{question}"))
        text = self.template.format(question=query.question, answer=answer)
        prompt = asking.render(text)
        first, second = chat.token_ids([chat.render(query.question), prompt])
        shared = common_prefix(first, second)
        image = _image_id(chat.processor)
        if image in first[shared:] or image in second[shared:]:
            raise DataError(
                f"record {query.id!r}: p_true cannot follow on the image, since the chat template of "
                f"{type(chat.processor).__name__} puts the question before it"
            )
        texts = asking.conversations(text, [self.true, self.false])
        unshared, (true, false) = asking.after_prompt(prompt, texts)
        if true == false:
            raise DataError(f"p_true: the tokenizer cannot tell {self.true!r} from {self.false!r}")
        return _FollowUp(len(first) - shared, second[shared:], unshared, strip_common_suffix(true, false))


def _image_id(processor: Any) -> int | None:
    token = getattr(processor, "image_token", None)
    return None if token is None else processor.tokenizer.convert_tokens_to_ids(token)
