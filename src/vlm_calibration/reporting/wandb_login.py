"""Whether someone is logged in to W&B, told without W&B, so that nothing prompts and nothing is slow."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlparse

PROJECT = "vlm-calibration"
"""The project that runs are logged to where none is named."""


def logged_in() -> bool:
    """Whether W&B has credentials: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        _, _, key = netrc.netrc(os.environ.get("NETRC")).authenticators(host) or (None, None, None)
        return bool(key)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False
