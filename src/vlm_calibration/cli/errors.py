"""How a command ends with an error: its message in one line and its exit status."""

from __future__ import annotations


class CommandError(Exception):
    """The end of a command in good order: one line for the user, none if it is empty, and the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


def one_line(error: BaseException) -> str:
    """The message without the traceback that a data worker's error carries with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Caught ") and "Traceback" in str(error):
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines)
