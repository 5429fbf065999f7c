"""The one command, `vlm-calibration`: its subcommands, and `main`, which runs one of them and prints its errors in one line."""

import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from ctypes import CDLL
from importlib.metadata import version

from vlm_calibration.arguments import Lazy, Subcommands, run_command
from vlm_calibration.errors import CommandError, one_line
from vlm_calibration.quiet import quiet_libraries
from vlm_calibration.records import DataError

PROG = "vlm-calibration"
COMMANDS = Subcommands(
    f"First: `{PROG} calibrate` trains and evaluates the embedded demo in minutes, without a GPU or data of your own. "
    f"`{PROG} COMMAND --help` lists the settings of a command, `{PROG} --version` prints the version.",
    {
        "fit": Lazy("train: SFT or preference optimisation", "commands.trainer:fit"),
        "validate": Lazy("answer and score the validation queries", "commands.trainer:validate"),
        "test": Lazy("evaluate the base model and adapters side by side", "commands.trainer:test"),
        "predict": Lazy("find the regions of key objects", "commands.trainer:predict"),
        "levels": Lazy("`levels fit`: measure the level table of anchored levels", "commands.trainer:LEVELS"),
        "calibrate": Lazy(
            "all stages, or some, of a calibration: regions, levels, sft, dpo, evaluate, report",
            "cli.calibrate:calibrate",
        ),
        "score": Lazy("a file of answers: POPE, AMBER or predictions", "commands.score:SUBCOMMANDS"),
        "runs": Lazy("the runs in a folder: stage, state, key figures, how to go on", "commands.runs:runs"),
        "report": Lazy("a page on whether confidence can be trusted", "commands.report:report"),
        "threshold": Lazy(
            "the confidence from which on to answer, with a guarantee", "commands.threshold:threshold"
        ),
        "monitor": Lazy(
            "are the confidences of new, ungraded answers still those of an evaluation?",
            "commands.monitor:monitor",
        ),
        "app": Lazy("a web page to try the models in, on this machine", "commands.app:app"),
        "ask": Lazy("one question about an image, or many from a file", "commands.ask:ask"),
        "export": Lazy("an adapter with its card, or merged into its base", "commands.export:export"),
        "dashboard": Lazy("a workspace and a report in W&B, as code", "commands.dashboard:dashboard"),
        "data": Lazy(
            "`data inspect`: what sources hold and share; `convert`: published formats; `split`: one file into four; `fetch`: POPE and AMBER",
            "commands.data:SUBCOMMANDS",
        ),
        "config": Lazy(
            "`config list|show|copy`: the presets that --config takes by name", "commands.config:SUBCOMMANDS"
        ),
        "estimate-memory": Lazy(
            "GPU memory that stages take, by arithmetic and measured", "commands.estimate_memory:estimate"
        ),
        "completion": Lazy(
            "a script that completes commands and settings in bash or zsh", "cli.calibrate:completion"
        ),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 for an error in the data, 2 for an error in the call, 3 if `threshold` finds none or `monitor` finds
            drift, 4 if `ask --abstain` does not answer, 130 or 143 if the run was stopped, 141 if nobody reads its output any more.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"{PROG} {version(PROG)}")
        return 0
    quiet_libraries()
    # Threads that wait for each other sleep: spinning ones starve data workers and whatever else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if hasattr(libc := CDLL(None), "mallopt"):
        # Steps on a CPU allocate and free the same large tensors: let glibc keep up to 1 GiB for reuse.
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD
    try:
        run_command(PROG, COMMANDS, args or ["--help"])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, such as `head`, has ended. Python writes the rest at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ArgumentError as error:
        return _fail(one_line(error), 2)
    except DataError as error:
        if os.environ.get("VLM_CALIBRATION_TRACEBACK"):
            raise
        return _fail(one_line(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except CommandError as end:
        return _fail(end.message, end.status)
    return 0 if args else 2


def _fail(message: str, status: int) -> int:
    if message:
        print(f"{PROG}: error: {message}", file=sys.stderr)
    return status
