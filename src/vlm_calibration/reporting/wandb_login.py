"""W&B's project name, and a check for its credentials that neither imports W&B nor prompts."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlparse

PROJECT = "vlm-calibration"
"""Default project that runs are logged to."""


def logged_in() -> bool:
    """Whether there are credentials for W&B, in the environment or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        _, _, key = netrc.netrc(os.environ.get("NETRC")).authenticators(host) or (None, None, None)
        return bool(key)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False
