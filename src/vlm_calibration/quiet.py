"""Messages of other libraries that a user of the command line cannot act on; warnings and errors are hidden one by one."""

from __future__ import annotations

import logging
import os
import warnings

WARNINGS = (
    # Names in transformers that peft and this package use.
    r"`(is_)?gradient_checkpointing\w*` is deprecated",
    # Lightning calls this function of torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Lightning's; only --overwrite, --resume and --ckpt_path let a training into the directory of an earlier one.
    "Checkpoint directory .* exists and is not empty",
    # Lightning's, in several processes; what is logged at the end of an epoch is already that of all of them.
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`",
)
"""Regular expressions of the beginnings of warnings."""
PROCESSES = "lightning/fabric/utilities/distributed.py"
"""Logs how many processes a run has, which is worth seeing."""


def quiet_libraries() -> None:
    """Hide the named messages from now on; needs no import of the libraries."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    if "SLURM_JOB_ID" not in os.environ:
        # Lightning's, wherever SLURM is installed; only the processes of a job need srun.
        warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used")


def quiet_lightning() -> None:
    """Hide what Lightning, which adds the handlers when it is imported, logs below a warning: tips, devices, what it loads."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_worth_reading)


def _worth_reading(record: logging.LogRecord) -> bool:
    path = record.pathname.replace("\\", "/")
    return record.levelno >= logging.WARNING or "/lightning/" not in path or path.endswith(PROCESSES)
