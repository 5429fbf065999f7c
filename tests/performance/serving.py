"""Answers a second in process and from servers: `python -m tests.performance.serving`. Needs `tests/serving/setup` for vLLM.

In process a model is asked as `vlm-calibration test` asks it for stated confidences: batches of eight, greedy decoding that ends
behind the confidence. A server gets the same questions one at a time, or sixteen at once. Answers have at most 16 tokens, and those of
the random model always do. Everything runs on one thread: on busy cores more of them only wait for each other.

Target: none; it tells whether a model that is to answer many questions is better served.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from vlm_calibration import load_calibrated
from vlm_calibration.estimators.base import LocalSystem
from vlm_calibration.inference.model import DEMO_MODEL
from vlm_calibration.models.generation import generate
from vlm_calibration.text.confidence import end_of_confidence

from ..serving.served import (
    VLLM,
    Question,
    ask_served,
    questions,
    save_qwen,
    serving,
    transformers_serve,
    vllm_serve,
)

SCENES, BATCH, TOKENS = 96, 8, 16
CONCURRENT = (1, 16)


def in_process(folder: str, asked: Sequence[Question]) -> float:
    """Answers a second without a server."""
    model = load_calibrated(folder, device="cpu")
    [system] = model.systems.values()
    assert isinstance(system, LocalSystem)
    tokenizer = system.tokenizer.chat.processor.tokenizer

    def answer(batch: Sequence[Question]) -> None:
        inputs = model.collate([model.sample(q.image, q.text) for q in batch]).inputs
        generate(model.model, inputs, tokenizer, TOKENS, end_of_confidence)

    return rate(answer, [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)], 1) * BATCH


def served(command: Sequence[str], folder: str, asked: Sequence[Question], log: Path) -> list[float]:
    """Answers a second from a server, for each number of `CONCURRENT`."""
    with serving(command, log) as url:

        def answer(question: Question) -> None:
            ask_served(url, folder, question.image, question.prompt, TOKENS)

        return [rate(answer, asked, number) for number in CONCURRENT]


def rate(answer: Callable[..., None], asked: Sequence[object], concurrent: int) -> float:
    """Calls a second, after some that warm up."""
    with ThreadPoolExecutor(concurrent) as threads:
        list(threads.map(answer, asked[:concurrent]))
        began = time.perf_counter()
        list(threads.map(answer, asked))
    return len(asked) / (time.perf_counter() - began)


def main() -> None:
    torch.set_num_threads(1)
    asked = questions(SCENES)
    servers = {"`transformers serve`": transformers_serve, "vLLM": vllm_serve}
    if not VLLM.exists():
        del servers["vLLM"]
        print("vLLM is not installed: run tests/serving/setup", file=sys.stderr)
    columns = [f"{name}, {n} at once" for name in servers for n in CONCURRENT]
    print(
        f"| model | in process, batches of {BATCH} | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        models: dict[str, Callable[[], str]] = {
            "demo": lambda: str(DEMO_MODEL),
            "random Qwen2.5-VL": partial(save_qwen, Path(temporary) / "qwen"),
        }
        for name, save in models.items():
            folder = save()
            rates = [in_process(folder, asked)]
            for serve in servers.values():
                rates += served(serve(folder), folder, asked, Path(temporary) / "log")
            print(f"| {name} | {' | '.join(f'{rate:.1f}' for rate in rates)} |", flush=True)


if __name__ == "__main__":
    main()
