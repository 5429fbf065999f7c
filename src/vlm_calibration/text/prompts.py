"""The prompt that elicits a confidence."""

import string
from dataclasses import dataclass

from vlm_calibration.records import DataError

DEFAULT_TEMPLATE = (
    '{question}\nAnswer briefly, then state your confidence that it is correct as "Confidence: <number>%".'
)
"""It names the form of the reply, which fine-tuning teaches, and contains no number that a model could repeat."""


def check_template(template: str, name: str, *placeholders: str) -> None:
    """DataError unless the template, called `name`, has the placeholders and no other; literal braces are doubled."""
    try:
        parsed = string.Formatter().parse(template)
        fields = {tuple(field) for _, *field in parsed if field[0] is not None}
    except ValueError as error:
        raise DataError(f"{name} {template!r}: {error}; double literal braces") from error
    if fields != {(placeholder, "", None) for placeholder in placeholders}:
        expected = " and ".join(f"{{{placeholder}}}" for placeholder in placeholders)
        raise DataError(
            f"{name} {template!r}: needs {expected}, without a format, and no other placeholder; double literal braces"
        )


@dataclass(frozen=True)
class ElicitationPrompt:
    """A prompt template.

    Args:
        template: text with at least one `{question}` and no other placeholder; see `check_template`, which raises a DataError.
    """

    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        check_template(self.template, "prompt template", "question")

    def render(self, question: str) -> str:
        """The prompt for one question; the question is inserted unchanged, braces included."""
        return self.template.format(question=question)
