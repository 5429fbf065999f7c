"""Loading from a folder or the Hugging Face Hub, where everything that goes wrong is one line.

`huggingface_hub` tries each file five times with longer and longer waits where there is no network, which takes minutes. So
the Hub is knocked at once; if nobody answers, only the cache is used.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from vlm_calibration.records import DataError

CONNECT_SECONDS = 5


def is_hub_name(name: str) -> bool:
    """Whether this may be a name on the Hub, `owner/model`, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Load `what` from the folder or Hub name `name` inside; without a network from the cache alone.

    Raises:
        DataError: it cannot be loaded; the message says whether the Hub could not be reached.
    """
    offline = _why_offline() if is_hub_name(name) else None
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, ImportError, HTTPError) as error:
        if offline is not None and isinstance(error, OSError):
            cause = f"there is no such folder, {offline}, and it is not in the cache {constants.HF_HUB_CACHE}"
        elif isinstance(error, OSError) and not is_hub_name(name) and not Path(name).exists():
            cause = "there is no such folder, and a name on the Hub has the form owner/model"
        elif isinstance(error, HTTPError):
            # The first line has the status alone.
            cause = " ".join(str(error).split())[:300]
        else:
            cause = first_line(error)
        raise DataError(f"cannot load {what} from {name!r}: {cause}") from error


def download(what: str, name: str, revision: str | None = None) -> Path:
    """The folder with all files of a repository on the Hub, from the cache where that has them.

    Raises:
        DataError: there is no such repository, or it can be neither reached nor found in the cache.
    """
    with loading(what, name):
        return Path(snapshot_download(name, revision=revision))


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def _why_offline() -> str | None:
    """Why only the cache is used, None if the Hub answers. Sets `huggingface_hub` to offline if it does not."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if address.hostname is None or address.scheme in getproxies():
        return None  # A proxy reaches what this machine may not.
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached ({error.strerror or error})"
    return None
