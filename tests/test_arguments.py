"""Commands from typed functions: how arguments reach a function, what the help shows, and which mistakes are named."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from vlm_calibration.arguments import Command, Forwarded, Subcommands, command_parser, run_command


@dataclass(frozen=True)
class Group:
    """settings of a group

    Attributes:
        max_size: a size
        quiet: print nothing, 100% of the time
    """

    max_size: PositiveInt | None = None
    quiet: bool = False


def command(
    folders: list[str],
    *,
    out: Path | None = None,
    kind: Literal["short", "open"] = "short",
    share: ClosedUnitInterval | None = None,
    names: Sequence[str] = ("a", "b"),
    images: bool = True,
    group: Group,
) -> tuple[Any, ...]:
    """Do something.

    Args:
        folders: where to look
        out: where to write
        images: show images
    """
    return folders, out, kind, share, images, group


def optional(image: str | None = None, question: str | None = None) -> tuple[str | None, str | None]:
    """Ask."""
    return image, question


SETTINGS = Forwarded(
    {"--config FILE": "a configuration", "--again": "start again"}, lambda: "More settings may follow."
)


def forwarding(*settings: Annotated[str, SETTINGS], tokens: PositiveInt | None = None) -> Any:
    """Hand on.

    Args:
        tokens: a number
    """
    return settings, tokens


def run(*args: str, command: Command = command) -> Any:
    return run_command("prog", command, args)


def test_values_reach_the_function_with_their_types() -> None:
    assert run("x") == (["x"], None, "short", None, True, Group())
    options = ("--out", "3", "--kind=open", "--share", "1", "--max-size", "4", "--no-images")
    assert run("--quiet", "x", "y", *options) == (["x", "y"], Path("3"), "open", 1.0, False, Group(4, True))


def test_texts_are_taken_as_they_are() -> None:
    for text in ("null", "true", "3", "Is it: a dog? [x] {y}", "100%", ""):
        assert run("a.png", text, command=optional) == ("a.png", text)
    assert run(command=optional) == (None, None)


def test_the_help_shows_groups_defaults_and_docstrings() -> None:
    page = " ".join(command_parser("prog", command).format_help().split())
    for text in (
        "usage: prog folders [folders ...] Do something.",
        "--kind {short,open}",
        "Do something.",
        "folders where to look",
        "--no-images do not show images",
        "settings of a group: --max-size N a size --quiet print nothing, 100% of the time",
        "(default: short)",
        "(default: a b)",
    ):
        assert text in page
    for text in ("--no-quiet", "(default: None)", "[--images]"):
        assert text not in page


def test_settings_are_passed_on_in_the_order_given() -> None:
    args = ("--a.b", "3", "--tokens", "7", "--config=x.yaml", "--c", "--config", "y.yaml")
    settings, tokens = run(*args, command=forwarding)
    assert settings == ("--a.b", "3", "--config=x.yaml", "--c", "--config", "y.yaml")
    assert tokens == 7
    page = command_parser("prog", forwarding).format_help()
    assert "--config FILE" in page
    assert page.endswith("More settings may follow.\n")


SUBCOMMANDS = Subcommands("Two of them.", {"ask": optional, "pass": forwarding})


def test_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ask", "x", command=SUBCOMMANDS) == ("x", None)
    run("--help", command=Subcommands("All.", {"more": SUBCOMMANDS}))
    run("more", "--help", command=Subcommands("All.", {"more": SUBCOMMANDS}))
    assert capsys.readouterr().out == (
        "usage: prog COMMAND ...\n\nAll.\n\n  more  Two of them.\n"
        "usage: prog more COMMAND ...\n\nTwo of them.\n\n  ask   Ask.\n  pass  Hand on.\n"
    )


@pytest.mark.parametrize(
    ("of", "args", "message"),
    [
        (command, [], "missing: folders; see `prog --help`"),
        (command, ["x", "--max-size", "0"], "--max-size: expected a whole number of at least 1, found '0'"),
        (command, ["x", "--share", "80%"], "--share: expected a number in [0, 1], found '80%'"),
        (
            command,
            ["x", "--kind", "opne"],
            "--kind: expected one of short, open, found 'opne' (did you mean open?)",
        ),
        (command, ["x", "--max_size", "3"], "unknown setting --max_size (did you mean --max-size?)"),
        (command, ["x", "--images"], "unknown setting --images (did you mean --no-images?)"),
        (command, ["x", "--out"], "argument --out: expected one argument"),
        (SUBCOMMANDS, [], "missing: one of ask, pass; see `prog --help`"),
        (SUBCOMMANDS, ["aks"], "no 'aks' (did you mean ask?): one of ask, pass; see `prog --help`"),
    ],
)
def test_mistakes_are_named_in_one_line(of: Command, args: list[str], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        run(*args, command=of)
    assert str(error.value) == message
