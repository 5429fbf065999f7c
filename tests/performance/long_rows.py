"""Long packed rows: a dense mask with sdpa against block masks with FlexAttention.

Run with `python -m tests.performance.long_rows`; prints a Markdown table. A row is an image of 4,096 tokens, a prompt of 200, and ten
responses of 16 behind it. Both sides score it in turn in one process, after a round in which FlexAttention compiles its kernels. With
CUDA a pass is forward and backward in bfloat16 on a language model of 0.9B parameters; on the CPU, where FlexAttention has no backward
pass, it is forward in float32 on one of 39M. The bar: a block mask takes at most a thousandth of the dense one, and the
log-likelihoods of both sides agree; otherwise the script ends with status 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tests.performance.machine import peak_bytes, processor, reset_peak, setting
from tests.performance.preference import PATCH, VOCABULARY, llava
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlavaForConditionalGeneration

from vlm_calibration.models.base import FLEX
from vlm_calibration.models.loading import use_in_language_model
from vlm_calibration.models.shared_prefix import Prompts, score_responses

SIDE, IMAGE = 1024, 1
IMAGE_TOKENS, PROMPT, RESPONSES, RESPONSE_TOKENS = (SIDE // PATCH) ** 2, 200, 10, 16
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of two log-likelihoods of a token."""
SIDES = {"sdpa, dense mask": "sdpa", "FlexAttention, block mask": FLEX}


def build_model(device: torch.device) -> Any:
    """A random LLaVA with 4,096 tokens an image, whose tower has one layer."""
    sizes = LARGE if device.type == "cuda" else SMALL
    config = llava(SIDE, 1, IMAGE, {**sizes, "max_position_embeddings": 8192, "pad_token_id": 0})
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LlavaForConditionalGeneration(config).to(device, dtype).eval()


def make_rows(model: Any, batch: int) -> tuple[Prompts, list[list[list[int]]]]:
    """Prompts with their images, and responses that differ from their first token on."""
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        return torch.randint(10, VOCABULARY, shape, generator=generator)

    ids = torch.cat([torch.full((batch, IMAGE_TOKENS), IMAGE), words(batch, PROMPT)], 1).to(model.device)
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=generator).to(model.device, model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    lengths = torch.full((batch,), ids.shape[1], device=model.device)
    return Prompts(inputs, lengths), words(batch, RESPONSES, RESPONSE_TOKENS).tolist()


def mask_bytes(model: Any, forward: Callable[[], Any]) -> int:
    """Bytes of the mask that the first layer gets; of a block mask its tables, and what its function reads."""
    sizes = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        tensors = [mask]
        if isinstance(mask, BlockMask):
            function: Any = mask.mask_mod
            tensors = [*mask.as_tuple(), *(cell.cell_contents for cell in function.__closure__)]
        sizes.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)))

    attention = model.get_decoder().layers[0].self_attn
    handle = attention.register_forward_pre_hook(record, with_kwargs=True)
    forward()
    handle.remove()
    return sizes[0]


def measured(model: Any, run: Callable[[], Tensor]) -> tuple[float, int]:
    """Seconds of a pass, and how far memory rises above what is held before it: of the GPU, else of the process."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        reset_peak()
        before = peak_bytes()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated() if cuda else peak_bytes()) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="rows in a pass")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backward = device.type == "cuda"
    model = build_model(device)
    prompts, responses = make_rows(model, args.batch)

    def run() -> Tensor:
        with torch.set_grad_enabled(backward):
            scores = score_responses(model, prompts, responses, "shared").log_likelihood
        if backward:
            scores.mean().backward()
            model.zero_grad(set_to_none=True)
        return scores.detach()

    sizes, results = {}, {}
    for name, attention in SIDES.items():
        use_in_language_model(model, attention)
        sizes[name] = mask_bytes(model, lambda name=name: results.update({name: run()}))  # type: ignore[misc]
    passes: dict[str, list[tuple[float, int]]] = {name: [] for name in SIDES}
    for _ in range(args.rounds):
        for name, attention in SIDES.items():
            use_in_language_model(model, attention)
            passes[name].append(measured(model, run))
    dense, flex = SIDES
    difference = float((results[dense] - results[flex]).abs().max())
    where = torch.cuda.get_device_name() if backward else processor()
    row = IMAGE_TOKENS + PROMPT + RESPONSES * (RESPONSE_TOKENS - 1)
    print(
        f"{where}; {setting('torch', 'transformers')}; {args.batch} x {row} tokens, medians of {args.rounds}\n"
    )
    print(
        f"| side | mask (KiB) | {'forward and backward' if backward else 'forward'} (s) | rise of memory (MiB) |"
    )
    print("|---|---|---|---|")
    for name, runs in passes.items():
        seconds, rise = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {sizes[name] / 2**10:,.0f} | {seconds:.2f} | {rise / 2**20:,.0f} |")
    print(f"\nLargest difference of a token's log-likelihood: {difference:.1e}")
    if sizes[flex] * 1000 > sizes[dense] or not difference < TOLERANCE[model.dtype]:
        raise SystemExit("the bar is missed: see the docstring of this script")


if __name__ == "__main__":
    main()
