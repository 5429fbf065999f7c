"""Server that imports the command line and loads a model once, and forks for each run.

A request is one JSON line on stdin: {"args": [...], "cwd": ..., "env": {...}, "largest": bytes or null, "out": file,
"err": file}; the reply is the process id. The child starts a session of its own, as under a terminal, and runs
`python -m vlm_calibration.cli`. {"wait": pid} replies with the exit status, negative for a signal.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from pathlib import Path

from vlm_calibration import cli
from vlm_calibration.commands.lightning_cli import ParsedCLI
from vlm_calibration.models.base import DEMO_MODEL, BaseModel
from vlm_calibration.models.loading import load_base


def warm_up() -> None:
    environment = dict(os.environ)
    sys.argv[1:] = ["fit", "--config", str(Path(__file__).parents[1] / "configs" / "sft.yaml")]
    ParsedCLI()  # builds the parser, which fills jsonargparse's caches
    load_base(BaseModel(str(DEMO_MODEL)))  # fills those of transformers
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()


def start(request: dict) -> None:
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if request["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"], resource.RLIM_INFINITY))
    sys.argv = ["vlm-calibration", *request["args"]]


def serve() -> bool:
    """Answer requests until stdin ends. Returns True in a child, which then runs the command, else False."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            reply = os.waitstatus_to_exitcode(status)
        else:
            reply = os.fork()
            if reply == 0:
                start(request)
                return True
        print(reply, flush=True)
    return False


if __name__ == "__main__":
    warm_up()
    if serve():
        sys.exit(cli.main())
