"""Start a server of a model as a user does, and ask it over OpenAI's protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

from vlm_calibration.demo.source import DemoSource
from vlm_calibration.text.confidence import ElicitationPrompt

from ..models.processors import cached_family

VLLM = Path(__file__).parents[2] / ".venv-serving" / "bin" / "vllm"
"""The command that `tests/serving/setup` installs."""
STARTING, ANSWERING = 600, 120
"""Longest time until a server answers at all, and until it answers one request, in seconds."""


class Question(NamedTuple):
    """A question about an image, uint8 [H, W, 3], and the prompt that a server is sent."""

    image: np.ndarray
    text: str
    prompt: str


def questions(scenes: int) -> list[Question]:
    """One question about each of some scenes of the demo."""
    source, prompt = DemoSource("test", scenes=scenes), ElicitationPrompt()
    of_scene = {query.image: query for query in source.queries()}.values()
    return [Question(source.load(q).image, q.question, prompt.render(q.question)) for q in of_scene]


def vllm_serve(folder: str, *options: str) -> list[str]:
    """The command that serves a model with vLLM on a CPU, in float32, which vLLM would halve; it must be followed by host and port."""
    limits = ("--max-model-len", "256", "--enforce-eager", "--dtype", "float32")
    return [str(VLLM), "serve", folder, *limits, *options]


def transformers_serve(folder: str) -> list[str]:
    """The command that serves a model with transformers; it must be followed by host and port."""
    return [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--device", "cpu"]


def save_qwen(folder: Path) -> str:
    """Write a tiny Qwen2.5-VL with random weights whose heads have 32 dimensions, the fewest of vLLM's attention on a CPU."""
    family = cached_family("qwen2_5_vl")
    return replace(family, spec=replace(family.spec, width=128)).save(folder)


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[str]:
    """Run a server on a free port of 127.0.0.1 until the block ends; yields its address.

    Args:
        command: a server that takes `--host` and `--port` and answers at `/health`.
        log: file for what it prints.

    Raises:
        RuntimeError: it ended, or it does not answer; the message has the end of what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # on busy cores the threads of a tiny model mostly wait for each other
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + STARTING
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > until:
                what = "takes too long to start" if process.poll() is None else f"ended with {process.poll()}"
                raise RuntimeError(f"{command[0]} {what}:\n{log.read_text()[-5000:]}")
            time.sleep(0.5)
        yield url
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server with the processes that it started."""
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def ask_served(url: str, model: str, image: np.ndarray, prompt: str, max_tokens: int = 64) -> str:
    """Ask a server about an image, uint8 [H, W, 3], greedily; returns its text without white space around it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    asked = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/chat/completions", json.dumps(asked).encode(), headers)
    with urlopen(request, timeout=ANSWERING) as answer:
        text: Any = json.load(answer)["choices"][0]["message"]["content"]
    return str(text).strip()
