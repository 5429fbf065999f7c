"""Errors of the command line, each in one line that names the setting, what was found and what was expected."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class CommandError(Exception):
    """The end of a command that failed: one line for the user, empty to print nothing, and the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.message, self.status = message, status


def one_line(error: BaseException) -> str:
    """The message of an error in one line, without the traceback that a data worker puts into it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Caught ") and "Traceback" in str(error):
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines)


@contextmanager
def explained_errors(parser: ArgumentParser) -> Iterator[None]:
    """Turn errors of this parser into an `ArgumentError` of one line that names the setting, and the nearest name if it is misspelt."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(None, explained(str(error), parser)) from error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The most similar of some names as the end of a sentence, empty if none is similar."""
    similar = get_close_matches(name, list(names), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""


_UNKNOWN = re.compile(
    r"unrecognized arguments: -*([^\s=]+)|(?:Group '(.+?)' does not|.*does not) accept option '(.+?)'|Option '(.+?)' is not accepted"
)
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (.+)|module '.+' has no attribute '(.+)'|No module named '(.+)'"
)
_EXPECTED = re.compile(
    r"(?:Expected an?|Not of type) (?!path but|<class 'NoneType'>)(.+?)(?:\. Got value: (.*)|: .*: '(.*)'|: (.*) does not .*)?$"
)


def explained(message: str, parser: ArgumentParser) -> str:
    """Reduce a message of argparse or jsonargparse to one line, with the nearest of the parser's names for an unknown one.

    jsonargparse nests messages, one for each type that a value might have had. The innermost one about the chosen class counts.
    """
    path: list[str] = []
    chosen: Any = None
    expected: list[str] = []
    found: str | None = None
    for line in (part.strip().removeprefix("- ") for part in message.splitlines()):
        if match := re.match(r'Parser key "(.+?)":?\s*(.*)', line):
            path.append(match[1])
            line = match[2]
        if match := re.match(r"Problem with given class_path '(.+?)':", line):
            chosen = class_at(match[1])
            path += [] if chosen is None or is_dataclass(chosen) else ["init_args"]
        elif match := _NO_CLASS.match(line):
            name = next(filter(None, match.groups()))
            ours = [vars(module) for key, module in sys.modules.items() if key.startswith("vlm_calibration.")]
            classes = {key for names in ours for key, value in names.items() if isinstance(value, type)}
            return f"{_dotted(path, parser)}: there is no {name!r}{did_you_mean(name, sorted(classes))}"
        elif match := _UNKNOWN.match(line):
            name = ".".join(filter(None, match.groups()))
            # Written as the user typed it: with dashes on the command line, without in a file.
            dashes = "--" if match[1] and not path else ""
            known = parser
            if chosen:
                from jsonargparse import ArgumentParser

                known = ArgumentParser(exit_on_error=False)
                known.add_class_arguments(chosen)
            options = [dashes + option.lstrip("-") for option in known._option_string_actions]
            similar = did_you_mean(dashes + name, options)
            return f"unknown setting {dashes}{_dotted([*path, name])}{similar}"
        elif match := re.match(r"the following arguments are required: (.+)", line):
            if path:
                return f"{_dotted(path, parser)}: needs {match[1]}"
            names = ", ".join(_dotted([name], parser) for name in match[1].split(", "))
            return f"missing: {names}; see `{parser.prog} --help`"
        elif match := _EXPECTED.match(line):
            expected.append(match[1])
            found = next((value for value in match.groups()[1:] if value is not None), None)
        elif match := re.match(r"Given value: (.*)", line):
            found = match[1]
        if found is not None and expected:
            similar = did_you_mean(found, _literals(" ".join(expected)))
            words = " or ".join(map(_in_words, expected))
            return f"{_dotted(path, parser)}: expected {words}, found {found!r}{similar}"
    return " ".join(message.split())


def _dotted(path: Sequence[str], parser: ArgumentParser | None = None) -> str:
    """The name of a setting; an option of a command as it is typed, with dashes."""
    name = ".".join(path).replace(".init_args.init_args", ".init_args")
    option = f"--{name.replace('_', '-')}"
    return option if parser and "." not in name and option in parser._option_string_actions else name


def class_at(path: str) -> Any:
    """The class at a dotted path, None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None


_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a text",
    "PositiveInt": "a whole number of at least 1",
    "NonNegativeInt": "a whole number of at least 0",
    "ClosedUnitInterval": "a number in [0, 1]",
    "OpenUnitInterval": "a number in (0, 1)",
}


def _in_words(hint: str) -> str:
    """A type hint, as jsonargparse prints it, in words."""
    if hint.startswith("typing.Literal["):
        return f"one of {', '.join(_literals(hint))}"
    name = hint.removeprefix("<class '").removesuffix("'>")
    return _TYPES.get(name, name.removeprefix("typing."))


def _literals(hint: str) -> list[str]:
    match = re.search(r"Literal\[(.*?)\]", hint)
    return [part.strip(" '\"") for part in match[1].split(",")] if match else []
