"""The decision rule of a model, in `thresholds.json`: answer from a confidence on, else send the question to a person; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from vlm_calibration.files import write_json
from vlm_calibration.models.base import THRESHOLDS, Quantization, adapter_weights_digest, read_object
from vlm_calibration.records import DataError
from vlm_calibration.text.known_questions import KnownQuestions

Decision: TypeAlias = Literal["answer", "review"]
By: TypeAlias = Literal["category"]
SCHEMA = 3
EVERYTHING = ""
"""The group of a rule that has one threshold for all questions."""


def may_answer(confidence: float | None, threshold: float | None) -> bool:
    """Whether an answer is given: there are a confidence and a threshold, and the confidence is not below it."""
    return threshold is not None and confidence is not None and confidence >= threshold


class AppliedRule(NamedTuple):
    """The part of a decision rule that decided about an answer.

    Attributes:
        threshold: the lowest confidence that is answered; None: no answer of the group is given.
        confidence: the estimator's confidence that was compared, in [0, 1]; None if there is none.
        group: the category that the threshold is for; empty if it is for all questions.
        unfamiliar: how the question differs from those that the rule was chosen on; None: it is like them.
    """

    threshold: float | None
    estimator: str
    confidence: float | None
    group: str
    guarantee: str
    unfamiliar: str | None = None

    @property
    def decision(self) -> Decision:
        may = self.unfamiliar is None and may_answer(self.confidence, self.threshold)
        return "answer" if may else "review"


@dataclass(frozen=True)
class DecisionRule:
    """A rule with its guarantee and what it was chosen on; the fields are the keys of `thresholds.json`, beside "schema".

    Attributes:
        base, quantization, dtype: name or folder of the base model, and how the evaluation loaded it.
        weights: digest of the adapter's weights, or of the whole model if nothing is to be added to it.
        by: what the groups are; None: one group of all questions.
        groups: group -> "threshold" (None: none was found), and what it does on the answers that it was chosen on.
        limits: "max_error", "max_sent_away" (None: no limit) and "certainty".
        correction: how several tests share the error probability.
        answers: that the rule was chosen on: "split", "digest" of their file, "n", "images" and "without_group".
        questions: their words and forms. A question with others goes to a person.
    """

    base: str
    quantization: Quantization
    dtype: str
    weights: str
    prompt: str
    estimator: str
    by: By | None
    groups: Mapping[str, Mapping[str, Any]]
    limits: Mapping[str, float | None]
    correction: str
    guarantee: str
    assumptions: list[str]
    answers: Mapping[str, Any]
    questions: KnownQuestions = field(default_factory=KnownQuestions)

    def __post_init__(self) -> None:
        if self.by not in (None, "category"):
            raise ValueError(f"'by' must be null or \"category\", found {self.by!r}")
        if not isinstance(self.groups, Mapping) or not self.groups:
            raise ValueError("'groups' must be an object with a group")
        if self.by is None and set(self.groups) != {EVERYTHING}:
            raise ValueError("'groups' must have the one key \"\" without 'by'")
        for name, group in self.groups.items():
            value = group["threshold"]
            if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
                raise ValueError(
                    f"the threshold of group {name!r} must be in [0, 1] or null, found {value!r}"
                )

    def applied(
        self, confidence: float | None, category: str | None, unfamiliar: str | None = None
    ) -> AppliedRule | None:
        """The rule for an answer with what its estimator says; None if it goes by category and has no threshold for this one."""
        group = EVERYTHING if self.by is None else category
        if group is None or group not in self.groups:
            return None
        threshold = self.groups[group]["threshold"]
        return AppliedRule(threshold, self.estimator, confidence, group, self.guarantee, unfamiliar)


def write_rule(rule: DecisionRule, folder: Path) -> Path:
    """Write `thresholds.json` into a folder, in place of an earlier one; returns its path. DataError if it cannot be written."""
    path = folder / THRESHOLDS
    write_json(path, {"schema": SCHEMA, **asdict(rule)})
    return path


def read_rule(folder: Path) -> DecisionRule | None:
    """The rule in a folder; None if there is none. DataError if the file is not such a rule."""
    path = folder / THRESHOLDS
    if not path.is_file():
        return None
    content = read_object(path)
    again = "choose the thresholds again with `vlm-calibration threshold`, or remove the file"
    if (schema := content.pop("schema", None)) != SCHEMA:
        raise DataError(f"{path}: schema {schema!r}, expected {SCHEMA}: {again}")
    try:
        questions = KnownQuestions(**{name: tuple(texts) for name, texts in content.pop("questions").items()})
        return DecisionRule(**content, questions=questions)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(f"{path}: not a decision rule: {error}: {again}") from error


def rule_of_adapter(folder: Path) -> DecisionRule | None:
    """The rule beside an adapter; None if there is none, or if it was chosen with other weights. DataError as in `read_rule`."""
    rule = read_rule(folder)
    return rule if rule is not None and rule.weights == adapter_weights_digest(folder) else None
