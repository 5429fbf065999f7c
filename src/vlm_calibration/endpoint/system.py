"""An endpoint as a `System`."""

import base64
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any

from PIL import Image

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.endpoint.client import Client, Endpoint, RefusedError, Response, Token
from vlm_calibration.estimators.base import Estimate, Estimator, System, SystemAnswers, grade_answers
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import EXPECTED
from vlm_calibration.estimators.probes import Probe
from vlm_calibration.estimators.verbal import rounded
from vlm_calibration.records import VERBALIZED, Prediction
from vlm_calibration.text.confidence import (
    ElicitationPrompt,
    end_of_confidence,
    parse_confidence,
    render_answer,
    strip_confidence,
)

PERCENTS = range(101)
FOLLOWED = 0.01  # probability from which on the beginning of a percentage is followed by another request


def complete_statement(text: str) -> str:
    """A generated text up to the end of the first complete statement of a confidence, where local generation stops."""
    # Local generation sees the character that the token of the percent sign ends with, or the next token.
    seen = [m.end() + more for m in re.finditer(r"[%％﹪٪]", text) for more in (0, 1)]
    for length in (*seen, len(text)):
        if (end := end_of_confidence(text[:length])) is not None:
            return text[:end].strip()
    return text.strip()


def p_yes(tokens: Sequence[Token]) -> float | None:
    """P(yes) / (P(yes) + P(no)) at the first token of a response; None if it does not begin with one of the words."""
    # Some tokenizers have white space as a token of its own.
    first = next((t for t in tokens if t.text.strip()), None)
    if first is None or _verdict(first.text) is None:
        return None
    mass: dict[str | None, float] = defaultdict(float)
    for text, log_p in first.alternatives.items():
        mass[_verdict(text)] += math.exp(log_p)
    return mass["yes"] / (mass["yes"] + mass["no"])


def _verdict(token: bytes) -> str | None:
    """The word, yes or no, that a token is, begins, or begins with, in any case."""
    text = token.decode("utf-8", "replace").strip().casefold().lstrip("*\"'`")
    words = [w for w in ("yes", "no") if text and (w.startswith(text) or re.match(rf"{w}(?!\w)", text))]
    return words[0] if words else None


def answer_likelihood(tokens: Sequence[Token], answer: str) -> float | None:
    """The geometric mean of the probabilities of the tokens of an answer; None if the response does not begin with it, or has no tokens."""
    content = _text(tokens)
    start = len(content) - len(content.lstrip())
    if not answer or not content[start:].startswith(answer):
        return None
    sentence = render_answer(answer)
    end = start + len(sentence if content[start:].startswith(sentence) else answer)
    starts = accumulate((len(token.text) for token in tokens), initial=0)
    length = len(_bytes(content[:end]))
    log_p = [token.log_p for token, start in zip(tokens, starts, strict=False) if start < length]
    return min(1.0, math.exp(sum(log_p) / len(log_p)))


def percent_distribution(
    tokens: Sequence[Token], ask_after: Callable[[str], Mapping[bytes, float] | None]
) -> dict[float, float]:
    r"""How probable the model states each whole percent after its own answer.

    .. math:: p(c_k) \propto \sum_{\text{pieces of } c_k} p(\text{piece} \mid v, q, a)

    The tokens that the server lists at the stated percentage are its pieces: whole numbers ("80"), or beginnings ("8"). A
    beginning that is likelier than `FOLLOWED` is continued by the response itself if it was generated, else by another request.

    Args:
        ask_after: the beginning of a response -> the listed next tokens and their log-probabilities; None if the server cannot.

    Returns:
        Confidence -> probability, highest confidence first, summing to 1; empty if the response states no labelled percentage, has no
        tokens, or a beginning that is not continued.
    """
    content = _text(tokens)
    statement = complete_statement(content)
    statement = content[: content.find(statement) + len(statement)]
    number = re.search(r"(\d{1,3})\s{0,3}\\?%\Z", statement)
    if number is None or parse_confidence(statement) is None:
        return {}
    before, generated = _bytes(content[: number.start()]), b""
    # The beginning of a number that was generated -> the tokens that are listed after it.
    listed: dict[str, dict[bytes, float]] = {}
    is_one_token = False
    for token in tokens:
        if len(generated) + len(token.text) > len(before):
            # The first token of the number may begin with the end of the text before it, such as a space.
            overlap = before[len(generated) :]
            piece = generated[len(before) :].decode("utf-8", "replace")
            pairs = token.alternatives.items()
            listed[piece] = {t[len(overlap) :]: p for t, p in pairs if t.startswith(overlap)}
            # Such a tokenizer does not split numbers, so that no digit can follow one.
            is_one_token |= len(number[1]) > 1 and token.text[len(overlap) :].startswith(number[1].encode())
        generated += token.text

    mass: dict[int, float] = defaultdict(float)
    unfinished = [("", 1.0)]
    while unfinished:
        piece, p = unfinished.pop(0)
        following = listed.get(piece) or ask_after((before + piece.encode()).decode("utf-8", "replace"))
        if following is None:
            return {}
        likely = 0.0
        for token_text, log_p in following.items():
            text = piece + token_text.decode("utf-8", "replace")
            percent = _percent(text, is_one_token)
            begins = text != piece and any(f"{n}%".startswith(text) for n in PERCENTS)
            likely += math.exp(log_p) * (percent is not None or begins)
            if percent is not None:
                mass[percent] += p * math.exp(log_p)
            elif begins and p * math.exp(log_p) >= FOLLOWED:
                unfinished.append((text, p * math.exp(log_p)))
        if piece not in listed and likely < 0.5:
            return {}  # the server has begun a new answer
    total = sum(mass.values())
    return {n / 100: mass.get(n, 0.0) / total for n in reversed(PERCENTS)} if total > 0 else {}


def _percent(text: str, is_one_token: bool) -> int | None:
    """The percentage that a text is: a number with the percent sign, or one that no digit can follow; else None."""
    if (match := re.match(r"(100|[1-9]?\d)(%|\Z)", text)) is None:
        return None
    n = int(match[1])
    return n if match[2] or is_one_token or n == 0 or n > 10 else None


def _text(tokens: Sequence[Token]) -> str:
    """The text of some tokens; `_bytes` gives their bytes back, also those of unfinished characters."""
    return b"".join(token.text for token in tokens).decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


LIKELIHOOD = AnswerLikelihood.name
NO_CONTINUATION = "the server does not continue a given answer (continue_final_message): no value where a percentage is several tokens"
LISTED = {"logprobs": True, "top_logprobs": 20}
"""Lists as many tokens at each position as OpenAI and vLLM allow by default."""


class EndpointSystem(System):
    """Answers questions through an endpoint, as local models do; thread-safe. A DataError as for `Client`.

    The stated confidence is read from the text; the expected confidence and the likelihood of the answer from the tokens that the
    server lists. Other estimators, and all probes, need the scores of texts that we choose, which no server gives.
    """

    def __init__(
        self, name: str, endpoint: Endpoint, estimators: Sequence[Estimator], max_new_tokens: int
    ) -> None:
        self.client = Client(endpoint, name)
        self.estimators = [estimator.name for estimator in estimators]
        self.of_tokens = [e for e in self.estimators if e in (EXPECTED, LIKELIHOOD)]
        self.max_new_tokens = max_new_tokens
        self.prompt = ElicitationPrompt()
        others = [name for name in self.estimators if name not in (VERBALIZED, EXPECTED, LIKELIHOOD)]
        not_scored = "an endpoint does not score a given answer, which this estimator needs"
        self.notes: dict[str, str] = dict.fromkeys(others, not_scored)

    def answer(self, batch: PromptBatch, probes: Sequence[Probe] = ()) -> SystemAnswers:
        """Answer a batch that has its images, several queries at once, without probes; a DataError if a request failed for good."""
        n = len(batch.queries)
        with ThreadPoolExecutor(self.client.endpoint.concurrency) as threads:
            asked = list(threads.map(partial(self._ask, batch), range(n)))
        responses, distributions, continued = (list(column) for column in zip(*asked, strict=True))
        if not all(response.tokens for response in responses):
            self.notes |= dict.fromkeys(self.of_tokens, "the server gives no log-probabilities (logprobs)")
        answers = grade_answers(batch, [complete_statement(response.text) for response in responses])
        likelihoods = [_likelihood(a, r.tokens) for a, r in zip(answers, responses, strict=True)]
        means = [sum(level * p for level, p in d.items()) if d else None for d in distributions]
        known = {
            VERBALIZED: Estimate([a.confidence for a in answers], [r.generated for r in responses]),
            # Rounding can move a mean just above 1.
            EXPECTED: Estimate([rounded(None if m is None else min(m, 1.0)) for m in means], continued),
            LIKELIHOOD: Estimate([rounded(likelihood) for likelihood in likelihoods], [0] * n),
        }
        estimates = {name: known.get(name, Estimate([None] * n, [0] * n)) for name in self.estimators}
        return SystemAnswers.of(answers, estimates, distributions)

    def _ask(self, batch: PromptBatch, row: int) -> tuple[Response, dict[float, float], int]:
        """The response to one query, its `percent_distribution` if that is asked for, and how many tokens were generated for it."""
        file = io.BytesIO()
        Image.fromarray(batch.images[row]).save(file, "PNG", compress_level=1)
        image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        text = self.prompt.render(batch.queries[row].question)
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        response = self.client.ask(messages, self.max_new_tokens, **(LISTED if self.of_tokens else {}))
        if EXPECTED not in self.estimators:
            return response, {}, 0
        continued = 0

        def after(beginning: str) -> Mapping[bytes, float] | None:
            """The listed tokens after the beginning of an answer, as vLLM and SGLang give them; None: the server cannot."""
            nonlocal continued
            if self.notes.get(EXPECTED) == NO_CONTINUATION:
                return None
            begun = [*messages, {"role": "assistant", "content": beginning.lstrip()}]
            continuing = {"continue_final_message": True, "add_generation_prompt": False}
            try:
                tokens = self.client.ask(begun, 1, **LISTED, **continuing).tokens
            except RefusedError:
                self.notes[EXPECTED] = NO_CONTINUATION
                return None
            continued += 1
            return tokens[0].alternatives if tokens else {}

        return response, percent_distribution(response.tokens, after), continued

    def close(self) -> None:
        self.client.close()


def _likelihood(answer: Prediction, tokens: Sequence[Token]) -> float | None:
    """The likelihood of an answer as in `AnswerLikelihood`, from its listed tokens; None if they do not give it."""
    if answer.answer_type != "yes_no":
        return answer_likelihood(tokens, strip_confidence(answer.text))
    if (p := p_yes(tokens)) is None or answer.predicted not in ("yes", "no"):
        return None
    return p if answer.predicted == "yes" else 1 - p
