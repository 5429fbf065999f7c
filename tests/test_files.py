"""Files that appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.files import replacing, write_json


def _make(path: Path, folder: bool, content: str) -> None:
    if folder:
        path.mkdir()
        for name in ("a", "b", "c"):
            (path / name).write_text(content)
    else:
        path.write_text(content)


def _content(path: Path) -> Any:
    return {p.name: p.read_text() for p in path.iterdir()} if path.is_dir() else path.read_text()


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("existing", [True, False])
def test_it_appears_whole(tmp_path: Path, folder: bool, existing: bool) -> None:
    path = tmp_path / "deep" / "thing"
    if existing:
        path.parent.mkdir()
        _make(path, folder, "old")
    with replacing(path) as temporary:
        _make(temporary, folder, "new")
        assert path.exists() == existing
    assert _content(path) == ({"a": "new", "b": "new", "c": "new"} if folder else "new")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_what_was_there(
    tmp_path: Path, folder: bool, existing: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "thing"
    if existing:
        _make(path, folder, "old")
    with pytest.raises(error), replacing(path) as temporary:
        _make(temporary, folder, "half")
        raise error
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    if existing:
        assert "half" not in str(_content(path))


def test_a_folder_is_never_half_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "thing"
    _make(path, True, "old")

    def killed(target: Any, *_: Any, **__: Any) -> None:
        (Path(target) / "a").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        _make(temporary, True, "new")
    assert _content(path) == {"a": "new", "b": "new", "c": "new"}


def test_nothing_written_is_an_error_and_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    _make(path, True, "old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert set(_content(path).values()) == {"old"}


def test_json_is_readable_and_ends_in_a_line_break(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"größe": 1.5, "none": None})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "größe" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"größe": 1.5, "none": None}
