"""The prompt that elicits a confidence."""

import string
from dataclasses import dataclass

DEFAULT_TEMPLATE = (
    '{question}\nAnswer briefly, then state your confidence that it is correct as "Confidence: <number>%".'
)
"""It names the form of the reply, which fine-tuning teaches, and contains no number that a model could repeat."""


@dataclass(frozen=True)
class ElicitationPrompt:
    """A prompt template with the placeholder `{question}`.

    Args:
        template: text with at least one `{question}` and no other placeholder; literal braces are doubled, as in `str.format`.

    Raises:
        ValueError: the template has no `{question}` or another placeholder, or its braces do not match.
    """

    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        try:
            parsed = string.Formatter().parse(self.template)
            fields = [tuple(field) for _, *field in parsed if field[0] is not None]
        except ValueError as error:
            raise ValueError(f"prompt template {self.template!r}: {error}; double literal braces") from error
        if not fields or set(fields) != {("question", "", None)}:
            raise ValueError(
                f"prompt template {self.template!r}: needs the placeholder {{question}}, without a format, and no other; double "
                "literal braces"
            )

    def render(self, question: str) -> str:
        """The prompt for one question; the question is inserted unchanged, braces included."""
        return self.template.format(question=question)
