"""The prompt that elicits a confidence.

The default is one short instruction that any chat model follows. It names the form of the reply ("Confidence: ...%"),
which fine-tuning teaches, and contains no number that a model could repeat.
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
        template: text with at least one `{question}` and no other placeholder; literal braces are doubled, as in
            `str.format`.

    Raises:
        ValueError: the template has no `{question}` or another placeholder, or its braces do not match.
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
                f"prompt template {self.template!r} has unknown placeholders {unknown}; the only placeholder is {{question}} "
                "(double literal braces)"
            )
        if any(spec or conversion for _, name, spec, conversion in fields if name is not None):
            raise ValueError(f"prompt template {self.template!r}: {{question}} takes no format or conversion")
        if not names:
            raise ValueError(f"prompt template {self.template!r} lacks the placeholder {{question}}")

    def render(self, question: str) -> str:
        """The prompt for one question; the question is inserted unchanged, braces included."""
        return self.template.format(question=question)
