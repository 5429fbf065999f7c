"""Loading from a folder or the Hugging Face Hub, and uploading to it, with errors of one line.

Without a network `huggingface_hub` retries for minutes, so the Hub is probed once; if it does not answer, only the cache is used.
"""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import (
    HfApi,
    ModelCard,
    constants,
    errors,
    get_token,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from vlm_calibration.files import first_line
from vlm_calibration.progress import is_terminal, working
from vlm_calibration.records import DataError

CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")
"""Metadata of a model card that state its licence."""


def is_hub_name(name: str) -> bool:
    """Whether this is a valid name on the Hub, `owner/model`, and not a local path."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return not Path(name).exists()


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Show that `what` is loaded from a folder or the Hub, without a network from the cache alone; a DataError says why it is not."""
    on_hub = is_hub_name(name)
    offline = _why_offline() if on_hub else None
    is_cached = not on_hub or isinstance(try_to_load_from_cache(name, "config.json"), str)
    is_download = not is_cached and not constants.HF_HUB_OFFLINE
    bars = is_download and is_terminal()
    # transformers' switch, which is that of `huggingface_hub` too; it is imported where it is used.
    if (switch := sys.modules.get("transformers.utils.logging")) is not None:
        (switch.enable_progress_bar if bars else switch.disable_progress_bar)()
    doing = "downloading and loading" if is_download else "loading"
    try:
        with nullcontext() if bars else working(f"{doing} {what} from {name}"):
            yield
    except DataError:
        raise
    except (OSError, ValueError, ImportError, errors.HTTPError) as error:
        if offline is not None and isinstance(error, OSError):
            cause = f"there is no such folder, {offline}, and it is not in the cache {constants.HF_HUB_CACHE}"
        elif isinstance(error, OSError) and not on_hub and not Path(name).exists():
            cause = "there is no such folder, and a name on the Hub has the form owner/model"
        elif isinstance(error, errors.HTTPError):
            cause = shorten_message(error)  # The first line has only the status.
        else:
            cause = first_line(error)
        raise DataError(f"cannot load {what} from {name!r}: {cause}") from error


def base_license(name: str, revision: str | None = None, *, download: bool = False) -> dict[str, Any]:
    """The licence in the card of a base model, from its folder, the cache or, with `download`, the Hub, as metadata; or empty."""
    path = Path(name) / CARD
    if is_hub_name(name):
        with loading("the model card", name) if download else nullcontext():
            try:
                path = Path(hf_hub_download(name, CARD, revision=revision, local_files_only=not download))
            except errors.EntryNotFoundError as error:
                if download and isinstance(error, errors.LocalEntryNotFoundError):
                    raise
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, YAMLError) as error:
        raise DataError(f"{path}: the metadata cannot be read: {first_line(error)}") from error
    return {key: data[key] for key in LICENSE if key in data}


def check_upload(name: str, base: str) -> None:
    """Raise a DataError unless `name` and `base`, as the card names it, are names on the Hub, and somebody is logged in."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise DataError(f"--push-to-hub {name}: {first_line(error)}") from error
    if not is_hub_name(base):
        advice = "give its name on the Hub with --base"
        raise DataError(f"the base model {base} is a folder, which nobody else has: {advice}")
    if get_token() is None:
        raise DataError("not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, name: str, private: bool = False) -> None:
    """Upload a folder to a model repository, which is created if necessary; raises a DataError if the Hub does not take it."""
    try:
        api = HfApi()
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the model and its card")
    except (OSError, ValueError, errors.HTTPError) as error:
        # The Hub lists its objections to the card on separate lines.
        raise DataError(f"cannot push to {name}: {' '.join(str(error).split())}") from error


def shorten_message(error: BaseException, limit: int = 300) -> str:
    """An error's message with line breaks as spaces, cut to `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) < limit else f"{text[: limit - 3]}..."


@cache
def _why_offline() -> str | None:
    """Why only the cache is used; None if the Hub answers. If it does not, `huggingface_hub` is set offline."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if address.hostname is None or address.scheme in getproxies():
        return None  # The proxy may reach the Hub although this machine does not.
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError as error:
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached ({error.strerror or error})"
    return None
