"""Files: atomic replacement, JSON lines, parts of error messages, the append-only log, and digests of settings."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import stat
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.base import Estimator
from vlm_calibration.files import (
    AppendLog,
    SettingsChangedError,
    clear_leftovers,
    first_line,
    json_lines,
    name_some,
    read_json,
    replacing,
    write_json,
)
from vlm_calibration.models.base import BaseModel
from vlm_calibration.perturbation.level_table import AnswerTypeCounts
from vlm_calibration.perturbation.levels import AnchoredLevels, ConfidenceLevels, LinearLevels
from vlm_calibration.records import DataError
from vlm_calibration.regions.describer import Describer
from vlm_calibration.regions.detector import Detector
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.settings import digest, file_digest, init_args, settings_digest


def _make(path: Path, folder: bool, content: str) -> None:
    if folder:
        path.mkdir()
        for name in ("a", "b"):
            (path / name).write_text(content)
    else:
        path.write_text(content)


def _content(path: Path) -> Any:
    return {p.name: p.read_text() for p in path.iterdir()} if path.is_dir() else path.read_text()


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("existing", [True, False])
def test_it_appears_whole_or_stays_as_it_was(tmp_path: Path, folder: bool, existing: bool) -> None:
    """The last of the errors is that nothing was written."""
    path = tmp_path / "deep" / "thing"
    if existing:
        path.parent.mkdir()
        _make(path, folder, "old")
    for error in (ValueError, KeyboardInterrupt, FileNotFoundError):
        with pytest.raises(error), replacing(path) as temporary:
            if error is not FileNotFoundError:
                _make(temporary, folder, "half")
                raise error
        assert list(path.parent.iterdir()) == ([path] if existing else [])
        assert not existing or "half" not in str(_content(path))
    with replacing(path) as temporary:
        _make(temporary, folder, "new")
        assert path.exists() == existing
    assert _content(path) == ({"a": "new", "b": "new"} if folder else "new")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "umask", "sync"), [(".", 0o022, True), ("weights", 0o077, False), ("deep/weights", 0o002, True)]
)
def test_who_may_read_weights_is_up_to_the_umask(tmp_path: Path, name: str, umask: int, sync: bool) -> None:
    """safetensors gives its files the mode 0600."""
    path = tmp_path / "thing"
    before = os.umask(umask)
    try:
        with replacing(path, sync=sync) as temporary:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            save_file({"weight": np.zeros(2)}, temporary / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / name).stat().st_mode) == 0o666 & ~umask


def test_a_folder_is_never_half_taken_apart_and_what_a_killed_process_leaves_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "thing"
    _make(path, True, "old")

    def killed(target: Any, *_: Any, **__: Any) -> None:
        (Path(target) / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
            _make(temporary, True, "new")
    assert _content(path) == {"a": "new", "b": "new"}
    assert len([*tmp_path.iterdir()]) == 2
    clear_leftovers(tmp_path)
    with replacing(path) as temporary:
        _make(temporary, True, "a process that is killed here")
        clear_leftovers(tmp_path)
        assert [*tmp_path.iterdir()] == [path]
        _make(temporary, True, "new")


def test_json_is_readable_and_ends_in_a_line_break(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"größe": 1.5, "none": None})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "größe" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"größe": 1.5, "none": None}


def test_json_lines_have_their_number_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # A line separator within a string does not end a line.
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n["\xe2\x80\xa8"]')
    lines = list(json_lines(path))
    read = [(line.number, line.read(lambda value: value)) for line in lines]
    assert read == [(1, {"a": 1}), (4, ["\u2028"])]
    for line in lines:
        assert path.read_bytes()[line.offset :].startswith(line.content)


@pytest.mark.parametrize(
    ("content", "line", "whole"),
    [
        (b'{"a": 1}\n{"a"', "a:2: not JSON", "a:2: not JSON"),
        (b'{\n"a": 1,\n}', "a:1: not JSON", "a:3: not JSON"),
        (b'{"a": 1}\n\n"caf\xe9"', "a:3: not UTF-8", "a:3: not UTF-8"),
        (b"[" * 100_000, "a:1: not JSON", "a: not JSON"),
        (b'{"a": 1}\n{"a": 2}', "a:2: two is refused", "a:2: not JSON"),
        (None, "a: cannot be read: ", "a: cannot be read: "),
    ],
)
def test_an_error_names_file_and_line(tmp_path: Path, content: bytes | None, line: str, whole: str) -> None:
    def refuse_two(value: Any) -> Any:
        if value == {"a": 2}:
            raise ValueError("two is refused")
        return value

    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{line}")):
        for json_line in json_lines(path):
            json_line.read(refuse_two)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{whole}")):
        read_json(path)


def test_parts_of_messages() -> None:
    assert name_some("abcde", 5) == "'a', 'b', 'c', 'd', 'e'"
    assert name_some((str(i) for i in range(100)), 100) == "'0', '1', '2', '3', '4' and 95 more"
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


SETTINGS = {"rule": {"level": 0.5}, "model": "a", "below": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def _log(path: Path, settings: Any = SETTINGS, pattern: str | None = None) -> AppendLog:
    return AppendLog(path, settings, "remove it", pattern)


def _numbers(log: AppendLog) -> list[int]:
    return [row["n"] for _, row in log.lines()]


def test_rows_of_all_processes_are_read_in_order_and_again(tmp_path: Path) -> None:
    first, second = (_log(tmp_path / "a" / f"{n}.jsonl", pattern="*.jsonl") for n in range(2))
    assert _numbers(first) == []
    second.append({"n": 5})
    first.append({"n": 1, "text": "Größe\u2028"}, {"n": 2})
    first.append({"n": 3}, sync=True)
    assert _numbers(first) == _numbers(second) == [1, 2, 3, 5]
    lines = [*first.lines()]
    places = ["0.jsonl:1", "0.jsonl:2", "0.jsonl:3", "1.jsonl:1"]
    assert [line.where for line, _ in lines] == [f"{tmp_path}/a/{place}" for place in places]
    assert [first.reread(line._replace(content=b"")) for line, _ in lines] == [row for _, row in lines]
    assert lines[0][1] == {"n": 1, "text": "Größe\u2028", **SETTINGS}
    assert "Größe" in (tmp_path / "a/0.jsonl").read_text(encoding="utf-8"), "UTF-8 as it is"
    first.clear()
    assert not list((tmp_path / "a").iterdir())


def test_a_line_that_is_cut_off_is_ignored_and_then_removed(path: Path) -> None:
    log = _log(path)
    log.append({"n": 1}, {"n": 2})
    log.close()
    content = path.read_bytes()
    for cut in (1, 5, len(content) // 2 - 1):
        path.write_bytes(content[:-cut])
        assert _numbers(_log(path)) == [1]
        log = _log(path)
        log.open()
        assert path.read_bytes() == content[:-cut], "reading and opening change nothing"
        log.append({"n": 2})
        log.close()
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({**SETTINGS, "model": "b"}, "written with model = 'a', found 'b'"),
        ({**SETTINGS, "rule": {"level": 0.1}}, "written with rule = {'level': 0.5}, found {'level': 0.1}"),
        ({**SETTINGS, "more": 1}, "more = None, found 1"),
    ],
)
def test_other_settings_are_refused(path: Path, settings: Any, says: str) -> None:
    _log(path).append({"n": 1})
    with pytest.raises(SettingsChangedError) as caught:
        _numbers(_log(path, settings))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert says in str(caught.value)
    assert str(caught.value).endswith(": remove it")


@pytest.mark.parametrize("line", [b"\0" * 30, b"[]", b"{", b"\xff"])
def test_a_damaged_line_is_named(path: Path, line: bytes) -> None:
    _log(path).append({"n": 1})
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=f"^{path}:2: damaged: "):
        _numbers(_log(path))


def test_two_processes_do_not_append_to_one_file(path: Path) -> None:
    log, other = _log(path), _log(path)
    log.append({"n": 1})
    with pytest.raises(DataError, match=f"{path}: another process is writing to it"):
        other.append({"n": 2})
    log.close()
    other.append({"n": 2})
    assert _numbers(log) == [1, 2]


def test_a_file_system_without_locks_is_warned_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    log = _log(path)
    with pytest.warns(UserWarning, match="cannot be locked: No locks available"):
        log.append({"n": 1})
    assert _numbers(log) == [1]


def test_a_folder_that_cannot_be_made_is_named(path: Path) -> None:
    path.touch()
    with pytest.raises(DataError, match=f"cannot write {path}/log.jsonl: "):
        _log(path / "log.jsonl").append({"n": 1})


PACKAGES = ("data.sources", "demo", "estimators", "perturbation", "regions")
"""Where configurations find the classes of their settings."""


def test_our_objects_keep_what_they_are_made_from() -> None:
    """A setting that an object does not keep under its name would not be seen to change."""
    modules = set()
    for package in (import_module(f"vlm_calibration.{name}") for name in PACKAGES):
        modules |= {f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)}
    for module in modules:
        import_module(module)
    bases = (QuerySource, Estimator, ConfidenceLevels, Describer, Detector, Segmenter)
    known = {k for base in bases for k in _subclasses(base)} - {AnchoredLevels}
    kinds: set[Any] = {k for k in known if k.__module__ in modules and not inspect.isabstract(k)} | {
        NoisePolicy
    }
    assert len(kinds) > 15
    needed = {**dict.fromkeys(("path", "root", "annotations"), "x"), "base": BaseModel("x")}
    for kind in kinds:
        names = inspect.signature(kind).parameters
        instance = kind(**{n: v for n, v in needed.items() if n in names})
        assert set(init_args(instance)) == set(names), kind
    counts = AnswerTypeCounts({"noise": [(0, 10, 9), (1, 10, 5)]})
    names = set(init_args(AnchoredLevels.fit({"yes_no": counts})))
    assert names == {"table", "grid", "groups", "likelihoods"}, "the content of the file at `path`"


def test_private_attributes_count_and_others_are_left_out() -> None:
    class Source:
        def __init__(self, path: str, shuffle: bool, cache: int = 0) -> None:
            self.path, self._shuffle, self.rows = path, shuffle, [cache]

    assert init_args(Source("a", True)) == {"path": "a", "shuffle": True}


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def test_equal_settings_have_equal_digests() -> None:
    own = settings_digest(NoisePolicy())
    assert settings_digest(NoisePolicy(levels=LinearLevels(11))) == own
    others = (NoisePolicy(seed=1), NoisePolicy(levels=LinearLevels(3)), LinearLevels(), DemoSource("test"))
    assert own not in map(settings_digest, others)


def test_digest_by_hand(tmp_path: Path) -> None:
    expected = hashlib.blake2b("Größe".encode(), digest_size=16).hexdigest()
    assert digest(["Gr", "ö".encode(), "ße"]) == expected
    (tmp_path / "file").write_text("Größe", encoding="utf-8")
    assert file_digest(tmp_path / "file") == expected
