"""Commands from typed functions, without torch and Lightning: their parsers, their help, and running them."""

from __future__ import annotations

import inspect
import textwrap
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, Union, get_args, get_origin

from vlm_calibration.errors import did_you_mean, explained_errors

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Subcommands(NamedTuple):
    """A command that consists of others: its description, and name of a subcommand -> the subcommand."""

    description: str
    commands: Mapping[str, Command]


class Lazy(NamedTuple):
    """A command that is imported when it runs: its description, and where it is as `module:name` below this package."""

    description: str
    target: str

    def load(self) -> Any:
        module, _, name = self.target.partition(":")
        return getattr(import_module(f"vlm_calibration.{module}"), name)


Command: TypeAlias = Callable[..., Any] | Subcommands | Lazy


class Forwarded(NamedTuple):
    """Annotation of a command's `*settings`: arguments that are passed on unparsed, in the order given.

    `--help` lists the common options ("--name METAVAR", or "--name" of a flag -> description), and the epilog below them.
    """

    options: Mapping[str, str]
    epilog: Callable[[], str]
    usage: str = "[--config NAME ...] [--KEY VALUE ...]"


ALL_SETTINGS = {"--help-all": "show all settings and exit"}
"""The option of a command that `with_full_help` hands on as the `--help` of another parser."""


def with_full_help(args: Sequence[str]) -> list[str]:
    return ["--help" if arg in ALL_SETTINGS else arg for arg in args]


def run_command(prog: str, command: Command, args: Sequence[str]) -> Any:
    """Parse what follows a command, `prog`, and return what its function or subcommand does; an ArgumentError is one line."""
    if isinstance(command, Lazy):
        return run_command(prog, command.load(), args)
    if isinstance(command, Subcommands):
        name, *rest = args or [""]
        if name in command.commands:
            return run_command(f"{prog} {name}", command.commands[name], rest)
        if name in ("-h", "--help"):
            return print(_overview(prog, command))
        wrong = f"no {name!r}{did_you_mean(name, command.commands)}" if name else "missing"
        raise ArgumentError(None, f"{wrong}: one of {', '.join(command.commands)}; see `{prog} --help`")
    parser, forwarded = command_parser(prog, command), _forwarded(command)
    own, rest = _split_arguments(parser, args, forwarded) if forwarded else (args, [])
    with explained_errors(parser):
        values = parser.parse_args(own)
    return command(*rest, **_keywords(command, values))


def _overview(prog: str, command: Subcommands) -> str:
    indent = max(map(len, command.commands)) + 4
    fill = partial(textwrap.fill, width=79, subsequent_indent=" " * indent, break_on_hyphens=False)
    rows = [
        fill(description(subcommand).split(". ")[0], initial_indent=f"  {name}".ljust(indent))
        for name, subcommand in command.commands.items()
    ]
    text = textwrap.fill(command.description, 79, break_on_hyphens=False)
    return "\n".join([f"usage: {prog} COMMAND ...", "", text, "", *rows])


class _HelpFormatter(RawDescriptionHelpFormatter):
    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        """Leave out what may be left out: the page lists it."""
        needed = [action for action in actions if action.required or not action.option_strings]
        super().add_usage(usage, needed, groups, prefix)


def command_parser(prog: str, function: Callable[..., Any]) -> ArgumentParser:
    """Build the parser of a command from its function, with help texts from docstrings.

    Parameters become positional arguments, keyword-only ones `--options` with hyphens, booleans flags (`--x`, or `--no-x` if true by
    default). A dataclass becomes a group of options, except fields with a default factory, which are for Python.
    """
    from jsonargparse import ArgumentParser

    forwarded = _forwarded(function)
    parser = ArgumentParser(
        prog=prog,
        description=textwrap.fill(description(function), 79, break_on_hyphens=False).replace("%", "%%"),
        usage=forwarded and f"%(prog)s {forwarded.usage}",
        epilog=forwarded and forwarded.epilog(),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    for option, text in forwarded.options.items() if forwarded else ():
        name, *metavars = option.split()
        value: dict[str, Any] = {"metavar": metavars[0]} if metavars else {"action": "store_true"}
        parser.add_argument(name, help=text, **value)
    _add_parameters(parser, function)
    return parser


def description(command: Command) -> str:
    """What a command does, in one line; of a function, its docstring up to the first section."""
    from docstring_parser.google import parse

    if isinstance(command, Subcommands | Lazy):
        return command.description
    return " ".join((parse(inspect.getdoc(command) or "").description or "").split())


def _forwarded(function: Callable[..., Any]) -> Forwarded | None:
    """The annotation of the function's `*settings`, if it has any."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return next((get_args(p.annotation)[1] for p in parameters if p.kind is p.VAR_POSITIONAL), None)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function, or fields of a dataclass, that have arguments."""
    members = fields(function) if is_dataclass(function) else ()
    for_python = {member.name for member in members if member.default_factory is not MISSING}
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return [p for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name not in for_python]


def _add_parameters(group: Any, function: Callable[..., Any]) -> None:
    from docstring_parser.google import parse

    documented = parse(inspect.getdoc(function) or "").params
    helps = {p.arg_name: " ".join((p.description or "").split()).replace("%", "%%") for p in documented}
    for parameter in _parameters(function):
        hint: Any = parameter.annotation
        if is_dataclass(hint):
            title = parse(inspect.getdoc(hint) or "").short_description or ""
            _add_parameters(group.add_argument_group(title.rstrip(".")), hint)  # type: ignore[arg-type]
        else:
            is_option = is_dataclass(function) or parameter.kind is parameter.KEYWORD_ONLY
            _add_parameter(group, parameter, helps.get(parameter.name, ""), is_option)


def _add_parameter(group: Any, parameter: inspect.Parameter, text: str, is_option: bool) -> None:
    hint, default, name = parameter.annotation, parameter.default, parameter.name
    option = f"--{name.replace('_', '-')}"
    if hint is bool and default:
        group.add_argument(f"--no-{option[2:]}", dest=name, action="store_false", help=f"do not {text}")
        return
    if hint is bool:
        group.add_argument(option, action="store_true", help=text)
        return
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    settings: dict[str, Any] = {"type": hint, "help": text}
    if get_origin(hint) in (list, Sequence):
        settings |= {"type": get_args(hint)[0], "nargs": "+"}
    if is_option and isinstance(hint, type):
        metavars = ((int, "N"), (float, "X"), (Path, "PATH"))  # others are named after the option
        settings["metavar"] = next((name for kind, name in metavars if issubclass(hint, kind)), None)
    if default is parameter.empty:
        settings |= {"required": True} if is_option else {}
    else:
        settings["default"] = list(default) if "nargs" in settings else default
        settings |= {} if is_option else {"nargs": "?"}
        if is_option and default not in (None, "", (), []):
            shown = " ".join(map(str, default)) if "nargs" in settings else default
            settings["help"] = f"{text} (default: {shown})"
    group.add_argument(option if is_option else name, **settings)


def _keywords(function: Callable[..., Any], values: Any) -> dict[str, Any]:
    """The arguments of a function or a dataclass among the parsed values."""
    hints: dict[str, Any] = {parameter.name: parameter.annotation for parameter in _parameters(function)}
    return {
        name: hint(**_keywords(hint, values)) if is_dataclass(hint) else values[name]  # type: ignore[operator, arg-type]
        for name, hint in hints.items()
    }


def _split_arguments(
    parser: ArgumentParser, args: Sequence[str], forwarded: Forwarded
) -> tuple[list[str], list[str]]:
    """Split arguments into the command's own options with their values and those that are passed on, each in order."""
    listed = {option.split()[0] for option in forwarded.options}
    own: list[str] = []
    rest: list[str] = []
    pending = iter(args)
    for arg in pending:
        name, equals, _ = arg.partition("=")
        action = parser._option_string_actions.get(name)
        if action is None or name in listed:
            rest.append(arg)
        else:
            own += [arg, *([] if equals or action.nargs == 0 else islice(pending, 1))]
    return own, rest
