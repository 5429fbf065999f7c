"""The package as others get it: sdist and wheel; and a stranger's first hour with it, by the README's own commands.

The wheel is in an environment of its own, the data are photographs as people have them, and the model is in a folder.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image

import vlm_calibration
from vlm_calibration.demo.questions import scene_seed
from vlm_calibration.demo.scenes import render_scene
from vlm_calibration.demo.source import DemoSource, scene_index
from vlm_calibration.perturbation.masks import bounding_box

pytestmark = pytest.mark.nightly

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "src/vlm_calibration/demo/model"
IMAGES = 300
SIZES = ((192, 192), (320, 240), (240, 320), (500, 375), (96, 128))
WATCH = """
import os, sys
own, allowed, log = (os.environ[name] for name in ("CHECKOUT", "DEPENDENCIES", "READ"))
def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith(own + os.sep) and not path.startswith(allowed + os.sep):
            with open(log, "a") as file:
                file.write(path + "\\n")
sys.addaudithook(note)
"""
"""Start-up code of every process: note each file of the checkout that is opened."""


def clean_environment() -> dict[str, str]:
    """The environment without what leads Python to other packages, or W&B to another run."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WANDB", "VIRTUAL_ENV"))}


def run_cleanly(*command: str | Path, folder: Path | None = None) -> str:
    """Output of a command, which must succeed, in `clean_environment`."""
    ran = subprocess.run(
        [*map(str, command)], cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def _build(folder: Path, kind: str, out: Path) -> Path:
    """The file that `build_sdist` or `build_wheel` writes into a new folder."""
    out.mkdir()
    run_cleanly(sys.executable, "-c", BUILD, kind, out, folder=folder)
    [file] = out.iterdir()
    return file


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("tests/", "notebooks/")) or not os.path.lexists(root / name):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(source, "build_sdist", tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(source, "build_wheel", tmp_path_factory.mktemp("wheel") / "dist")


def _files(wheel: Path) -> dict[str, int]:
    """File -> checksum of its content, without the list of checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {i.filename: i.CRC for i in archive.infolist() if not i.filename.endswith("/RECORD")}


def test_the_wheel_holds_all_but_the_page_about_the_source(wheel: Path, root: Path) -> None:
    files = _files(wheel)
    package = root / "src/vlm_calibration"
    of_package = {p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    of_package.remove(package / "README.md")
    of_configs = {p for kind in ("*.yaml", "README.md", "slurm/*") for p in (package / "configs").rglob(kind)}
    assert len(of_configs) > 40
    expected = {f"vlm_calibration/{path.relative_to(package)}" for path in of_package | of_configs}
    assert expected - files.keys() == set()
    assert not [name for name in files if name.startswith(("tests", "notebooks"))]


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    assert _files(_build(folder, "build_wheel", tmp_path / "dist")) == _files(wheel)


def test_an_index_takes_both(wheel: Path, sdist: Path) -> None:
    checked = run_cleanly(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    assert checked.count("PASSED") == 2


def test_the_wheel_has_the_version_and_the_page(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Version"] == vlm_calibration.__version__
    assert "## Limits" in metadata.get_payload()


class Stranger(NamedTuple):
    """Someone with the package, data and a model.

    Attributes:
        folder: where they work; holds `my_data`.
        environment: of their processes.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, script: str, *interpreter: str) -> str:
        """The output of a script, by default one for bash, which must succeed."""
        command = [*(interpreter or ("bash", "-euo", "pipefail")), "-c", script]
        place: dict[str, Any] = {"cwd": self.folder, "env": self.environment, "timeout": 1500}
        ran = subprocess.run(command, capture_output=True, text=True, **place)
        assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
        return ran.stdout + ran.stderr

    def metrics(self, runs: str) -> dict[str, Any]:
        return {
            str(path.relative_to(self.folder / runs)): json.loads(path.read_text())
            for path in sorted((self.folder / runs).rglob("metrics.json"))
        }


@pytest.fixture(scope="module")
def stranger(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    base = tmp_path_factory.mktemp("stranger")
    environment = base / "environment"
    python = environment / "bin/python"
    run_cleanly(sys.executable, "-m", "venv", "--without-pip", environment)
    run_cleanly(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(run_cleanly(python, "-c", code).strip())
    # Dependencies come from the tests' environment; its link to the checkout is not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    (packages / "sitecustomize.py").write_text(WATCH)
    folder = base / "work"
    write_data(folder / "my_data")
    variables = {"CHECKOUT": str(ROOT), "DEPENDENCIES": str(Path(sys.prefix)), "READ": str(base / "read")}
    variables |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    variables |= {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    return Stranger(folder, {**clean_environment(), **variables})


def write_data(folder: Path) -> None:
    """Write photographs of all kinds, and a file of queries of which two are bad."""
    (folder / "photos").mkdir(parents=True)
    source = DemoSource("train", IMAGES, first=50_000)
    by_image: dict[str, list[Any]] = {}
    for query in source.queries():
        by_image.setdefault(query.image, []).append(query)
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as lines:
        for index, queries in enumerate(by_image.values()):
            width, height = SIZES[index % len(SIZES)]
            scene = render_scene(scene_seed(source.split, scene_index(queries[0])))
            name = _save(folder, index, Image.fromarray(scene.image).resize((width, height)))
            scale = np.array([width, height] * 2) / scene.image.shape[0]
            regions = []
            for item in scene.objects:
                top, bottom, left, right = bounding_box(item.mask)
                corners = np.array([left, top, right, bottom]) * scale
                regions.append({"label": item.name, "box": corners.tolist()})
            for query in queries:
                fields = ("id", "question", "answer", "answer_type", "category")
                record = {field: getattr(query, field) for field in fields}
                record |= {"image": name, "objects": list(query.objects), "regions": regions}
                if query is queries[0] and index == 7:
                    record["answer"] = "banana"
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    truncated = folder / "photos/11.jpg"
    truncated.write_bytes(truncated.read_bytes()[:900])


def _save(folder: Path, index: int, image: Image.Image) -> str:
    """Save a photograph in one of the ways that people have them; returns its path below the folder."""
    name, exif = f"photos/{index}.jpg", Image.Exif()
    if index % 10 == 3:
        exif[ExifTags.Base.Orientation], image = 6, image.transpose(Image.Transpose.ROTATE_90)
    image = {1: image.convert("CMYK"), 2: image.convert("L"), 4: image.convert("RGBA")}.get(index, image)
    if image.mode == "RGBA":
        image.putalpha(200)
        name = f"photos/{index}.png"
    if index == 5:
        name = "photos/Größe 日本 5.jpg"
    image.save(folder / name, quality=92, exif=exif)
    return name


def block(page: str, section: str, language: str) -> str:
    """The first block of a language in a section of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n{section}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture(scope="module")
def walked(stranger: Stranger) -> str:
    """The output of the README's commands, with the stranger's model in place of the README's."""
    stranger.run("vlm-calibration config copy model/smolvlm2_256m my_model.yaml")
    path = stranger.folder / "my_model.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"]["init_args"]["base"] = {"name_or_path": "my_model", "dtype": "float32"}
    settings["model"]["init_args"] |= {"max_new_tokens": 8, "gradient_checkpointing": False}
    settings["trainer"] |= {"precision": "32-true", "max_steps": 12, "accumulate_grad_batches": 1}
    settings["trainer"] |= {"log_every_n_steps": 4}
    settings["data"] |= {"batch_size": 4, "workers": 0, "max_length": 256}
    path.write_text(yaml.safe_dump(settings))
    shutil.copytree(DEMO_MODEL, stranger.folder / "my_model")
    return stranger.run(_with_my_model(block("README.md", "## Your own data", "bash")))


def _with_my_model(text: str) -> str:
    assert "qwen2_5_vl_7b" in text
    return re.sub("(model/)?qwen2_5_vl_7b", "my_model.yaml", text)


def test_the_commands_lead_to_a_report(stranger: Stranger, walked: str) -> None:
    assert "banana" in walked, "a bad record is named"
    assert "photos/11.jpg" in walked, "and a damaged image"
    page = (stranger.folder / "runs/mine/eval/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("base", "sft", "dpo", "likelihood"))
    assert "isotonic" in (stranger.folder / "runs/mine/eval/report.csv").read_text(encoding="utf-8")
    assert {"eval/base/metrics.json", "eval/sft/metrics.json", "eval/dpo/metrics.json"} <= set(
        stranger.metrics("runs/mine")
    )


def test_the_python_steps_give_the_same_figures(stranger: Stranger, walked: str) -> None:
    script = _with_my_model(block("configs/experiment/README.md", "## From Python", "python"))
    stranger.run(script.replace("runs/mine", "runs/python"), "python")
    assert stranger.metrics("runs/python") == stranger.metrics("runs/mine")


def test_data_that_nobody_here_drew(stranger: Stranger, easy_vqa: Path) -> None:
    """The README's commands on a tenth of easy-vqa, with a base model that answers its questions."""
    shutil.copytree(easy_vqa / "data", stranger.folder / "easy/data")
    steps = "--sft.trainer.max_steps 60 --dpo.trainer.max_steps 30 --dpo.model.init_args.optimizer.lr 1e-3"
    output = stranger.run(
        f"""
        vlm-calibration data inspect --config data/jsonl --data-root easy/data
        vlm-calibration calibrate --model {easy_vqa}/model.yaml --data jsonl --data-root easy/data --runs easy/runs {steps}
        vlm-calibration threshold easy/runs/eval --max-error 0.2 || true
        vlm-calibration ask easy/data/train/images/2000.png "What color is the shape?" --adapter easy/runs/dpo
        """
    )
    assert re.search(r"(Red|Blue|Green|Yellow|Black|Brown|Gray|Teal)\.\n +stated confidence +\d+%", output)
    metrics = stranger.metrics("easy/runs")["eval/base/metrics.json"]
    assert metrics["accuracy/colour"] > 0.9
    assert min(metrics[f"accuracy/{kind}"] for kind in ("form", "affirmed", "negated")) > 0.6
    rows = list(csv.DictReader((stranger.folder / "easy/runs/eval/report.csv").open(encoding="utf-8")))
    reported = {(row["system"], row["group"]) for row in rows}
    assert {("dpo", kind) for kind in ("colour", "form", "affirmed", "negated")} <= reported


def test_no_file_of_the_checkout_is_read(stranger: Stranger, walked: str) -> None:
    read = Path(stranger.environment["READ"])
    assert not read.exists(), read.read_text()
