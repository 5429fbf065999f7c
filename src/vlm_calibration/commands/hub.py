"""Uploading a folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from vlm_calibration.files import first_line
from vlm_calibration.hub import is_hub_name
from vlm_calibration.records import DataError


def check_hub(name: str, base: str) -> None:
    """Check, before any work is done, what can be checked without the Hub.

    Args:
        name: what to upload to. base: the base model, as the model card will name it.

    Raises:
        DataError: one of them is no name on the Hub, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DataError(f"--push-to-hub {name}: {first_line(error)}") from error
    if not is_hub_name(base):
        raise DataError(
            f"the base model {base} is a folder, which means nothing on the Hub: give its name there with --base"
        )
    if get_token() is None:
        raise DataError("not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, private: bool = False, revision: str | None = None) -> None:
    """Upload all files of a folder to a model repository, which is made if there is none, and so is the branch.

    Raises:
        DataError: the Hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message="Upload the model and its card",
        )
    except (OSError, ValueError, HTTPError) as error:
        # What the Hub has against the card is on lines of its own.
        raise DataError(f"cannot push to {name}: {' '.join(str(error).split())}") from error
