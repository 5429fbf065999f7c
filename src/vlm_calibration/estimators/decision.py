"""The decision rule of a model, in `thresholds.json`: answer from a confidence on, else send the question to a person; without torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from vlm_calibration.files import write_json
from vlm_calibration.models.base import THRESHOLDS, Quantization, adapter_weights_digest, read_object
from vlm_calibration.records import DataError

FREQUENT = 0.1
"""Share of the questions from which on a word belongs to their forms."""
MAX_NEW = 0.05
"""Share of further questions of the same source with something new, above which newness says nothing."""
GAP = "_"


@dataclass(frozen=True)
class KnownQuestions:
    """The words and forms of some questions. A form has a gap for each run of rare words: "is there a _ in the image".

    Attributes:
        words: all words, in lower case; empty if new ones are not checked.
        frequent: the words that forms consist of.
        forms: all forms; empty if new ones are not checked.
    """

    words: tuple[str, ...] = ()
    frequent: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()

    @classmethod
    def of(cls, questions: Sequence[str]) -> KnownQuestions:
        """Collect the words and forms of questions; new ones are not checked if further questions would often have some.

        The share of questions with a word or form that no other one has estimates that (Good, Biometrika 1953).

        >>> known = KnownQuestions.of(["Is there a dog?", "Is there a cat?", "Is there a mat?"] * 20)
        >>> known.unfamiliar("Is there a zebra?")
        "the word 'zebra' is in no question that the thresholds were chosen on"
        >>> known.unfamiliar("Is there a mat?")
        """
        split = [_words(question) for question in questions]
        counts = Counter(word for words in split for word in set(words))
        frequent = {word for word, n in counts.items() if n >= FREQUENT * len(questions)}
        forms = Counter(_form(words, frequent) for words in split)
        limit = MAX_NEW * len(questions)
        new_words = sum(any(counts[word] == 1 for word in words) for words in split)
        new_forms = sum(n for n in forms.values() if n == 1)
        return cls(
            tuple(sorted(counts)) if new_words <= limit else (),
            tuple(sorted(frequent)),
            tuple(sorted(forms)) if new_forms <= limit else (),
        )

    def described(self) -> str:
        """What is checked, as a sentence."""
        counts = (("words", self.words), ("forms", self.forms))
        checked = [f"{len(texts):,} {name}" for name, texts in counts if texts]
        if not checked:
            return "These questions are too different from each other to tell an unfamiliar one."
        return f"Questions beyond their {' and '.join(checked)} go to a person."

    def unfamiliar(self, question: str) -> str | None:
        """What is new in a question, as a clause; None if nothing is."""
        words = _words(question)
        if self.words and (new := [word for word in words if word not in self.words]):
            return f"the word {new[0]!r} is in no question that the thresholds were chosen on"
        form = _form(words, set(self.frequent))
        if self.forms and form not in self.forms:
            return f"no question that the thresholds were chosen on has the form {form!r}"
        return None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def _form(words: Sequence[str], frequent: set[str]) -> str:
    form: list[str] = []
    for word in words:
        if word in frequent:
            form.append(word)
        elif form[-1:] != [GAP]:
            form.append(GAP)
    return " ".join(form)


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
