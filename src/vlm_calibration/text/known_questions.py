"""Whether a question is like those that a threshold was chosen on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
