"""Downloads files into a data root and verifies them: in parallel, each whole or not at all, with the digests of earlier downloads.

An interrupted download resumes with the files that are missing. The digest of every verified file is recorded in a list in the
format of `sha256sum`, by which later calls verify the files that have no published digest.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from vlm_calibration.files import first_line, replacing, write_text
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.progress import track
from vlm_calibration.records import DataError

TIMEOUT = 20.0
"""Seconds without an answer after which an attempt ends."""
ATTEMPTS, PAUSE = 3, 0.5
"""Attempts at a file, and seconds before the second; each further pause is twice as long."""
GIVEN_UP = 5
"""A server is not asked again after this number of files in a row without an answer."""
BLOCK = 1 << 20

_MD5 = re.compile(r'"([0-9a-f]{32})"')
_LISTED = re.compile(r"([0-9a-f]{64})  (\S.*)")


class RemoteFile(NamedTuple):
    """A file of a benchmark.

    Attributes:
        path: relative to the data root, with "/".
        url: where to download it; None if it has to be placed by hand.
        sha256: published digest; None if there is none.
        is_image: whether the file must be an image that can be decoded.
    """

    path: str
    url: str | None
    sha256: str | None = None
    is_image: bool = False


@dataclass
class FetchReport:
    """What became of some files.

    Attributes:
        digests: path -> SHA-256 of each file that is in its place and verified.
        downloaded: number of these that were downloaded now.
        missing: path -> why the file is not in its place.
        wrong: path -> why the file in its place is not the right one.
    """

    digests: dict[str, str] = field(default_factory=dict)
    downloaded: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


class _NoAnswer(Exception):
    """The server cannot be reached, or breaks the transfer off."""


class _Unusable(Exception):
    """The server has no such file, or what it sends is not the right file."""


def read_digests(path: Path) -> dict[str, str]:
    """Read a list in the format of `sha256sum`, path -> digest; empty if there is no such file.

    Raises:
        DataError: a line has another format.
    """
    if not path.exists():
        return {}
    digests = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = _LISTED.fullmatch(line)
        if match is None:
            raise DataError(f"{path}:{number}: expected a digest, two blanks and a path, found {line!r}")
        digests[match[2]] = match[1]
    return digests


def write_digests(path: Path, digests: Mapping[str, str]) -> None:
    """Write a list in the format of `sha256sum`, sorted by path."""
    write_text(path, "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))


def fetch_files(
    files: Sequence[RemoteFile],
    root: Path,
    known: Mapping[str, str],
    report: FetchReport,
    *,
    download: bool = True,
    workers: int = 8,
    description: str = "files",
) -> None:
    """Verify the files that are in their place and download the others.

    Args:
        files: to verify and download.
        root: the data root.
        known: path -> SHA-256 of an earlier download, for files without a published digest.
        report: is added to, file by file, so that it is useful after an interruption.
        download: whether to download missing files.
        workers: number of files at a time.
        description: of the files, for the line of progress.

    Raises:
        DataError: a file cannot be written.
    """
    servers = _Servers()

    def fetch(file: RemoteFile) -> bool:
        path = root / file.path
        expected = file.sha256 or known.get(file.path)
        if path.exists():
            report.digests[file.path] = _verified(file, path, expected)
            return False
        if file.url is None:
            raise _NoAnswer("has to be placed by hand")
        if not download:
            raise _NoAnswer("not downloaded yet")
        report.digests[file.path] = servers.download(file, path, expected)
        return True

    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(fetch, file): file for file in files}
        for future in track(as_completed(futures), f"fetching {description}", len(futures), "files"):
            file = futures[future]
            try:
                report.downloaded += future.result()
            except _NoAnswer as error:
                report.missing[file.path] = str(error)
            except _Unusable as error:
                (report.wrong if (root / file.path).exists() else report.missing)[file.path] = str(error)
    finally:
        pool.shutdown(cancel_futures=True)


class _Servers:
    """Downloads from servers, and remembers those that do not answer."""

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def download(self, file: RemoteFile, path: Path, expected: str | None) -> str:
        """Download a file, with pauses between attempts, and return its SHA-256.

        Raises:
            _NoAnswer: the server does not answer.
            _Unusable: it answers with an error or with another file.
            DataError: the file cannot be written.
        """
        assert file.url is not None
        server = urlsplit(file.url).netloc
        for attempt in range(ATTEMPTS):
            if self._failures[server] >= GIVEN_UP:
                raise _NoAnswer(f"{server} does not answer")
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                digest = _download(file, path, expected)
            except _NoAnswer as error:
                cause = error
            else:
                self._failures[server] = 0
                return digest
        with self._lock:
            self._failures[server] += 1
        raise cause


def _download(file: RemoteFile, path: Path, expected: str | None) -> str:
    assert file.url is not None
    try:
        with urlopen(file.url, timeout=TIMEOUT) as response, replacing(path, sync=False) as temporary:
            _copy(response, temporary)
            return _verified(file, temporary, expected)
    except HTTPError as error:
        message = f"{file.url}: HTTP status {error.code} {error.reason}"
        raise (_NoAnswer if error.code >= 500 or error.code == 429 else _Unusable)(message) from error
    except (OSError, HTTPException) as error:
        raise _NoAnswer(f"{file.url}: {first_line(error)}") from error


def _copy(response: HTTPResponse, path: Path) -> None:
    """Write the content of an answer, which must be complete.

    Raises:
        _NoAnswer: it ends early or was damaged on the way.
    """
    md5, size = hashlib.md5(usedforsecurity=False), 0
    with path.open("wb") as out:
        while block := response.read(BLOCK):
            out.write(block)
            md5.update(block)
            size += len(block)
    length = response.headers.get("Content-Length")
    if length is not None and size != int(length):
        raise _NoAnswer(f"{response.url}: ends after {size} of {length} bytes")
    # S3's tag is the MD5 of an object that was uploaded in one part and is not encrypted with a key of its own.
    is_s3 = response.headers.get("Server") == "AmazonS3"
    is_plain = "kms" not in response.headers.get("x-amz-server-side-encryption", "")
    tag = _MD5.fullmatch(response.headers.get("ETag", ""))
    if is_s3 and is_plain and tag and md5.hexdigest() != tag[1]:
        raise _NoAnswer(f"{response.url}: damaged on the way: MD5 {md5.hexdigest()}, expected {tag[1]}")


def _verified(file: RemoteFile, path: Path, expected: str | None) -> str:
    """The SHA-256 of a file.

    Raises:
        _Unusable: it is not the expected one, or the file is no image where it must be one.
    """
    try:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from error
    if expected is not None and digest != expected:
        raise _Unusable(f"SHA-256 {digest}, expected {expected}")
    if expected is None and file.is_image:
        try:
            load_image(path, name=file.path)
        except ImageError as error:
            raise _Unusable(str(error)) from error
    return digest
