"""Commands that read the configuration of `fit` or `test` and do something else with it: `levels`, `estimate` and `data`.

Their help is their own page; Lightning is imported only when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_calibration.arguments import Parser, explained_errors, positive


def levels_parser() -> Parser:
    """The parser of `levels`; other settings than it knows are those of the configuration."""
    parser = Parser("vlm-calibration levels", description="What anchored levels teach.")
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    fit = commands.add_parser(
        "fit",
        help="measure a base model and write a level table",
        description="Measure how often the base model is right at every noise step, on held-out queries, and write the level "
        "table that AnchoredLevels reads. Without a GPU or data of your own: --config levels measures the demo's model.",
        epilog="Every other setting of the configuration may follow: `vlm-calibration test --help` lists those of trainer and "
        "data, `vlm-calibration test --model.help LevelFitModule` those of the module.",
    )
    _add_config(fit, "configs/levels.yaml, and overlays behind it")
    fit.add_argument(
        "--model.init_args.base.name_or_path", metavar="MODEL", help="name or folder of the base model"
    )
    fit.add_argument("--model.init_args.out", metavar="FILE", help="where the level table goes")
    fit.add_argument(
        "--trainer.default_root_dir", metavar="DIR", help="folder of the measurement's own files"
    )
    return parser


def levels_command(args: Sequence[str]) -> None:
    """`levels fit`: measure the base model at every noise step and write a level table.

    Raises:
        ArgumentError: the call makes no sense. DataError: a setting, a file or a model cannot be used.
    """
    with explained_errors(parser := levels_parser()):
        parser.parse_known_args(args)
    from vlm_calibration.cli.lightning_cli import lightning_command

    module = lightning_command(["test", *args[1:]]).model
    print(f"wrote {module.out}")


def estimate_parser() -> Parser:
    """The parser of `estimate`; other settings than it knows are those of `fit`."""
    parser = Parser(
        "vlm-calibration estimate-memory",
        parents=[_tokens_parser()],
        description="Estimate the GPU memory that `fit` takes with the same settings; needs neither a GPU nor the weights.",
        epilog="Every setting of `fit` may follow: `vlm-calibration fit --help` lists them.",
    )
    _add_config(parser, "configuration of `fit`: configs/sft.yaml, and overlays behind it")
    return parser


def _tokens_parser() -> Parser:
    parser = Parser("vlm-calibration estimate-memory", add_help=False)
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens of a prompt with its image and a response (default: data.max_length, the most that is let through)",
    )
    return parser


def estimate_command(args: Sequence[str]) -> None:
    """`estimate`: the memory that `fit` takes with the same settings.

    Raises:
        ArgumentError: the call makes no sense. DataError: a setting or a model cannot be used.
    """
    with explained_errors(parser := estimate_parser()):
        parser.parse_known_args(args)
        # What is left is in the order given: later settings count.
        own, rest = _tokens_parser().parse_known_args(args)
    from vlm_calibration.cli.lightning_cli import parsed_fit
    from vlm_calibration.commands.estimate_memory import print_memory

    print_memory(parsed_fit(rest), own.tokens)


def data_parser() -> Parser:
    """The parser of `data`; other settings than it knows are those of the configuration."""
    parser = Parser("vlm-calibration data", description="What is in data, before anything is trained on it.")
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="counts, balance, image sizes, coverage of regions and bad records",
        description="Print what is in the sources of a configuration: counts, balance, image sizes, how much of an image "
        "regions cover, and bad records.",
        epilog="Settings of `data` may follow, e.g. --data.train.init_args.path FILE; those of trainer and model in a file "
        "are passed over.",
    )
    _add_config(inspect, "a configuration, of which the section `data` counts, and overlays behind it")
    inspect.add_argument(
        "--sample",
        type=positive,
        default=200,
        metavar="N",
        help="images to open, of each source (default: 200)",
    )
    return parser


def data_command(args: Sequence[str]) -> None:
    """`data inspect`: what is in the sources of a configuration.

    Raises:
        ArgumentError: the call makes no sense. DataError: a configuration file or a source cannot be used.
    """
    with explained_errors(parser := data_parser()):
        own, rest = parser.parse_known_args(args)
        if not (own.config or rest):
            parser.error("data inspect: nothing to inspect: give --config FILE")
    from vlm_calibration.commands.inspect import inspect_data

    inspect_data([Path(path) for path in own.config], rest, own.sample)


def _add_config(parser: Parser, what: str) -> None:
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help=f"{what} (may be repeated)"
    )
