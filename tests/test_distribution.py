"""The package as others get it: sdist and wheel; `test_acceptance.py` uses the wheel in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import vlm_calibration

pytestmark = pytest.mark.nightly
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


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
    of_package = {p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"} - {
        package / "README.md"
    }
    of_configs = {p for kind in ("*.yaml", "README.md") for p in (package / "configs").rglob(kind)}
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
