"""The question as the model is asked it: the record's question inside a prompt that elicits a confidence.

One short instruction that any chat model follows; it names the form of the reply ("Confidence: ...%") because that is
the form that fine-tuning teaches, and holds no number that a model could parrot.
"""

import string
from dataclasses import dataclass

DEFAULT_TEMPLATE = (
    '{question}\nAnswer briefly, then state your confidence that it is correct as "Confidence: <number>%".'
)


@dataclass(frozen=True)
class ElicitationPrompt:
    """A prompt template with the placeholder `{question}`.

    Args:
        template: text that contains `{question}` at least once and no other placeholder; literal braces are doubled, as in
            `str.format`.

    Raises:
        ValueError: if the template has no `{question}`, has another placeholder, or its braces do not match.
    """

    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        try:
            fields = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"prompt template {self.template!r}: {error}; double literal braces") from error
        names = [name for _, name, _, _ in fields if name is not None]
        unknown = sorted({name for name in names if name != "question"})
        if unknown:
            raise ValueError(
                f"prompt template {self.template!r} has unknown placeholders {unknown}; only {{question}} is known "
                "(double literal braces)"
            )
        if any(spec or conversion for _, name, spec, conversion in fields if name is not None):
            raise ValueError(f"prompt template {self.template!r}: {{question}} takes no format or conversion")
        if not names:
            raise ValueError(f"prompt template {self.template!r} lacks the placeholder {{question}}")

    def render(self, question: str) -> str:
        """The prompt for one question, which is inserted as it is, braces included."""
        return self.template.format(question=question)
