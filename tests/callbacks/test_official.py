"""POPE and AMBER through the command line: official files and images in, official scores beside ours out.

The files are made up, in the published formats; the model is the demo's, which says yes or no and how sure it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vlm_calibration.benchmarks.amber import CATEGORIES
from vlm_calibration.callbacks.official import OfficialScores
from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.cli import main
from vlm_calibration.data.dataset import EvalSplit, with_split_name
from vlm_calibration.data.sources.benchmark import PopeSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.files import write_rows
from vlm_calibration.records import DataError

from ..benchmarks import official_rules
from ..command_line import Ended, instance, read_lines
from ..trainers import fake_trainer

SPLITS = ("random", "popular", "adversarial")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with POPE (lines and arrays) and AMBER."""
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name in ("val2014/a.jpg", "val2014/b.jpg", "image/AMBER_1.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    for split in SPLITS:
        rows = [
            {"question_id": i, "image": f"{'ab'[i % 2]}.jpg", "text": f"Is there a {split} {i}?", "label": ["yes", "no"][i % 2]}
            for i in range(1, 6)
        ]  # fmt: skip
        if split == "adversarial":
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=4))
        else:
            (folder / f"{split}.json").write_text("\n".join(map(json.dumps, rows)))
    kinds = [("generative", ["sky"]), *((kind, truth) for kind in CATEGORIES for truth in ("yes", "no"))]
    annotations = [{"id": i, "type": kind, "truth": truth} for i, (kind, truth) in enumerate(kinds, start=1)]
    queries = [{"id": a["id"], "image": "AMBER_1.jpg", "query": f"Is it {a['id']}?"} for a in annotations]
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "query_all.json").write_text(json.dumps(queries))
    return folder


@pytest.fixture
def evaluation(root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments that evaluate a shipped configuration with our model and data, results in `tmp_path`/eval."""

    def arguments(config: str, test: dict[str, Any], **init_args: Any) -> list[str]:
        shipped = yaml.safe_load((root / "configs/eval" / config).read_text(encoding="utf-8"))
        trainer: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        callbacks = [c for c in shipped["trainer"]["callbacks"] if "progress.Progress" not in str(c)]
        shipped["trainer"] |= {**trainer, "callbacks": callbacks, "default_root_dir": str(tmp_path / "eval")}
        base = {"name_or_path": str(root / "src/vlm_calibration/demo/model"), "dtype": "float32"}
        quick = {"max_new_tokens": 16, "estimators": None, "adapters": {}}
        shipped["model"]["init_args"] |= {"base": base, **quick, **init_args}
        shipped["data"] |= {"test": test, "calibration": None, "eval_batch_size": 2, "workers": 0}
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump(shipped), encoding="utf-8")
        return ["test", "--config", str(path)]

    return arguments


def _source(kind: str, **settings: Path) -> dict[str, Any]:
    paths = {name: str(path) for name, path in settings.items()}
    return {"source": instance(f"data.sources.benchmark.{kind}", **paths)}


def _metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_pope(
    run: Callable[..., Ended],
    run_two: Callable[..., Ended],
    evaluation: Callable[..., list[str]],
    files: Path,
    new_adapter: Callable[..., str],
    tmp_path: Path,
    processes: int,
) -> None:
    parts = {s: _source("PopeSource", path=files / f"{s}.json", root=files / "val2014") for s in SPLITS}
    noised = {**parts["random"], "noise": "drawn"}
    command = evaluation("pope.yaml", {**parts, "noised": noised}, adapters={"sft": new_adapter(1)})
    ended = run(*command) if processes == 1 else run_two(*command, "--trainer.strategy", "ddp")
    assert ended.status == 0, ended.err
    assert ended.out.count("Official scores") == 1, "one process reports"
    # Without a region, a question that is answered yes cannot be noised; it is asked untouched.
    assert "data.test.noised: images stay untouched: 2 of 5 queries (2 yes) need a region" in ended.err
    written = {f"official/{split}.{what}.jsonl" for split in SPLITS for what in ("answers", "labels")}
    for system in ("base", "sft"):
        folder = tmp_path / "eval" / system
        files_there = {str(p.relative_to(folder)) for p in folder.rglob("*.json*")}
        assert files_there == {"metrics.json", "predictions.jsonl", *written}, "no scores with noise"
        _check_pope(folder)


def _check_pope(folder: Path) -> None:
    """Assert that the scores in a system's folder are those of the official script on its files."""
    metrics = _metrics(folder)
    assert metrics["n"] == 20
    assert {metrics[f"n/{split}"] for split in (*SPLITS, "noised")} == {5}
    together: tuple[list[Any], list[Any]] = ([], [])
    for split in SPLITS:
        files = (folder / f"official/{split}.{what}.jsonl" for what in ("labels", "answers"))
        labels, answers = map(read_lines, files)
        assert [x["question_id"] for x in labels] == [x["question_id"] for x in answers] == [1, 2, 3, 4, 5]
        _same(metrics, f"official/{split}/", labels, answers)
        together[0].extend(labels)
        together[1].extend(answers)
    _same(metrics, "official/", *together)


def _same(metrics: dict[str, Any], prefix: str, labels: list[Any], answers: list[Any]) -> None:
    try:
        expected = official_rules.pope(labels, answers)
    except ZeroDivisionError:
        assert metrics[f"{prefix}f1"] is None
        return
    assert {key: metrics[prefix + key] for key in expected} == expected


def test_amber(
    run: Callable[..., Ended],
    evaluation: Callable[..., list[str]],
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"path": "query_all.json", "annotations": "annotations.json", "root": "image"}
    part = _source("AmberSource", **{key: files / name for key, name in settings.items()})
    ended = run(*evaluation("amber.yaml", {"amber": part})).checked()
    assert "1 generative records (descriptions) are left out: AMBER's own script scores them" in ended.err
    folder = tmp_path / "eval/base"
    metrics, predictions = _metrics(folder), read_lines(folder / "predictions.jsonl")
    categories = [f"amber/{c}" for c in CATEGORIES.values() for _ in range(2)]
    assert [p["category"] for p in predictions] == categories
    assert (metrics["n"], metrics["n/attribute"], metrics["n/relation"]) == (12, 6, 4)
    answers = json.loads((folder / "official/amber.answers.json").read_text())
    assert [x["id"] for x in answers] == list(range(2, 14))
    assert {x["response"] for x in answers} <= {"Yes", "No"}, "nothing of the confidence is left"
    assert all(x["confidence"] is not None for x in answers)
    expected = official_rules.amber(json.loads((files / "annotations.json").read_text()), answers)
    scores = {k.removeprefix("official/"): v for k, v in metrics.items() if k.startswith("official")}
    assert scores == expected
    # What was written is scored the same without a model.
    written = str(folder / "official/amber.answers.json")
    assert main(["score", "amber", written, "--annotations", str(files / "annotations.json"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    ours = {k: v for k, v in metrics.items() if "amber" not in k and "@" not in k and "probe" not in k}
    assert again == {k: v if v is None else pytest.approx(v) for k, v in ours.items()}


def test_a_mistake_ends_before_anything_runs(
    call: Callable[..., Ended], evaluation: Callable[..., list[str]], files: Path, tmp_path: Path
) -> None:
    part = _source("PopeSource", path=files / "random.json", root=files)
    ended = call(*evaluation("pope.yaml", {"part": part}))
    assert ended.error() == f"{files}/random.json: 2 of 2 images are not in {files}: 'b.jpg', 'a.jpg'"
    assert not list((tmp_path / "eval").rglob("*.jsonl"))
    scores = OfficialScores()
    trainer = fake_trainer(tmp_path, callbacks=[PredictionWriter(), scores])
    trainer.datamodule = SimpleNamespace(test={"part": EvalSplit(DemoSource("test", 1))})
    with pytest.raises(DataError, match="^data.test asks no questions of POPE or AMBER, but 'part'"):
        scores.setup(trainer, None, "test")  # type: ignore[arg-type]


def test_answers_that_are_missing_are_counted(files: Path, tmp_path: Path) -> None:
    """The scores of a complete split are written, and those of a split with missing answers are not."""
    test = {s: EvalSplit(PopeSource(str(files / f"{s}.json"), str(files / "val2014"))) for s in SPLITS[:2]}
    queries = [with_split_name(query, name) for name, s in test.items() for query in s.source.queries()]
    answered = [graded_prediction(query, "Yes", None, None).to_dict() for query in queries[:6]]
    write_rows(tmp_path / "base/predictions.jsonl", answered, lines=True)
    (tmp_path / "base/metrics.json").write_text('{"n": 6}')
    trainer = fake_trainer(tmp_path, datamodule=SimpleNamespace(test=test))
    module: Any = SimpleNamespace(results={"base": {}})
    says = "no official scores of data.test.popular: no answer to 4 of 5: 'popular:2', 'popular:3'"
    with pytest.warns(UserWarning, match=says):
        OfficialScores().on_test_end(trainer, module)
    metrics = _metrics(tmp_path / "base")
    assert (metrics["n"], metrics["official/accuracy"]) == (6, 0.4)
