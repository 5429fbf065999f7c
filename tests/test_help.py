"""What is told without a heavy import: the help of every command and subcommand, and mistakes that need no model."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.arguments import Command, Lazy, Subcommands
from vlm_calibration.cli import COMMANDS, main

from .command_line import Run

pytestmark = pytest.mark.slow

OPTIONS = re.compile(r"(?<![\w-])--[a-z][\w-]*(?![\w.-])")
"""Options without a dot; those with one are settings of a configuration, spelt as in a file."""
LIGHTNINGS = {"--ckpt_path", "--print_config"}
"""Lightning's own options, spelt as Lightning does."""
HEAVY = ("torch", "lightning", "transformers", "peft", "wandb", "gradio", "matplotlib")
COMMON = {
    "fit": (
        *("--config", "--data-root", "--runs", "--model.init_args.adapter", "optimizer.lr", "--ckpt_path"),
        *("--trainer.devices", "--trainer.max_steps", "--data.batch_size", "--trainer.default_root_dir"),
        *("--overwrite", "--resume", "sft, dpo", "qwen2_5_vl_7b", "experiment/: anchored"),
    ),
    "validate": ("sft, dpo",),
    "test": ("--model.init_args.adapters", "eval/pope"),
    "predict": ("--data.parts", "regions"),
    "levels fit": ("--config", "--model.init_args.out", "AnchoredLevels"),
    "calibrate": ("--model", "--data-root", "--dry-run", "--STAGE.KEY"),
    "data inspect": ("--config", "--help-all", "--samples", "--no-leaks", "--strict"),
    "estimate-memory": ("--config", "--tokens", "--measure", "memory"),
}
"""Command that hands settings on -> texts on its page."""


def _pages(name: str, command: Command) -> dict[str, list[str]]:
    """Each command that has a page -> the subcommands or options that it names."""
    command = command.load() if isinstance(command, Lazy) else command
    if not isinstance(command, Subcommands):
        parameters = inspect.signature(command).parameters.values()
        return {name: [p.name.replace("_", "-") for p in parameters if p.kind is p.KEYWORD_ONLY]}
    inner = [_pages(f"{name} {sub}".strip(), subcommand) for sub, subcommand in command.commands.items()]
    return {name: list(command.commands)} | {page: names for pages in inner for page, names in pages.items()}


NAMES = _pages("", COMMANDS)
GROUPS = {"plan", "model", "many", "key-objects", "output"}
"""Parameters that are groups of options."""
MISTAKES = {
    "": (2, ""),
    "fiit": (2, "no 'fiit' (did you mean fit?): one of fit, validate, test"),
    "levels": (2, "missing: one of fit; see `vlm-calibration levels --help`"),
    "fit --config sftt": (2, "'sftt' is neither a file nor a preset (did you mean sft?)"),
    "fit --config sft --trainer.max_step 3": (2, "--trainer.max_step (did you mean --trainer.max_steps?)"),
    "fit --config sft --model.lorra.r 3": (2, "model.init_args.lorra.r (did you mean lora?)"),
    "fit --config sft --overwrit": (2, "--overwrit (did you mean --overwrite?)"),
    'test --config eval/demo --config {"data":{"bach_size":3}}': (2, "(did you mean data.batch_size?)"),
    "levels fit --config levels --max_steps 3": (2, "--max_steps (did you mean --trainer.max_steps?)"),
    "estimate-memory --config sft --data.bach_size 3": (2, "(did you mean --data.batch_size?)"),
    "calibrate --preset pape": (2, "'experiment/pape' is neither"),
    "calibrate sft dpo --trainer.max_step 3": (2, "--trainer.max_step (did you mean --trainer.max_steps?)"),
    "calibrate --data jsonl --data-root nowhere": (1, "data root nowhere: there is no such folder"),
    "ask": (2, "give an image and a question, or --questions FILE"),
    "ask nowhere.png dog?": (1, "nowhere.png: no such file"),
    "ask a.png dog? --out b": (2, "--out is for many questions"),
    "ask a.png dog? --batch-size 3": (2, "--batch-size is for many questions"),
    "ask a.png dog? --questions f --out b": (2, "give either an image and a question, or"),
    "ask --questions f": (2, "give --out FILE"),
    "ask --questions f --out b --category x": (2, "--category is for one question"),
    "ask --questions nowhere.jsonl --out x": (1, "nowhere.jsonl: cannot be read"),
    "ask a.png dog? --adaptor x": (2, "unknown setting --adaptor (did you mean --adapter?)"),
    "app --adapter nowhere": (1, "no adapter at nowhere"),
    "export nowhere --out x": (1, "no adapter at nowhere"),
    "report nowhere": (1, "no predictions.jsonl in nowhere"),
    "threshold nowhere": (1, "no predictions.jsonl in nowhere"),
    "monitor --reference nowhere --new x": (1, "no predictions.jsonl in nowhere"),
    "score pope nowhere --labels x": (1, "x: cannot be read"),
    "data inspect --config x": (2, "'x' is neither a file nor a preset"),
    "data split nowhere.jsonl": (1, "nowhere.jsonl: no such file"),
}
"""Command -> its exit status, and a part of its error."""
# Prints, as JSON, of each command: its exit status, its output and errors, and which of the heavy packages are imported after it.
RUN = """
import contextlib, io, json, sys
import vlm_calibration
from vlm_calibration import Plan, parse_confidence
from vlm_calibration.cli import main
ended = {{}}
for command in {commands}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command.split())
        except SystemExit as end:
            status = end.code
    heavy = [name for name in {heavy} if name in sys.modules]
    ended[command] = status, out.getvalue(), err.getvalue(), heavy
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def answered() -> dict[str, Any]:
    """Each page and mistake -> what `RUN` prints of it, all in one process."""
    commands = [*(f"{name} --help".strip() for name in NAMES), *MISTAKES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-c", RUN.format(commands=commands, heavy=HEAVY)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ran.stderr == ""
    return dict(json.loads(ran.stdout))


@pytest.mark.parametrize("command", NAMES)
def test_a_page_of_its_own_without_a_framework(answered: dict[str, Any], command: str) -> None:
    status, page, err, imported = answered[f"{command} --help".strip()]
    assert (status, err) == (0, "")
    assert page.startswith(f"usage: vlm-calibration {command}".strip()), page
    expected = [*COMMON.get(command, ()), *(name for name in NAMES[command] if name not in GROUPS)]
    assert [name for name in expected if name not in page] == []
    assert len(page.splitlines()) <= 50, "one screen"
    assert max(map(len, page.splitlines())) <= 80
    assert {o for o in OPTIONS.findall(page) if "_" in o} <= LIGHTNINGS
    assert imported == [], "imported for a page of text"


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_before_torch_is_imported(answered: dict[str, Any], command: str) -> None:
    status, out, err, imported = answered[command]
    expected, says = MISTAKES[command]
    assert (status, out == "", imported) == (expected, command != "", [])
    assert says in err
    assert err.count("\n") == (command != "")


def test_without_a_command_it_says_what_to_type_first(answered: dict[str, Any]) -> None:
    assert "First: `vlm-calibration calibrate`" in answered[""][1]


@pytest.mark.parametrize("command", ["fit", "test", "data inspect"])
def test_the_common_settings_are_among_all(run: Run, answered: dict[str, Any], command: str) -> None:
    ended = run(*command.split(), "--help-all")
    assert (ended.status, ended.errors) == (0, [])
    known = set(re.findall(r"--[\w.-]+", ended.out))
    assert {"--config", "--data.batch_size", "--data.train.help"} <= known
    assert ("--trainer.max_epochs" in known) == (command != "data inspect")
    common = set(re.findall(r"^  (--[\w.-]+)", answered[f"{command} --help"][1], re.MULTILINE))
    of_model = {name for name in common if name.startswith("--model.init_args.")}
    own = {"--help-all", "--samples", "--no-leaks", "--strict"}
    assert len(common) > 5
    assert common - own - of_model - known == set()


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlm-calibration {version('vlm-calibration')}\n"


COMPLETED = {
    "": {"fit", "levels", "completion"},
    "fit --trainer.max_e": {"--trainer.max_epochs"},
    "fit --model.lora.al": {"--model.lora.alpha"},
    "levels f": {"fit"},
    "levels fit --model.init_args.o": {"--model.init_args.out"},
    "data inspect --sa": {"--samples"},
    "score amber --only a": {"attribute"},
    "ask --quantization n": {"none", "nf4"},
    "fit --config confi": {"config.yaml"},
}
"""Typed words -> completions that must be offered."""
BASH = """
source "$1"
while read -ra words; do
    COMP_WORDS=(vlm-calibration "${words[@]:-}"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _shtab_vlm_calibration
    echo "${COMPREPLY[*]}"
done
"""
"""Prints a line of completions for each line that it reads."""


def test_bash_completes(run: Run, tmp_path: Path) -> None:
    ended = run("completion", "bash").checked()
    script = tmp_path / "script"
    script.write_text(ended.out)
    (tmp_path / "config.yaml").touch()
    command = ["bash", "--norc", "-c", BASH, "bash", str(script)]
    typed = "".join(f"{words}\n" for words in COMPLETED)
    ran = subprocess.run(command, cwd=tmp_path, input=typed, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    offered = ran.stdout.splitlines()
    missing = [names - {*line.split()} for names, line in zip(COMPLETED.values(), offered, strict=True)]
    assert not any(missing), missing


@pytest.mark.nightly
def test_zsh_gets_a_script_of_its_own(run: Run) -> None:
    assert run("completion", "zsh").out.startswith("#compdef vlm-calibration")
