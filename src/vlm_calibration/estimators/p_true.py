"""P(True): the model is asked whether its own answer is true."""

from __future__ import annotations

import torch

from vlm_calibration.data.collate import ChatFormat, common_prefix
from vlm_calibration.estimators.answer_scoring import score_counted, strip_common_suffix
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.models.shared_prefix import Prompts, append_tokens
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import ElicitationPrompt, check_template

TEMPLATE = (
    "Question: {question}\nProposed answer: {answer}\nIs the proposed answer true or false?\n"
    "Answer with True or False only."
)


class PTrue(Estimator):
    """The probability of "True" against "False" as the answer to a question about the answer (Kadavath et al., arXiv 2207.05221).

    It is meaningful for models that follow instructions; a model that was trained on one form of question answers at random.

    Args:
        template: the question about the answer, with the placeholders `{question}` and `{answer}`, see `check_template`.
        true: the response that affirms the answer.
        false: the response that denies it.

    Raises:
        DataError: a wrong template, or the two responses are the same.
    """

    name = "p_true"

    def __init__(self, template: str = TEMPLATE, true: str = "True", false: str = "False") -> None:
        check_template(template, "PTrue.template", "question", "answer")
        if not true.strip() or not false.strip() or true.strip() == false.strip():
            raise DataError(f"PTrue needs two different answers, found {true!r} and {false!r}")
        self.template, self.true, self.false = template, true, false

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        pairs = zip(answered.batch.queries, answered.answers, strict=True)
        follow_ups = [self._follow_up(answered.chat, query, answer or "-") for query, answer in pairs]
        cuts, suffixes, response_cuts, responses = (list(column) for column in zip(*follow_ups, strict=True))
        inputs, lengths = answered.prompts
        cut, response_cut = (torch.tensor(n, device=lengths.device) for n in (cuts, response_cuts))
        inputs = append_tokens(Prompts(inputs, lengths - cut), suffixes)
        prompts = Prompts(inputs, inputs["attention_mask"].sum(1) - response_cut)
        scores, passes = score_counted(answered.model, prompts, responses, answered.cache, lengths - cut)
        p = torch.softmax(scores.total.double(), -1)[:, 0].tolist()
        rated = zip(p, answered.answers, strict=True)
        return Estimate([value if answer is not None else None for value, answer in rated], passes)

    def _follow_up(
        self, chat: ChatFormat, query: Query, answer: str
    ) -> tuple[int, list[int], int, tuple[list[int], list[int]]]:
        """The prompt about an answer, as an edit of the prompt that was answered.

        How many tokens at its end are replaced, by which, how many of these the responses replace (mostly 0), and the tokens of both.
        """
        plain_chat = ChatFormat(chat.processor, ElicitationPrompt("{question}"))
        text = self.template.format(question=query.question, answer=answer)
        prompt = plain_chat.render(text)
        first, second = chat.token_ids([chat.render(query.question), prompt])
        shared = common_prefix(first, second)
        token = getattr(chat.processor, "image_token", None)
        image = None if token is None else chat.processor.tokenizer.convert_tokens_to_ids(token)
        if image in first[shared:] or image in second[shared:]:
            raise DataError(
                f"record {query.id!r}: p_true needs the image before the question, but the chat template of "
                f"{type(chat.processor).__name__} puts the question before it"
            )
        texts = plain_chat.conversations(text, [self.true, self.false])
        response_cut, (true, false) = plain_chat.after_prompt(prompt, texts)
        if true == false:
            raise DataError(f"p_true: the tokenizer maps {self.true!r} and {self.false!r} to the same tokens")
        return len(first) - shared, second[shared:], response_cut, strip_common_suffix(true, false)
