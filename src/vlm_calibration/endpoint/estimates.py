"""The estimators that an endpoint can give, from the response and by further requests.

Each is the counterpart of an estimator of `estimators/`, with the same name and settings. A server does not score texts that we
choose, and so what it lists is read (`reading`), and some estimators, and all probes, cannot be had.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_calibration.data.noise import query_rng
from vlm_calibration.endpoint.client import Client, continued, greedy, listing_tokens
from vlm_calibration.endpoint.reading import (
    PERCENTS,
    StatedPercent,
    answer_likelihood,
    complete_statement,
    continuations,
    is_whole,
    p_of_first,
    possible,
)
from vlm_calibration.endpoint.responses import Response
from vlm_calibration.estimators.answer_scoring import YES_NO
from vlm_calibration.estimators.base import Estimator
from vlm_calibration.estimators.consistency import SelfConsistency, agrees
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.estimators.verbal import ExpectedConfidence, VerbalizedConfidence
from vlm_calibration.records import Query
from vlm_calibration.text.confidence import strip_confidence
from vlm_calibration.text.grading import Grading

FOLLOWED = 0.01
"""Probability from which on the beginning of a percentage is followed by another request."""
MOST_PIECES = 4
"""Tokens of a percentage, at most."""
NO_TOKENS = "the server gives no log-probabilities (logprobs)"
NO_CONTINUATION = "the server does not continue a given answer (continue_final_message): no value where a percentage is several tokens"


class Asked(NamedTuple):
    """An answer with what further requests need.

    Attributes:
        query: the query.
        prediction: its graded answer.
        response: the response that the answer comes from.
        content: the content of the message: image and prompt.
        image: the part of it that is the image.
        max_new_tokens: length limit of an answer.
        grading: the rule that graded the answer.
    """

    query: Query
    prediction: EstimatedPrediction
    response: Response
    content: Sequence[Mapping[str, Any]]
    image: Mapping[str, Any]
    max_new_tokens: int
    grading: Grading

    @property
    def answer(self) -> str:
        """The answer without the stated confidence; empty if there is none to rate."""
        return strip_confidence(self.prediction.text)


class Rating(NamedTuple):
    """The confidence in one answer.

    Attributes:
        confidence: in [0, 1]; None for an answer without one.
        generated: number of tokens that were generated for it, the counterpart of forward passes.
    """

    confidence: float | None
    generated: int


class EndpointEstimates:
    """Rates the answers of one endpoint.

    Args:
        client: of the endpoint, connected.
        estimators: what to estimate.

    Attributes:
        notes: name of an estimator that cannot be had -> why.
    """

    def __init__(self, client: Client, estimators: Sequence[Estimator]) -> None:
        self.client = client
        self.estimators = estimators
        self.notes = self._unavailable()

    def _unavailable(self) -> dict[str, str]:
        notes = {}
        for estimator in self.estimators:
            if type(estimator) not in _RATED:
                notes[estimator.name] = (
                    "an endpoint does not score a given answer, which this estimator needs"
                )
            elif type(estimator) in READ_TOKENS and not self.client.gives_tokens:
                notes[estimator.name] = NO_TOKENS
            elif type(estimator) is ExpectedConfidence and not self.client.continues:
                notes[estimator.name] = NO_CONTINUATION
        return notes

    async def rate(self, asked: Asked) -> dict[str, Rating]:
        """Estimator -> rating of an answer; None as the confidence of an estimator that cannot be had."""
        missing = [name for name, note in self.notes.items() if note != NO_CONTINUATION]
        available = [e for e in self.estimators if e.name not in missing]
        ratings = await asyncio.gather(*(_RATED[type(e)](self, e, asked) for e in available))
        known = dict(zip((e.name for e in available), ratings, strict=True))
        return {e.name: known.get(e.name, Rating(None, 0)) for e in self.estimators}

    # --- Verbalized and expected confidence -------------------------------------------------------------------------

    async def _verbalized(self, estimator: Estimator, asked: Asked) -> Rating:
        return Rating(asked.prediction.confidence, asked.response.generated)

    async def _expected(self, estimator: Estimator, asked: Asked) -> Rating:
        distribution, generated = await self.distribution(asked)
        if not distribution:
            return Rating(None, generated)
        mean = sum(level * p for level, p in distribution.items())
        return Rating(min(max(mean, min(distribution)), max(distribution)), generated)

    async def distribution(self, asked: Asked) -> tuple[dict[float, float], int]:
        r"""How probable the model states each whole percent after its own answer.

        .. math:: p(c_k) \propto \sum_{\text{pieces of } c_k} p(\text{piece} \mid v, q, a)

        The tokens that the server lists at the stated percentage are its pieces: whole numbers ("80"), or beginnings ("8"). A
        beginning that is likelier than 1% is continued by another request, unless it was generated, and then the response itself
        has the continuation. A server that does not continue answers is enough for tokenizers with whole numbers. Our exact scoring instead computes the likelihood of each whole response, "Confidence: 80%" and the
        end of the turn, written as in training; what follows the number, the wording before it, unlisted tokens and unlikely
        beginnings make the difference. In both the probabilities are normalised to 1.

        Args:
            asked: the answer.

        Returns:
            Confidence -> probability, in falling order; empty if the answer states no labelled percentage, or the server does not
            continue answers and that is needed. And the number of tokens that further requests generated.
        """
        stated = StatedPercent.find(asked.response)
        if stated is None:
            return {}, 0
        walk = _Walk(self, asked, stated)
        mass = await walk.mass()
        if mass is None:
            return {}, walk.generated
        total = sum(mass.values())
        found = {n / 100: mass.get(n, 0.0) / total for n in reversed(PERCENTS)} if total > 0 else {}
        return found, walk.generated

    # --- Likelihood, P(True) and self-consistency -------------------------------------------------------------------

    async def _likelihood(self, estimator: Estimator, asked: Asked) -> Rating:
        """See `p_of_first` for yes/no questions and `answer_likelihood` for others; no further request."""
        if asked.query.answer_type != "yes_no":
            return Rating(answer_likelihood(asked.response, asked.answer), 0)
        p, predicted = p_of_first(asked.response, YES_NO), asked.prediction.predicted
        if p is None or predicted not in ("yes", "no"):
            return Rating(None, 0)
        return Rating(p if predicted == "yes" else 1 - p, 0)

    async def _p_true(self, estimator: PTrue, asked: Asked) -> Rating:
        """`p_of_first` of the words true and false, in the response to the same follow-up question as locally."""
        if not asked.answer:
            return Rating(None, 0)
        text = estimator.template.format(question=asked.query.question, answer=asked.answer)
        content = [asked.image, {"type": "text", "text": text}]
        response = await self.client.ask(listing_tokens(greedy(content, 2)))
        return Rating(p_of_first(response, (estimator.true, estimator.false)), response.generated)

    async def _self_consistency(self, estimator: SelfConsistency, asked: Asked) -> Rating:
        """The share of sampled answers that agree, as locally; the server draws them, each with a seed of (seed, query id, sample)."""
        body = greedy(asked.content, asked.max_new_tokens)
        body["temperature"] = estimator.temperature
        seeds = [
            int(query_rng(estimator.seed, sample, asked.query.id, estimator.name).integers(2**31))
            for sample in range(estimator.samples)
        ]
        samples = await asyncio.gather(*(self.client.ask({**body, "seed": seed}) for seed in seeds))
        texts = [complete_statement(sample.text) for sample in samples]
        agreeing = sum(agrees(asked.prediction, text, asked.grading) for text in texts)
        share = agreeing / estimator.samples if asked.prediction.predicted else None
        return Rating(share, sum(sample.generated for sample in samples))


class _Walk:
    """Follows the beginnings of a stated percentage to whole ones.

    Attributes:
        generated: number of tokens that further requests generated.
    """

    def __init__(self, estimates: EndpointEstimates, asked: Asked, stated: StatedPercent) -> None:
        self.estimates = estimates
        self.asked = asked
        self.stated = stated
        self.generated = 0

    async def mass(self) -> dict[int, float] | None:
        """Percentage -> its probability; None if the server cannot continue an answer where that is needed."""
        mass: dict[int, float] = {}
        beginnings = [("", self.stated.pieces, 0.0)]
        for depth in range(MOST_PIECES):
            unfinished = []
            for before, pieces, log_p in beginnings:
                for piece, own in pieces.items():
                    text = before + piece
                    if (whole := is_whole(text, self.stated.is_one_token)) is not None:
                        mass[whole] = mass.get(whole, 0.0) + math.exp(log_p + own)
                    elif piece and possible(text) and math.exp(log_p + own) >= FOLLOWED:
                        unfinished.append((text, log_p + own))
            if not unfinished:
                break
            following = await asyncio.gather(*(self._after(text, depth + 1) for text, _ in unfinished))
            if any(pieces is None for pieces in following):
                return None
            beginnings = [
                (text, pieces or {}, log_p)
                for (text, log_p), pieces in zip(unfinished, following, strict=True)
            ]
        return mass

    async def _after(self, text: str, depth: int) -> dict[str, float] | None:
        """The listed continuations of a beginning, from the response if it was generated, else by a request; None: not known."""
        tokens = self.stated.tokens
        generated = self.stated.generated + "".join(
            t.text.decode("utf-8", "replace") for t in tokens[1:depth]
        )
        if text == generated and depth < len(tokens):
            return {k.decode("utf-8", "replace"): p for k, p in tokens[depth].alternatives.items()}
        client = self.estimates.client
        if not client.continues:
            return None
        response = await client.ask(continued(self.asked.content, self.stated.before + text))
        self.generated += response.generated
        return continuations(response)


_Rate = Callable[[EndpointEstimates, Any, Asked], Awaitable[Rating]]
_RATED: dict[type[Estimator], _Rate] = {
    VerbalizedConfidence: EndpointEstimates._verbalized,
    ExpectedConfidence: EndpointEstimates._expected,
    AnswerLikelihood: EndpointEstimates._likelihood,
    PTrue: EndpointEstimates._p_true,
    SelfConsistency: EndpointEstimates._self_consistency,
}
READ_TOKENS = (ExpectedConfidence, AnswerLikelihood, PTrue)
"""Estimators that need log-probabilities."""
