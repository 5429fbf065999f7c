"""Reading a command's arguments: every mistake is one line that names the setting, what was found and what was expected.

Misspelt names come with the nearest one. Neither torch nor Lightning is imported.
"""

from __future__ import annotations

import argparse
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose every complaint is an `ArgumentError`, which the command line reports in one line."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(None, message)


@contextmanager
def explained_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Complaints of this parser inside become `ArgumentError`s of one line, with the nearest name for a misspelt one."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(None, explained(str(error), parser)) from error


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest to one that is not known, as the end of a sentence; empty if none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


_KEY = re.compile(r'Parser key "(.+?)":?\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '(.+?)':")
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?:-*)([^\s=]+)|Option '(.+?)' is not accepted|does not accept option '(.+?)'"
)
_GROUP = re.compile(r"Group '(.+?)' does not accept")
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (.+)|module '.+' has no attribute '(.+)'|No module named '(.+)'"
)
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_GIVEN = re.compile(r"Given value: (.*)")


def explained(message: str, parser: argparse.ArgumentParser) -> str:
    """What argparse or jsonargparse complains of, in one line.

    jsonargparse nests its complaints, one for each type that a value might have had; what counts is the innermost one about
    the class that was chosen.

    Args:
        parser: the one that complains; it knows the names that may be meant.
    """
    path: list[str] = []
    chosen: Any = None
    expected: list[str] = []
    for line in (part.strip().removeprefix("- ") for part in message.splitlines()):
        if found := _KEY.match(line):
            path.append(found[1])
            line = found[2]
        if found := _CLASS.match(line):
            chosen = _class(found[1])
            path += [] if chosen is None or is_dataclass(chosen) else ["init_args"]
        elif found := _NO_CLASS.match(line):
            name = next(filter(None, found.groups()))
            return f"{_dotted(path)}: there is no {name!r}{did_you_mean(name, _class_names())}"
        elif found := _UNKNOWN.search(line):
            group = _GROUP.match(line)
            name = ".".join([*([group[1]] if group else []), next(filter(None, found.groups()))])
            # As it was typed, where it was.
            dashes = "--" if found[1] and not path else ""
            known = _names(_parser_of(chosen) if chosen else parser)
            near = did_you_mean(dashes + name, [dashes + option for option in known])
            return f"unknown setting {dashes}{_dotted([*path, name])}{near}"
        elif found := _REQUIRED.match(line):
            return f"{_dotted(path)}: needs {found[1]}" if path else f"{line}; see `{parser.prog} --help`"
        elif found := _CHOICE.search(line):
            known = re.findall(r"[^\s,']+", found[2])
            return f"{line.removeprefix('argument ')}{did_you_mean(found[1], known)}"
        elif found := _EXPECTED.match(line):
            if found[2] is not None:
                return f"{_dotted(path)}: expected {_kind(found[1])}, found {found[2]!r}{_near(found[1], found[2])}"
            expected += [] if "NoneType" in found[1] else [found[1]]
        elif (found := _GIVEN.match(line)) and expected:
            near = _near(" ".join(expected), found[1])
            return f"{_dotted(path)}: expected {' or '.join(map(_kind, expected))}, found {found[1]!r}{near}"
    return " ".join(message.split())


def _dotted(path: Sequence[str]) -> str:
    return ".".join(path).replace(".init_args.init_args", ".init_args")


def _class(path: str) -> Any:
    """The class at a dotted path, None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None


def _parser_of(kind: type) -> argparse.ArgumentParser:
    """A parser of the settings of a class."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


def _names(parser: argparse.ArgumentParser) -> list[str]:
    return [option.lstrip("-") for option in parser._option_string_actions]


def _class_names() -> list[str]:
    """Names of the project's classes that are imported."""
    package = __name__.partition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    return sorted(
        {name for module in modules for name, value in vars(module).items() if isinstance(value, type)}
    )


_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text"}


def _kind(hint: str) -> str:
    """A type hint in words."""
    if hint.startswith("typing.Literal["):
        return f"one of {', '.join(_literals(hint))}"
    name = hint.removeprefix("<class '").removesuffix("'>")
    return _KINDS.get(name, name.removeprefix("typing."))


def _literals(hint: str) -> list[str]:
    found = re.search(r"Literal\[(.*?)\]", hint)
    return [part.strip(" '\"") for part in found[1].split(",")] if found else []


def _near(hint: str, value: str) -> str:
    return did_you_mean(value, _literals(hint))
