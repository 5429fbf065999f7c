"""The claims of the README and of the pages of folders: the command line takes every command, and named files exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from dataclasses import fields
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_calibration.arguments import Subcommands, run_command
from vlm_calibration.cli import COMMANDS as COMMAND_LINE
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.records import Query

from .performance.__main__ import BENCHMARKS
from .test_configs import Parse
from .test_configs import parse as parse

ROOT = Path(__file__).parents[1]
PROGRAMS = ("vlm-calibration", "make", "python", "pip", "jupyter", "wandb", "conda", "coverage")
PAGES = sorted(
    page for name in ("configs", "notebooks", "src", "tests") for page in (ROOT / name).rglob("README.md")
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a page: lines of ```bash and indented blocks, and code spans that begin with a program's name.

    Comments are removed and continued lines joined. Other indented lines are formulas and settings.

    Raises:
        ValueError: a block in an unknown language.
    """
    lines: list[str] = []
    for language, block in BLOCK.findall(text):
        if language not in ("bash", "bibtex", "json", "python", "text"):
            raise ValueError(f"a block of {language or 'no language'}")
        if language == "bash":
            lines += block.replace("\\\n", " ").splitlines()
    rest = BLOCK.sub("", text)
    for line in re.findall(r"^ {4}(\S.*)$", rest, re.MULTILINE):
        if Path(line.split()[0]).name in PROGRAMS:
            lines.append(line)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    lines += [span for span in spans if " " in span and Path(span.split()[0]).name in PROGRAMS]
    stripped = (" ".join(re.sub(r"(^|\s)# .*$", "", line).split()) for line in lines)
    return list(dict.fromkeys(line for line in stripped if line))


README, *_ = TEXTS = [page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *PAGES)]
COMMANDS = list(dict.fromkeys(command for text in TEXTS for command in commands(text)))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_other_programs_find_what_they_are_called_with() -> None:
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "make":
            # A dry run fails if the target or one of its dependencies is missing.
            environment = {k: v for k, v in os.environ.items() if k not in ("ARGS", "MAKEFLAGS", "MAKELEVEL")}
            command_line = [program, *words, "-n"]
            ran = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            assert all(name in BENCHMARKS for name in re.findall(r"--only (\w+)", command)), command
        elif "install" in words:
            ours = [word for word in words if word.startswith(("vlm-calibration", "."))]
            assert all(extra in EXTRAS for word in ours for extra in re.findall(r"\[(\w+)\]", word)), command
        elif "-m" in words:
            assert find_spec(words[words.index("-m") + 1]) is not None, command
        else:
            assert Path(program).name in (*PROGRAMS, "source", "vllm") or "=" in program, command


EXCERPTS = ("vlm-calibration COMMAND --help", "vlm-calibration ask --abstain", "vlm-calibration data convert")
"""What a sentence names of a command; it does not run as it stands."""
CALLS = [c for c in COMMANDS if c.startswith("vlm-calibration ") and c not in EXCERPTS and "help" not in c]


@pytest.mark.parametrize("written", CALLS)
def test_the_command_line_takes_it(
    written: str, parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of a command that runs elsewhere, and its configuration."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my_data", "DIR"):
        Path(folder).mkdir()
    name, *words = [word for word in shlex.split(written)[1:] if word != "$settings"]
    command: Any = COMMAND_LINE.commands[name].load()  # type: ignore[union-attr]
    while isinstance(command, Subcommands):
        subcommand, *words = words
        command = command.commands[subcommand]
    taken: list[tuple[str, ...]] = []

    @wraps(command)
    def take(*settings: str, **_: Any) -> None:
        taken.append(settings)

    run_command(name, take, words)
    if taken and name in ("fit", "test", "predict", "levels"):
        parse(["test" if name == "levels" else name, *taken[0]])


def test_no_command_runs_a_module_of_the_tests() -> None:
    assert [command for command in commands(README) if "tests." in command or "tests/" in command] == []


WRITTEN = {
    *("adapter/", "checkpoints/", "checkpoints/last.ckpt", "official/", "wandb/"),
    *("config.yaml", "metrics.json", "predictions.jsonl", "contact_sheet.png", "thresholds.json"),
    *("config.json", "generation_config.json"),
}
"""What commands write, below a run directory or a folder that one names."""


def _paths(page: Path) -> set[str]:
    """The code spans of a page that are paths in the repository, without placeholders such as `RUNS_DIR/eval` and patterns."""
    spans = re.findall(r"`([a-z0-9_][\w/.-]*)`", page.read_text(encoding="utf-8"))
    return {
        span
        for span in spans
        if span not in WRITTEN
        and re.search(r"/|\.(py|yaml|sh|sbatch|def|ipynb|md|jsonl?|toml|png)$", span)
        and not re.search(r"[A-Z]{3}|^runs/", span)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_the_page_of_a_folder_names_existing_files(page: Path) -> None:
    paths = _paths(page)
    assert paths
    names = {path for path in paths if (ROOT / "configs" / f"{path}.yaml").exists()}
    assert [p for p in paths - names if not (page.parent / p).exists() and not (ROOT / p).exists()] == []


@pytest.mark.parametrize("folder", ["configs/slurm", "notebooks", "tests/performance"])
def test_the_page_of_a_folder_lists_every_file(folder: str) -> None:
    files = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
    assert files - _paths(ROOT / folder / "README.md") <= {"README.md"}


def test_the_query_of_the_readme_loads(tmp_path: Path) -> None:
    [(_, example)] = [block for block in BLOCK.findall(README) if block[0] == "json"]
    (tmp_path / "train.jsonl").write_text(example, encoding="utf-8")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (320, 240)).save(tmp_path / "images/street.jpg")
    source = JsonlSource(str(tmp_path / "train.jsonl"))
    [query] = source.queries()
    loaded = source.load(query)
    assert query.answer_type == "yes_no"
    [mask] = loaded.evidence
    # The table defines a box as x0, y0, x1, y1 in pixels.
    assert mask[40:200, 20:180].all()
    assert mask.sum() == 160 * 160


def _table(page: str, head: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8").split(head, 1)[1].split("\n\n", 1)[0]


def test_the_table_has_the_keys_of_a_query() -> None:
    table = _table("configs/data/README.md", "| key | meaning |")
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    keys = [key for cell in first for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(keys) == sorted(field.name for field in fields(Query))


def test_the_table_has_every_extra_that_a_command_needs() -> None:
    table = _table("configs/README.md", "| extra | commands that need it |")
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == EXTRAS.keys() - {"bench", "dev"}


def test_the_table_of_models_has_the_memory_of_each_preset() -> None:
    page = (ROOT / "configs/model/README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(model/\w+)`[^|]*\| ([\d.]+) GiB \| ([\d.]+) GiB", page, re.MULTILINE)
    measured = []
    for path in (ROOT / "configs/model").glob("*.yaml"):
        comment = path.read_text(encoding="utf-8")
        [weights] = re.findall(r"^# .* = ([\d.]+) GiB$", comment, re.MULTILINE)
        [step] = re.findall(r"tokens add about ([\d.]+) GiB", comment)
        measured.append((f"model/{path.stem}", weights, step))
    assert sorted(shown) == sorted(row for row in measured if row[0] != "model/qlora")
