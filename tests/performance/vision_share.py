"""The share of the vision tower in a step, by the floating-point operations of a pass of each part: what a cache of its results could save.

Run with `python -m tests.performance.vision_share`; prints a Markdown table. The model is Qwen2.5-VL-7B on the meta device, with an image
of 1 megapixel, a prompt of 60 tokens and a response of 16, or eleven of them behind a shared prefix. Tower and embeddings are frozen: a
backward pass through frozen linear layers costs as much as the forward pass, and gradient checkpointing adds a forward pass. A cache
that outlives a step can serve untouched images alone, `clean_fraction` 0.35 of those in training. A cache is worth its disk above 15%
of a step; the script ends with status 1 if a row of training is above.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from tests.models.published import qwen2_5_vl_7b
from tests.performance.machine import setting
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

PATCH, MERGE, PATCH_VALUES = 14, 2, 3 * 2 * 14**2
GRID = (64, 78)
"""Patches of an image of 896 x 1092 pixels, what the processor makes of 1 megapixel."""
IMAGE_TOKENS = GRID[0] * GRID[1] // MERGE**2
PROMPT, RESPONSE, CANDIDATES = 60, 16, 11
CLEAN, WORTH = 0.35, 0.15


def flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def language_pass(model: Any, tokens: int, predicted: int) -> int:
    """A forward pass over a row, with the head at the predicted positions."""
    decoder, width = model.model.language_model, model.config.text_config.hidden_size
    embeddings = torch.empty(1, tokens, width, dtype=model.dtype, device="meta")
    positions = torch.zeros(3, 1, tokens, dtype=torch.int64, device="meta")
    hidden = torch.empty(predicted, width, dtype=model.dtype, device="meta")
    of_layers = flops(
        lambda: decoder(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask={"full_attention": None},
            use_cache=False,
        )
    )
    return of_layers + flops(lambda: model.lm_head(hidden))


def vision_pass(model: Any) -> int:
    """A pass over one image: each layer on meta tensors, because the grid of the image must be real."""
    tower = model.model.visual
    patches = GRID[0] * GRID[1]
    width, side = tower.config.hidden_size, tower.config.window_size // PATCH
    heads = tower.config.num_heads
    values = torch.empty(patches, PATCH_VALUES, dtype=model.dtype, device="meta")
    hidden = torch.empty(patches, width, dtype=model.dtype, device="meta")
    total = flops(lambda: tower.patch_embed(values)) + flops(lambda: tower.merger(hidden))
    for number, block in enumerate(tower.blocks):
        attends = patches if number in tower.config.fullatt_block_indexes else side**2
        total += flops(lambda block=block: block.mlp(hidden))
        total += flops(lambda block=block: block.attn.proj(block.attn.qkv(hidden)[:, :width]))
        total += 4 * patches * attends * (width // heads) * heads  # queries by keys, and weights by values
    return total


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            qwen2_5_vl_7b(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    vision = vision_pass(model)
    prompt = IMAGE_TOKENS + PROMPT
    one = language_pass(model, prompt + RESPONSE, RESPONSE)
    packed = language_pass(model, prompt + CANDIDATES * RESPONSE, CANDIDATES * RESPONSE)
    behind = packed - language_pass(model, prompt, 0)
    answer = language_pass(model, prompt, 1) + RESPONSE * language_pass(model, 1, 1)
    # Stage 2 on own answers: the reference answers and scores all candidates behind its cache, the policy trains on them.
    steps = {
        "stage 1": 2 * one,
        "stage 1, gradient checkpointing": 3 * one,
        "stage 2, own answers": answer + behind + 2 * packed,
        "stage 2, own answers, gradient checkpointing": answer + behind + 3 * packed,
    }
    tests = {"evaluation of one system": answer, "evaluation of three systems": 3 * answer}
    print(
        f"{setting('torch', 'transformers')}; a pass of the tower is {vision / 1e12:.1f} TFLOP, of the language model over "
        f"{prompt + RESPONSE} tokens {one / 1e12:.1f}\n"
    )
    print("| step, each query | TFLOP | vision | saved by a cache of untouched images |")
    print("|---|---|---|---|")
    too_much = []
    for name, language in {**steps, **tests}.items():
        share = vision / (vision + language)
        saved = share * CLEAN if name in steps else None
        too_much += [name] if saved is not None and saved > WORTH else []
        cell = "only from run to run" if saved is None else f"{saved:.1%}"
        print(f"| {name} | {(vision + language) / 1e12:.1f} | {share:.1%} | {cell} |")
    if too_much:
        raise SystemExit(f"a cache would save more than {WORTH:.0%}: {', '.join(too_much)}")


if __name__ == "__main__":
    main()
