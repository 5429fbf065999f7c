"""Commands from typed functions: `run_command` builds a parser from the signature, parses the arguments and calls the function.

Neither torch nor Lightning is imported, and jsonargparse only when a command runs.
"""

from __future__ import annotations

import inspect
import textwrap
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, Union, get_args, get_origin

from vlm_calibration.errors import did_you_mean, explained_errors

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

METAVARS = {int: "N", float: "X", Path: "PATH"}
"""Type of an option -> how the help names its value; other values are named after the option."""


class Subcommands(NamedTuple):
    """A command that consists of others.

    Attributes:
        description: of all of them, for the help.
        functions: name of a subcommand -> its function, or the command that consists of others.
    """

    description: str
    functions: Mapping[str, Command]


Command: TypeAlias = Callable[..., Any] | Subcommands


class Forwarded(NamedTuple):
    """Annotation of a command's `*settings`: arguments that are passed on unparsed, in the order given.

    Attributes:
        options: the common ones, which `--help` lists: "--name METAVAR", or "--name" of a flag -> description.
        epilog: returns what stands below them.
        usage: what follows the command in the usage line.
    """

    options: Mapping[str, str]
    epilog: Callable[[], str]
    usage: str = "[--config NAME ...] [--KEY VALUE ...]"


ALL_SETTINGS = {"--help-all": "show all settings and exit"}
"""The option of a command that hands it on as the `--help` of another parser, see `with_full_help`."""


def with_full_help(args: Sequence[str]) -> list[str]:
    """Arguments for the parser that they are passed on to, whose `--help` is the command's `--help-all`."""
    return ["--help" if arg in ALL_SETTINGS else arg for arg in args]


def run_command(prog: str, command: Command, args: Sequence[str]) -> Any:
    """Parse the arguments of a command and call its function.

    Args:
        prog: the command as the usage line shows it.
        command: its function, whose signature and docstring define the parser (see `command_parser`), or its subcommands.
        args: what follows the command on the command line.

    Raises:
        ArgumentError: an argument is missing, unknown or wrong; in one line.
    """
    if isinstance(command, Subcommands):
        functions, name = command.functions, args[0] if args else ""
        if name in functions:
            return run_command(f"{prog} {name}", functions[name], args[1:])
        if name in ("-h", "--help"):
            rows = {name: description(function).split(". ")[0] for name, function in functions.items()}
            print(overview(f"{prog} COMMAND ...", command.description, rows))
            return None
        wrong = f"no {name!r}{did_you_mean(name, functions)}" if name else "missing"
        raise ArgumentError(None, f"{wrong}: one of {', '.join(functions)}; see `{prog} --help`")
    forwarded = _forwarded(command)
    parser = command_parser(prog, command)
    own, rest = _split_arguments(parser, args, forwarded) if forwarded else (args, [])
    with explained_errors(parser):
        values = parser.parse_args(own)
    return command(*rest, **_keywords(command, values))


def overview(usage: str, text: str, commands: Mapping[str, str]) -> str:
    """The help of a command that consists of others, by name with a description of each."""
    indent = max(map(len, commands)) + 4
    fill = partial(textwrap.fill, width=79, subsequent_indent=" " * indent, break_on_hyphens=False)
    lines = [fill(text, initial_indent=f"  {name}".ljust(indent)) for name, text in commands.items()]
    return "\n".join([f"usage: {usage}", "", textwrap.fill(text, 79, break_on_hyphens=False), "", *lines])


def command_parser(prog: str, function: Callable[..., Any]) -> ArgumentParser:
    """Build the parser of a command from its function.

    Parameters become positional arguments, keyword-only parameters `--options` with hyphens, booleans flags (`--x`, or `--no-x` where
    the default is true). The fields of a parameter that is a dataclass become a group of options under the first line of its
    docstring. Help texts come from docstrings.
    """
    from jsonargparse import ArgumentParser

    forwarded = _forwarded(function)
    parser = ArgumentParser(
        prog=prog,
        description=textwrap.fill(description(function), 79, break_on_hyphens=False).replace("%", "%%"),
        usage=forwarded and f"%(prog)s {forwarded.usage}",
        epilog=forwarded and forwarded.epilog(),
        formatter_class=RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    for option, text in forwarded.options.items() if forwarded else ():
        name, *metavars = option.split()
        value: dict[str, Any] = {"metavar": metavars[0]} if metavars else {"action": "store_true"}
        parser.add_argument(name, help=text, **value)
    _add_parameters(parser, function)
    return parser


def _forwarded(function: Callable[..., Any]) -> Forwarded | None:
    """The annotation of the function's `*settings`, if it has any."""
    for parameter in _parameters(function):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return next(m for m in get_args(parameter.annotation) if isinstance(m, Forwarded))
    return None


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())


def description(command: Command) -> str:
    """The docstring of a command up to its first section, in one line."""
    from docstring_parser.google import parse

    if isinstance(command, Subcommands):
        return command.description
    docstring = parse(inspect.getdoc(command) or "")
    text = " ".join(filter(None, [docstring.short_description, docstring.long_description]))
    return " ".join(text.split())


def _add_parameters(group: Any, function: Callable[..., Any]) -> None:
    """Add the parameters of a function, or the fields of a dataclass, to a parser or a group of one."""
    from docstring_parser.google import parse

    documented = parse(inspect.getdoc(function) or "").params
    helps = {p.arg_name: " ".join((p.description or "").split()).replace("%", "%%") for p in documented}
    for parameter in _parameters(function):
        hint: Any = parameter.annotation
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if is_dataclass(hint):
            title = parse(inspect.getdoc(hint) or "").short_description
            _add_parameters(group.add_argument_group(title), hint)  # type: ignore[arg-type]
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
        # The type of an optional parameter that is given.
        types = [kind for kind in get_args(hint) if kind is not type(None)]
        hint = types[0] if len(types) == 1 else hint
    required = default is parameter.empty
    settings: dict[str, Any] = {"type": hint, "help": text}
    if get_origin(hint) in (list, Sequence):
        settings |= {"type": get_args(hint)[0], "nargs": "+"}
        default = list(default) if not required else None
    if not is_option:
        settings.setdefault("nargs", None if required else "?")
        if settings["nargs"] == "?":
            settings["default"] = default
        group.add_argument(name, **settings)
        return
    if not required and default not in (None, [], ""):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        settings["help"] = f"{text} (default: {shown})"
    if isinstance(hint, type):
        settings["metavar"] = next((m for kind, m in METAVARS.items() if issubclass(hint, kind)), None)
    group.add_argument(option, required=required, default=None if required else default, **settings)


def _keywords(function: Callable[..., Any], values: Any) -> dict[str, Any]:
    """The arguments of a function or a dataclass among the parsed values."""
    keywords = {}
    for parameter in _parameters(function):
        hint: Any = parameter.annotation
        if is_dataclass(hint):
            keywords[parameter.name] = hint(**_keywords(hint, values))  # type: ignore[operator, arg-type]
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            keywords[parameter.name] = values[parameter.name]
    return keywords


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
