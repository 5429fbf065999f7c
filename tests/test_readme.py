"""The claims of the README and of the pages of folders: the command line takes every command, and a named test runs it.

A command that no table names fails. Also checks that the pages of folders name existing files.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_calibration.arguments import Subcommands, run_command
from vlm_calibration.cli import COMMANDS as SUBCOMMANDS
from vlm_calibration.cli import load
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.records import Query

from .performance.__main__ import BENCHMARKS
from .test_configs import parse as parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
            raise ValueError(
                f"a block of {language or 'no language'}: expected bash, bibtex, json, python or text"
            )
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


WALK = [
    "vlm-calibration data split my_data/queries.jsonl --on-bad-record skip",
    "vlm-calibration data inspect --config data/jsonl --data-root my_data",
    'settings="--config model/qwen2_5_vl_7b --config data/jsonl --config experiment/anchored --data-root my_data --runs runs/mine"',
    'settings="$settings --data.regions runs/mine/regions --resume"',
    "vlm-calibration predict --config regions $settings",
    "vlm-calibration levels fit --config levels $settings",
    "vlm-calibration fit --config sft $settings",
    "vlm-calibration fit --config dpo $settings --config experiment/anchored_dpo",
    "vlm-calibration test --config eval/jsonl $settings",
    "vlm-calibration report runs/mine/eval",
]
"""From a file of queries to a report."""
RUN_BY: dict[str, str] = {
    **dict.fromkeys(WALK, "one after the other: tests/test_acceptance.py"),
    "make calibrate MODEL=qwen2_5_vl_7b DATA=jsonl DATA_ROOT=my_data RUN=mine": "needs a model: tests/test_stages.py",
    "make regions": "needs data without regions: tests/test_stages.py",
    **dict.fromkeys(
        (
            "vlm-calibration fit --help",
            "vlm-calibration fit --help-all",
            "vlm-calibration fit --model.help SFTModule",
            "vlm-calibration completion bash",
        ),
        "tests/test_help.py",
    ),
    **dict.fromkeys(
        (
            "vlm-calibration export runs/sft --merge --out exported",
            "vlm-calibration report runs/eval",
            "vlm-calibration test --config eval/pope --model.init_args.adapters '{sft: runs/sft/adapter}'",
        ),
        "tests/commands/test_export.py, tests/test_quiet.py and tests/callbacks/test_official.py",
    ),
    "vlm-calibration predict --config regions --config data/jsonl": "tests/test_regions.py",
    'vlm-calibration ask photo.jpg "Is there a dog in the image?" --adapter runs/dpo': "tests/commands/test_ask.py",
    "vlm-calibration estimate-memory --config sft --config model/qwen2_5_vl_7b --config model/qlora": (
        "tests/commands/test_estimate_memory.py"
    ),
    **dict.fromkeys(
        (
            "vlm-calibration score pope answers.jsonl --labels coco_pope_random.json --json",
            "vlm-calibration score amber answers.json --annotations annotations.json --write-official for_amber.json",
        ),
        "tests/commands/test_score.py",
    ),
    "vlm-calibration config list": "tests/commands/test_config.py",
    "vlm-calibration runs": "tests/commands/test_runs.py",
    "make demo": "is what .ci/run begins with",
    "make demo-paper": "takes half an hour: tests/test_configs.py parses its settings",
    "make test-all": "runs this test",
    **dict.fromkeys(
        (
            "vlm-calibration calibrate",
            "vlm-calibration calibrate --model qwen2_5_vl_7b --data jsonl --data-root my_data --runs runs/mine",
            "vlm-calibration calibrate sft dpo --model qwen2_5_vl_7b --data jsonl --data-root my_data --runs runs/mine --dry-run",
        ),
        "tests/test_stages.py",
    ),
    "make demo-figure": "needs an evaluation: tests/figures/test_before_after.py",
    "make train-sft": "takes minutes: tests/test_packaging.py and tests/test_cli.py",
    "make train-dpo": "takes minutes: tests/test_packaging.py and tests/test_cli.py",
    "python -m tests.performance.demo_seeds --test": "takes an hour: tests/test_configs.py has its calls",
    "python -m tests.performance.demo_seeds --systems noise-alone without-noise without-blur without-occlusion": (
        "takes an hour: tests/test_configs.py has its table"
    ),
    **dict.fromkeys(
        (
            "python -m tests.performance.drift",
            "python -m tests.performance.thresholds",
            "python -m tests.performance.data_path",
            "python -m tests.performance.preference --rounds 3 --no-memory",
            'make bench ARGS="--only preference"',
            "python -m tests.performance.long_rows --rounds 3",
            "python -m tests.mutants",
        ),
        "takes minutes",
    ),
    "python -m tests.performance.serving": "takes minutes, and needs vLLM",
    "make test": "runs this test",
    "make test-fast": "runs tests: tests/test_packaging.py has the call",
    "make lint type": "is run by .ci/run",
    "make bench": "takes hours",
    "make bench-gpu": "needs a GPU: tests/test_gpu_benchmark.py",
    'make bench-gpu ARGS="--device cpu --models tiny"': "takes minutes: tests/test_gpu_benchmark.py",
    "make app": "serves until it is stopped: tests/test_packaging.py has the call",
    "make slurm-sft": "needs SLURM: tests/slurm/test_jobs.py",
    "make slurm-dpo": "needs SLURM: tests/slurm/test_jobs.py",
    "make slurm-all": "needs SLURM: tests/slurm/test_jobs.py",
    "make slurm-all MODEL=qwen2_5_vl_7b DATA=jsonl DATA_ROOT=my_data RUN=mine GPUS=8 PARTITION=gpu": "needs SLURM: tests/slurm/test_jobs.py",
    "pip install '.[demo]'": "downloads: tests/test_packaging.py installs the package",
    "conda env create -f environment.yml": "needs conda: tests/test_packaging.py compares the requirements",
    "make setup": "downloads: .ci/run begins with it",
    "source .venv/bin/activate": "is a shell's own",
    "vlm-calibration fit --config sft --config model/qwen2_5_vl_7b --config data/jsonl --data-root my_data --runs runs/mine": "as below",
    "vlm-calibration data split my_data/all.jsonl": "tests/data/test_split.py",
    "vlm-calibration data fetch pope": "downloads: tests/benchmarks/test_fetch.py",
    "vlm-calibration levels fit --config levels --config model/qwen2_5_vl_7b --config data/jsonl --data-root DIR --data.noise.kinds '{noise: 2, blur: 1, occlusion: 1}'": (
        "tests/stages/test_level_fit.py"
    ),
    "vlm-calibration test --config eval/demo --config eval/demo_development --model.init_args.adapters '{sft: runs/sft/adapter}'": (
        "takes minutes: tests/test_configs.py"
    ),
    **dict.fromkeys(
        (
            "vlm-calibration threshold runs/eval --max-error 0.1",
            "vlm-calibration threshold runs/eval --max-error 0.05 --certainty 0.95",
        ),
        "needs answers to a calibration set: tests/commands/test_threshold.py",
    ),
    "vlm-calibration monitor --reference runs/eval --system dpo --new answers.jsonl": "tests/commands/test_monitor.py",
    "vlm-calibration monitor --reference runs/eval --system dpo --new answers.jsonl --by answer_type": (
        "tests/commands/test_monitor.py"
    ),
    **dict.fromkeys(
        (
            "vlm-calibration data convert",
            "vlm-calibration data convert sharegpt DIR/conversations.json --out DIR/queries.jsonl --skip-bad",
            "vlm-calibration data convert hf OWNER/NAME --split train --columns '{answer: label, id: question_id}' --out DIR/queries.jsonl",
            "vlm-calibration data convert vqav2 DIR/v2_OpenEnded_mscoco_train2014_questions.json DIR/v2_mscoco_train2014_annotations.json --images DIR/train2014 --out DIR/queries.jsonl",
            "vlm-calibration data convert gqa DIR/train_balanced_questions.json --scene-graphs DIR/train_sceneGraphs.json --images DIR/images --out DIR/queries.jsonl",
            "vlm-calibration data convert rlaif_v DIR/rlaif_v --out DIR/queries.jsonl --skip-bad",
        ),
        "tests/data/test_convert.py",
    ),
    "vlm-calibration data split DIR/queries.jsonl": "tests/data/test_split.py",
    **dict.fromkeys(
        (
            "vlm-calibration calibrate --data jsonl --data-root DIR",
            "vlm-calibration calibrate --model qwen2_5_vl_7b --data jsonl --data-root DIR --runs runs/mine",
            "vlm-calibration calibrate levels sft dpo evaluate report --model qwen2_5_vl_7b --data jsonl --data-root DIR --runs runs/mine",
            "vlm-calibration calibrate --model qwen2_5_vl_7b --data jsonl --data-root DIR --runs runs/mine --data.grading.open token_f1 --data.grading.rank_levels true",
        ),
        "need a GPU and data: tests/test_configs.py parses every command",
    ),
    **dict.fromkeys(
        (
            "vlm-calibration estimate-memory --config model/qwen2_5_vl_7b",
            "vlm-calibration estimate-memory --measure --config dpo --config model/qwen2_5_vl_7b",
        ),
        "tests/commands/test_estimate_memory.py",
    ),
    **dict.fromkeys(
        (
            "vlm-calibration test --config eval/pope --config system/endpoint --url http://127.0.0.1:8000/v1 --served-model NAME",
            'vlm-calibration ask photo.jpg "Is there a dog?" --url http://127.0.0.1:8000/v1 --served-model NAME',
        ),
        "need a server: tests/endpoint/test_commands.py",
    ),
    "vlm-calibration ask --abstain": "needs thresholds: tests/commands/test_ask.py",
    "vlm-calibration COMMAND --help": "tests/test_help.py",
    ".venv/bin/python -m tests.notebooks.execution": "takes minutes: tests/notebooks/test_notebooks.py",
    "vlm-calibration report RUN --calibration FOLDER": "tests/reporting/test_report.py",
    'make test-fast ARGS="tests/metrics -x"': "runs tests: tests/test_packaging.py has the call",
    'make test ARGS="--durations=50"': "runs this test",
    "pip install 'vlm-calibration[datasets]'": "downloads; the tests have the extra: tests/data/test_convert.py",
    "pip install 'vlm-calibration[endpoint]'": "downloads; the tests have the extra: tests/endpoint/test_commands.py",
    "pip install coverage": "downloads",
    'coverage run --source src/vlm_calibration -m pytest -m "not slow and not nightly"': "runs tests",
    "coverage report": "reads what `coverage run` wrote",
    'make bench ARGS="--only metrics startup"': "takes minutes",
    "make dashboard ENTITY=... PROJECT=...": "needs a login at W&B: tests/reporting/test_dashboard.py",
    "vlm-calibration export runs/sft --push-to-hub NAME": "uploads: tests/commands/test_export.py",
    "vllm serve exported": "needs tests/serving/setup: tests/serving/test_vllm.py",
    "wandb login": "needs an account at W&B",
    "wandb sync": "uploads: tests/callbacks/test_wandb_log.py",
    "wandb sync runs/NAME/wandb/offline-run-*": "uploads: tests/callbacks/test_wandb_log.py",
    "pip install 'vlm-calibration[regions]'": "downloads; the tests have the extra: tests/regions/test_phrases.py",
    ".venv/bin/pip install jupyterlab ipywidgets": "downloads; notebooks are run without either: tests/notebooks/test_notebooks.py",
    ".venv/bin/jupyter lab notebooks": "serves until it is stopped: tests/notebooks/test_notebooks.py",
    'make bench ARGS="--only phrases"': "is tested in tests/regions/test_phrases.py",
    'make bench ARGS="--only preference"': "takes minutes: tests/losses/test_preference_trl.py",
}


COMMANDS = list(
    dict.fromkeys(
        command
        for page in (ROOT / "README.md", *PAGES)
        for command in commands(page.read_text(encoding="utf-8"))
    )
)


def test_every_command_is_named_with_what_runs_it() -> None:
    assert [c for c in COMMANDS if c not in RUN_BY] == [], "add them to RUN_BY with the test that runs them"
    assert [c for c in RUN_BY if c not in COMMANDS] == [], "no page has them"


def test_what_runs_them_exists() -> None:
    for reason in RUN_BY.values():
        assert all((ROOT / path).is_file() for path in re.findall(r"tests/\S+\.py", reason)), reason
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            # A dry run fails if the target or one of its dependencies is missing.
            environment = {k: v for k, v in os.environ.items() if k not in ("ARGS", "MAKEFLAGS", "MAKELEVEL")}
            dry_run = subprocess.run(
                [*words, "-n"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            assert dry_run.returncode == 0, dry_run.stderr
            assert all(name in BENCHMARKS for name in re.findall(r"--only (\w+)", command)), command
        elif words[1:2] == ["install"]:
            ours = [word for word in words[2:] if word.startswith("vlm-calibration")]
            assert all(extra in extras for word in ours for extra in re.findall(r"\[(\w+)\]", word)), command
        elif words[0] in ("vlm-calibration", "wandb"):
            assert find_spec(words[0].replace("-", "_")) is not None


EXCERPTS = ("vlm-calibration COMMAND --help", "vlm-calibration ask --abstain", "vlm-calibration data convert")
"""What a sentence names of a command; it does not run as it stands."""
CALLS = [c for c in COMMANDS if c.startswith("vlm-calibration ") and c not in EXCERPTS and "help" not in c]


@pytest.mark.parametrize("written", CALLS)
def test_the_command_line_takes_it(written: str, parse: Callable[[list[str]], Any]) -> None:
    """Options of a command that runs elsewhere, and its configuration."""
    name, *words = [word for word in shlex.split(written)[1:] if word != "$settings"]
    command = load(SUBCOMMANDS[name][0])
    while isinstance(command, Subcommands):
        subcommand, *words = words
        command = command.functions[subcommand]
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
    *(
        "adapter/",
        "checkpoints/",
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.json",
        "predictions.jsonl",
    ),
    *("official/", "wandb/", "contact_sheet.png", "thresholds.json"),
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
    assert [
        p for p in sorted(paths - names) if not (page.parent / p).exists() and not (ROOT / p).exists()
    ] == []


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


def test_the_table_has_the_keys_of_a_query() -> None:
    page = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    table = page.split("| key | meaning |", 1)[1].split("\n\n", 1)[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    keys = [key for cell in first for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(keys) == sorted(field.name for field in fields(Query))


PAGE = """
Text with `make thing` and `not a command`, and `vlm-calibration
data` over two lines.

```bash
make it   # does it
vlm-calibration fit --one 1 \\
  --two '#2'
```

    x = y + z
    vlm-calibration score

- a list
"""


def test_commands_of_a_page() -> None:
    assert commands(PAGE) == [
        *("make it", "vlm-calibration fit --one 1 --two '#2'", "vlm-calibration score"),
        *("make thing", "vlm-calibration data"),
    ]
    with pytest.raises(ValueError, match="a block of fish"):
        commands("```fish\nmake\n```\n")
