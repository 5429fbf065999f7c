"""The notebooks run from top to bottom with few scenes; the outputs that are committed are whole and show nothing of a machine."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from vlm_calibration.estimators.predictions import read_predictions

from .execution import NOTEBOOKS
from .execution import execute as execute_notebook

PERTURBATION, TRAIN, OWN = (
    "01_semantic_perturbation.ipynb",
    "02_train_and_evaluate.ipynb",
    "03_your_own_data.ipynb",
)
SCENES = 12
LIMIT = 240
"""Timeout of a cell in seconds."""

UNWANTED = {
    "an absolute path": r"(?<![\w./:~])/(home|root|tmp|work|usr|opt|var|mnt|Users|data|scratch)/",
    "a user": r"\\Users\\|/home/",
    "a warning": r"Warning\b|WARNING|warnings\.warn",
    "an escape code": r"\x1b|\r",
    "a progress bar": r"it/s\]|s/it\]|\|\s*\d+/\d+ \[",
}
"""What no committed output contains, as regular expressions."""

Execute = Callable[..., tuple[Any, Path]]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    """Function that runs a notebook in a kernel started in `folder`; returns the notebook with outputs and the folder of its runs."""

    def executed(name: str, folder: Path) -> tuple[Any, Path]:
        environment = {"SCENES": str(SCENES), "SHARE": "0.1", "RUNS_DIR": str(tmp_path / "runs")}
        environment["IPYTHONDIR"] = str(tmp_path / "ipython")
        notebook = execute_notebook(name, folder, environment, timeout=LIMIT)
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        [runs] = (tmp_path / "runs").iterdir()
        return notebook, runs

    return executed


def _outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def _pictures(notebook: Any) -> list[np.ndarray]:
    """All figures of the notebook, uint8 [H, W, 3]."""
    data = [data["image/png"] for o in _outputs(notebook) if "image/png" in (data := o.get("data", {}))]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in data]


def _text(notebook: Any) -> str:
    """All text output of the notebook; of a figure none."""
    texts = []
    for output in _outputs(notebook):
        data = output.get("data", {})
        kinds = () if "image/png" in data else ("text/plain", "text/html")
        texts += [output.get("text", ""), *(data[kind] for kind in kinds if kind in data)]
    return "\n".join(texts)


def test_every_notebook_is_run_here_and_named_in_the_readme() -> None:
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    names = [path.name for path in paths]
    assert names == [PERTURBATION, TRAIN, OWN]
    assert sum(path.stat().st_size for path in paths) < 3e6
    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{name})" in readme for name in names)


@pytest.mark.parametrize("name", [PERTURBATION, TRAIN, OWN])
def test_committed_outputs_are_complete_and_show_nothing_of_a_machine(name: str) -> None:
    stored = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], "run once, from the top"
    assert not [output for output in _outputs(notebook) if output.output_type == "error"]
    sources = ["".join(cell["source"]) for cell in code]
    plots = sum(source.count("plt.show()") or "show(" in source for source in sources)
    assert len(_pictures(notebook)) >= plots / 2 > 0
    # What depends on who ran it when: times of cells, the version of Python.
    assert all(cell["metadata"] == {} for cell in stored["cells"])
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert set(stored["metadata"]["language_info"]) == {"name"}
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    for what, pattern in UNWANTED.items():
        match = re.search(pattern, _text(notebook))
        assert match is None, f"{what}: {match and match[0]!r}"
    for output in _outputs(notebook):
        kinds = set(output.get("data", {}))
        assert kinds <= {"text/plain", "image/png", "text/html"}, f"a page on the web shows no {kinds}"


def _prose(name: str) -> str:
    """All Markdown of a notebook as one line."""
    cells = nbformat.read(NOTEBOOKS / name, as_version=4).cells
    return " ".join(" ".join(cell.source.split()) for cell in cells if cell.cell_type == "markdown")


def test_the_text_names_the_settings_of_the_presets(root: Path) -> None:
    sft, anchored = (
        yaml.safe_load((root / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))["data"]
        for name in ("sft", "experiment/anchored")
    )
    assert f"README's numbers are for {sft['train']['init_args']['scenes']} scenes" in _prose(TRAIN)
    groups = anchored["noise"]["levels"]["init_args"]["groups"]
    assert f"in {groups} groups for each answer type" in _prose(OWN)


@pytest.mark.slow
@pytest.mark.parametrize("start", [".", pytest.param("notebooks", marks=pytest.mark.nightly)])
def test_semantic_perturbation(execute: Execute, root: Path, start: str) -> None:
    notebook, runs = execute(PERTURBATION, root / start)
    pictures = _pictures(notebook)
    assert len(pictures) == 10
    # A figure with few colours would be empty.
    assert all(len(np.unique(picture.reshape(-1, 3), axis=0)) > 20 for picture in pictures)
    assert Image.open(runs / "photo.png").size == (768, 768)
    assert "768 x 768 pixels" in _prose(PERTURBATION)
    # This notebook has one size, so what it computes is what is committed.
    stored = nbformat.read(NOTEBOOKS / PERTURBATION, as_version=4)
    assert _text(notebook) == _text(stored)
    assert [p.shape for p in pictures] == [p.shape for p in _pictures(stored)]


@pytest.mark.nightly
def test_the_whole_method(execute: Execute, root: Path) -> None:
    notebook, runs = execute(TRAIN, root)
    assert len(_pictures(notebook)) == 3
    text = _text(notebook)
    for row in ("before", "after", "base", "sft", "dpo", "oracle"):
        assert f"│ {row}" in text
    assert "with probability" in text
    adapters = [load_file(runs / stage / "adapter/adapter_model.safetensors") for stage in ("sft", "dpo")]
    assert any(bool(weight.any()) for name, weight in adapters[0].items() if "lora_B" in name), "trained"
    assert any(not torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    for system in ("base", "sft", "dpo", "oracle"):
        answers = read_predictions(runs / "eval" / system / "predictions.jsonl")
        assert len(answers) == 5 * 3 * 4, "five parts of four scenes with three questions each"
    stated = [a.confidence for a in read_predictions(runs / "eval" / "base" / "predictions.jsonl")]
    assert "always states 90 to 100%" in _prose(TRAIN)
    assert all(confidence is not None and 0.9 <= confidence <= 1 for confidence in stated)


@pytest.mark.nightly
def test_own_data(execute: Execute, easy_vqa: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(easy_vqa, tmp_path / "runs/easy")
    notebook, runs = execute(OWN, root / "notebooks")
    assert len(_pictures(notebook)) == 3
    text = _text(notebook)
    assert "data.train" in text
    assert all(f"│ {row}" in text for row in ("after", "base", "sft", "dpo"))
    n = len((runs / "data/test.jsonl").read_text(encoding="utf-8").splitlines())
    runs /= "notebook"
    assert len(read_predictions(runs / "eval/dpo/predictions.jsonl")) == n
    sft, dpo, exported = (
        load_file(runs / folder / "adapter_model.safetensors")
        for folder in ("sft/adapter", "dpo/adapter", "exported")
    )
    assert any(bool(weight.any()) for name, weight in sft.items() if "lora_B" in name), "trained"
    assert any(not torch.equal(weight, dpo[name]) for name, weight in sft.items())
    assert dpo.keys() == exported.keys()
    results = ModelCard.load(runs / "exported" / "README.md").data.eval_results
    metrics = json.loads((runs / "eval" / "dpo" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["brier"] in [r.metric_value for r in results if r.metric_type == "brier_score"]
    assert all(torch.equal(weight, exported[name]) for name, weight in dpo.items())

