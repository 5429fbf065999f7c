"""The claims of the README and of the pages of folders: every command runs here, or is listed with the test that runs it.

A command in neither table fails. Commands run in a folder with the files that the README assumes; the demo's model and tiny ones
replace models of the Hub. Also checks that the pages of folders name existing files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import Query

from .command_line import LIMIT, run_plainly
from .models.published import MODELS
from .performance.__main__ import BENCHMARKS
from .regions.conftest import tiny as tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "src/vlm_calibration/demo/model"
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


@dataclass(frozen=True)
class Run:
    """How a command is run here.

    Attributes:
        more: settings after those of the README; `{name}` is the folder of a tiny model.
        writes: files that it must write.
        prints: text that it must print.
    """

    more: str = ""
    writes: tuple[str, ...] = ()
    prints: tuple[str, ...] = ()


BASE = f"--model.init_args.base.name_or_path {DEMO} --model.init_args.base.dtype float32"
QUICK = "--trainer.accelerator cpu --trainer.devices 1 --model.init_args.max_new_tokens 8 --data.workers 0"
SMALL = f"{BASE} {QUICK}"
TRAINED = (
    f"{SMALL} --trainer.strategy auto --trainer.precision 32-true --trainer.accumulate_grad_batches 1"
    " --data.batch_size 4"
)
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md")
RUN_FILES = ("config.yaml", "checkpoints/last.ckpt", "metrics.json", "predictions.jsonl", *ADAPTER_FILES)


def _in(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


# Beginning of a command -> how it is run; the longest matching beginning counts.
RUNS: dict[str, Run] = {
    "vlm-calibration fit --help": Run(prints=("usage: ", "--config", "--data.batch_size")),
    "vlm-calibration fit --help-all": Run(prints=("usage: ", "--config", "--data.batch_size")),
    "vlm-calibration fit --model.help": Run(prints=("answer_weight", "confidence_weight")),
    "vlm-calibration completion bash": Run(prints=("complete ", "--trainer.max_epochs")),
    "vlm-calibration estimate-memory --config sft": Run(
        "--model.init_args.base.name_or_path {qwen2_5_vl_7b}", prints=("│ weights", "│ total", "GiB")
    ),
    "vlm-calibration export runs/sft --merge": Run(
        writes=("exported/model.safetensors",), prints=("wrote exported",)
    ),
    "vlm-calibration predict --config regions": Run(
        "--trainer.accelerator cpu --data.workers 0 --model.init_args.keep_known false"
        " --model.init_args.gates.min_score 0.02"
        " --model.init_args.gates.min_area 0 --model.init_args.detector.init_args.threshold 0"
        " --model.init_args.detector.init_args.max_boxes 2"
        " --model.init_args.detector.init_args.name_or_path {grounding_dino}"
        " --model.init_args.segmenter.init_args.name_or_path {sam2}",
        _in("runs/regions", "train.parquet", "validation.parquet", "summary.json", "contact_sheet.png"),
    ),
    'vlm-calibration ask photo.jpg "Is there a dog in the image?"': Run(prints=("onfidence", "%")),
    "vlm-calibration report runs/eval": Run("--replicates 20", ("runs/eval/report.html",)),
    "vlm-calibration test --config eval/pope --model": Run(
        f"{QUICK} --trainer.logger false",
        tuple(
            f"runs/pope/{system}/{name}"
            for system in ("base", "sft")
            for name in ("metrics.json", "predictions.jsonl", "official/random.answers.jsonl")
        ),
        ("│ base", "│ sft"),
    ),
    "vlm-calibration score pope": Run(prints=('"official/accuracy": 0.75', '"ece": ')),
    "vlm-calibration score amber": Run(
        writes=("for_amber.json",),
        prints=("│ answers │ all       │     75.0", "│ answers │      0.750 │    0.750 │"),
    ),
}

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
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(WALK, "one after the other: tests/test_acceptance.py"),
    "make calibrate MODEL=qwen2_5_vl_7b DATA=jsonl DATA_ROOT=my_data RUN=mine": "needs a model: tests/test_stages.py",
    "make regions": "needs data without regions: tests/test_stages.py",
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
            "python -m tests.performance.data_path",
            "python -m tests.performance.preference --rounds 3 --no-memory",
            'make bench ARGS="--only preference"',
            "python -m tests.performance.vision_share",
            "python -m tests.performance.long_rows --rounds 3",
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
    'make bench ARGS="--only scale"': "takes a minute: tests/test_gpu_benchmark.py has its parts",
    "make app": "serves until it is stopped: test_the_page_answers",
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
    "vlm-calibration estimate-memory --config model/qwen2_5_vl_7b --config trainer/ddp": "tests/commands/test_estimate_memory.py",
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


def _run_of(command: str) -> Run | None:
    """How a command is run here, None if it is not."""
    matches = [beginning for beginning in RUNS if command.startswith(beginning)]
    return RUNS[max(matches, key=len)] if matches and command not in ELSEWHERE else None


COMMANDS = list(
    dict.fromkeys(
        command
        for page in (ROOT / "README.md", *PAGES)
        for command in commands(page.read_text(encoding="utf-8"))
    )
)
RUN_HERE = [command for command in COMMANDS if _run_of(command) is not None]


def test_every_command_is_run_or_named() -> None:
    unknown = [command for command in COMMANDS if _run_of(command) is None and command not in ELSEWHERE]
    assert unknown == [], "add them to RUNS, or to ELSEWHERE with a reason"
    unused = [b for b in RUNS if not any(_run_of(c) is RUNS[b] for c in COMMANDS)]
    assert unused == [], "the README has no such command"
    assert [c for c in ELSEWHERE if c not in COMMANDS] == []


def test_commands_that_are_not_run_here_exist() -> None:
    for reason in ELSEWHERE.values():
        assert all((ROOT / path).is_file() for path in re.findall(r"tests/\S+\.py", reason)), reason
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            # A dry run fails if the target or one of its dependencies is missing.
            dry_run = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
            assert dry_run.returncode == 0, dry_run.stderr
            assert all(name in BENCHMARKS for name in re.findall(r"--only (\w+)", command)), command
        elif words[1:2] == ["install"]:
            ours = [word for word in words[2:] if word.startswith("vlm-calibration")]
            assert all(extra in extras for word in ours for extra in re.findall(r"\[(\w+)\]", word)), command
        elif words[0] in ("vlm-calibration", "wandb"):
            assert find_spec(words[0].replace("-", "_")) is not None


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
    *("official/", "wandb/", "contact_sheet.png", "monitor.json", "monitor.png", "thresholds.json"),
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the README's commands use: data, trained adapters, an evaluation and a benchmark."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("src", "configs", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    for adapter in ("sft", "dpo", "qwen"):
        model = attach_lora(
            load_base(BaseModel(str(ROOT / DEMO), dtype="float32")), LoraSettings(r=4, alpha=8)
        )
        model.peft_config["default"].base_model_name_or_path = DEMO
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # Not zero, as after training, and small enough not to change the answers.
                parameter.data.fill_(1e-4)
        model.save_pretrained(folder / "runs" / adapter / "adapter")
    shutil.copy(ROOT / "src/vlm_calibration/demo/levels.json", folder / "runs/levels.json")
    _write_queries(folder)
    _write_benchmarks(folder)
    for system, confidence in (("base", 0.95), ("dpo", 0.75)):
        rows = [
            {
                "id": str(i),
                "question": "Is there a dog?",
                "answer": "Yes",
                "text": "...",
                "predicted": "yes",
                "confidence": confidence,
                "correct": i % 4 > 0,
                "category": None,
                "noise_step": 0,
                "answer_type": "yes_no",
            }
            for i in range(40)
        ]
        _write(folder / "runs/eval" / system / "predictions.jsonl", rows)
    return folder


def _write(path: Path, rows: list[dict[str, Any]], *, lines: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")


def _write_queries(folder: Path) -> None:
    """Write scenes of the demo and queries about them: `data/*.jsonl` and `my/queries.jsonl`."""
    for name, split, scenes in (
        ("data/train", "train", 3),
        ("data/validation", "calibration", 2),
        ("data/calibration", "calibration", 6),
        ("data/test", "test", 2),
        ("my/queries", "test", 2),
    ):
        source = DemoSource(split, scenes)
        rows = []
        for query in source.queries():
            loaded = source.load(query)
            image = (folder / name).parent / "images" / f"{query.image}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(loaded.image).save(image)
            rows.append(
                {
                    "id": query.id,
                    "image": f"images/{image.name}",
                    "question": query.question,
                    "answer": query.answer,
                    "answer_type": query.answer_type,
                    "objects": list(query.objects),
                    "regions": [{"label": query.objects[0], "box": _box(mask)} for mask in loaded.evidence],
                }
            )
        _write(folder / f"{name}.jsonl", rows)
    shutil.copy(folder / "my/images/test-000000.png", folder / "photo.jpg")


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


ONE, TWO = "COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"


def _write_benchmarks(folder: Path) -> None:
    """Write four questions of POPE and of AMBER, and answers of which three are correct."""
    source = DemoSource("test", 2)
    for name, query in zip((ONE, TWO), source.queries()[::3], strict=True):
        image = folder / f"data/coco/val2014/{name}"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.load(query).image).save(image)
    labels = ["yes", "yes", "no", "no"]
    questions = [
        {"question_id": i, "image": ONE, "text": "Is there a dog in the image?", "label": label}
        for i, label in enumerate(labels, start=1)
    ]
    for kind in ("random", "popular", "adversarial"):
        _write(folder / f"data/pope/coco_pope_{kind}.json", questions)
        _write(folder / f"data/pope/aokvqa_pope_{kind}.json", [{**row, "image": TWO} for row in questions])
    _write(folder / "coco_pope_random.json", questions)
    texts = ["Yes. Confidence: 90%", "No. Confidence: 60%", "No. Confidence: 80%", "No. Confidence: 70%"]
    _write(
        folder / "answers.jsonl",
        [
            {"question_id": i, "question": "Is there a dog?", "answer": s}
            for i, s in enumerate(texts, start=1)
        ],
    )
    kind = "discriminative-attribute-state"
    truths = [{"id": i, "type": kind, "truth": label} for i, label in enumerate(labels, start=1)]
    _write(folder / "annotations.json", truths, lines=False)
    answers = [{"id": i, "response": s} for i, s in enumerate(texts, start=1)]
    _write(folder / "answers.json", answers, lines=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], str]) -> dict[str, str]:
    """Folders of tiny models, by their name in the settings of a `Run`."""
    qwen = tmp_path_factory.mktemp("qwen")
    MODELS["qwen2_5_vl_7b"].config().save_pretrained(qwen)
    return {"qwen2_5_vl_7b": str(qwen), "grounding_dino": tiny("grounding_dino"), "sam2": tiny("sam2")}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_HERE, ids=lambda command: " ".join(command.split()[1:4]))
def test_a_command_does_what_the_readme_says(
    prepared: Path, models: dict[str, str], tmp_path: Path, command: str
) -> None:
    project = tmp_path / "user"
    shutil.copytree(prepared, project, symlinks=True)
    run = _run_of(command)
    assert run is not None
    program, *arguments = shlex.split(command)
    assert program == "vlm-calibration"
    before = {path: _stamp(project / path) for path in run.writes}
    # In a cold process: a fork of a warm one has modules loaded that the command might fail to import.
    ended = run_plainly([*arguments, *shlex.split(run.more.format(**models))], ROOT, project)
    assert ended.status == 0, ended.err
    for path in run.writes:
        assert (project / path).exists(), f"{path} is missing\n{ended.err}"
        assert _stamp(project / path) != before[path], f"{path} is the old one"
    for text in run.prints:
        assert text in ended.out, ended.out


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.slow
def test_the_page_answers(prepared: Path, tmp_path: Path) -> None:
    project = tmp_path / "user"
    shutil.copytree(prepared, project, symlinks=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            ["make", "app", f"PYTHON={sys.executable}", f"ARGS=--port {port}"],
            cwd=project,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + LIMIT
        while f"http://127.0.0.1:{port}" not in log.read_text() and time.monotonic() < end:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        page = _get(f"http://127.0.0.1:{port}", end)
    finally:
        # A server that ended early has failed the assertion above.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(LIMIT)
    assert "<html" in page
    assert "gradio" in page


def _get(url: str, end: float) -> str:
    """Fetch a page, and retry until `end` while the server does not answer."""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return reply.read().decode("utf-8")
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


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
