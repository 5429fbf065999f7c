"""Time and cost of training on many queries, by a model of the step's parts: `python -m tests.performance.scale` prints the table of `configs/README.md`.

Floating point operations (FLOPs) follow from the architecture, without weights; `tests/test_gpu_benchmark.py` compares them with those that torch counts in
real steps. Utilisation, bandwidths and price are assumptions, which options change; `make bench-gpu` measures what gives the utilisation. A simulation draws
image sizes for every GPU and step: a step takes as long as the slowest GPU, and the gradients' exchange.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tests.models.published import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vlm_calibration.models.adapters import LoraSettings, layer_parts
from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.loading import empty_vlm


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Attention on the CPU, which torch's counter does not know -> its FLOPs. As on GPUs, a causal mask is not taken off."""
BF16 = torch.bfloat16


class Decoder(NamedTuple):
    """What the FLOPs of a language model with adapters depend on.

    Attributes:
        weights: parameters of its linear layers, N.
        adapters: parameters of their adapters, A.
        attention: layers x heads x width of a head.
        head: parameters of the output head.
    """

    weights: int
    adapters: int
    attention: int
    head: int

    def forward(self, tokens: Any, keys: Any = None) -> Any:
        """FLOPs of so many tokens, each of which attends to so many keys (None: as many as tokens): 2 (N + A) n + 4 L d n k."""
        keys = tokens if keys is None else keys
        return 2 * (self.weights + self.adapters) * tokens + 4 * self.attention * tokens * keys

    def backward(self, tokens: Any) -> Any:
        """Gradients of activations through all weights, of adapters' weights, and attention as by flash attention: 2 (N + 2 A) n + 10 L d n n."""
        return 2 * (self.weights + 2 * self.adapters) * tokens + 10 * self.attention * tokens**2

    def training(self, tokens: Any, checkpointing: bool) -> Any:
        return (1 + checkpointing) * self.forward(tokens) + self.backward(tokens)


def decoder_of(model: Any, lora: LoraSettings) -> Decoder:
    """The language model of a vision-language model without adapters, and with those of these settings on its linear layers."""
    parts = layer_parts(model)
    layers = [model.get_submodule(name) for name, part in parts.items() if part == "language"]
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Decoder(
        sum(layer.weight.numel() for layer in layers),
        lora.r * sum(layer.in_features + layer.out_features for layer in layers),
        config.num_hidden_layers * config.num_attention_heads * width,
        model.get_output_embeddings().weight.numel(),
    )


def flop_counter() -> FlopCounterMode:
    """A counter that knows attention on the CPU."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def tower_flops(model: Any, grid: tuple[int, int]) -> int:
    """FLOPs of the vision tower of a Qwen model for one image of so many rows and columns of patches, counted on fake tensors."""
    tower, vision = model.model.visual, model.config.vision_config
    values = 3 * vision.patch_size**2 * vision.temporal_patch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        states = (*tower.named_parameters(), *tower.named_buffers())
        fakes = {name: torch.empty(state.shape, dtype=state.dtype) for name, state in states}
        pixels = torch.empty(grid[0] * grid[1], values, dtype=next(tower.parameters()).dtype)
    with torch.no_grad(), flop_counter() as counter:
        functional_call(tower, fakes, (pixels,), {"grid_thw": torch.tensor([[1, *grid]])})
    return counter.get_total_flops()


# --- A query --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assumptions:
    """What the model of time takes as given; none of it is measured here.

    Attributes:
        peak: FLOP/s of a GPU in bfloat16.
        utilisation: share of it that matrix products reach, all else included.
        bandwidth: bytes/s of a GPU's memory.
        read: share of it that the generation of answers reaches.
        link: bytes/s with which a GPU exchanges gradients.
        price: of an hour of one GPU.
        batch: queries of a step on one GPU.
        text: tokens of prompt and chat template beside the image.
        response: tokens of an answer with its confidence.
        candidates: confidences that are compared after an own answer, and tokens of each further one.
        pixels: smallest and largest image; drawn uniformly between them.
    """

    peak: float = 989e12
    utilisation: float = 0.4
    bandwidth: float = 3.35e12
    read: float = 0.5
    link: float = 50e9
    price: float = 2.5
    batch: int = 16
    text: int = 100
    response: int = 16
    candidates: tuple[int, int] = (11, 3)
    pixels: tuple[int, int] = (2**18, 2**20)


@dataclass(frozen=True)
class Workload:
    """A stage on one model.

    Attributes:
        decoder: the language model.
        vision: FLOPs of the tower per token of the image.
        pixels_per_token: of the image.
        weight_bytes: that every new token of an answer reads.
        gradient_bytes: that GPUs exchange in a step.
        own: whether the reference answers, as in stage 2.
        assume: the assumptions.
    """

    decoder: Decoder
    vision: float
    pixels_per_token: float
    weight_bytes: float
    gradient_bytes: float
    own: bool
    assume: Assumptions

    def flops(self, image: Any) -> dict[str, Any]:
        """Part of a step -> FLOPs for a query with so many image tokens, a number or an array."""
        a, decoder = self.assume, self.decoder
        candidates, length = a.candidates
        prompt = image + a.text
        suffixes = candidates * length if self.own else 0
        labels = a.response + suffixes
        parts = {
            "vision": self.vision * image,
            "training": decoder.training(prompt + labels, True) + 4 * decoder.head * labels,
        }
        if self.own:
            parts["own answer: prompt"] = decoder.forward(prompt) + 2 * decoder.head
            parts["own answer: scores"] = decoder.forward(labels, prompt + labels) + 2 * decoder.head * labels
        return parts

    def seconds(self, images: np.ndarray) -> np.ndarray:
        """Seconds of one GPU for a batch of queries: image tokens [..., B] to seconds [...]."""
        a = self.assume
        flops = sum(self.flops(images).values()).sum(-1)
        read = a.response * self.weight_bytes / (a.bandwidth * a.read) if self.own else 0.0
        return flops / (a.peak * a.utilisation) + read


def workload(folder: str, own: bool, assume: Assumptions, lora: LoraSettings = LoraSettings()) -> Workload:  # noqa: B008
    """The work of a stage on a Qwen model whose configuration is in a folder."""
    base = BaseModel(folder, dtype="bfloat16")
    decoder = decoder_of(empty_vlm(base), lora)
    model = empty_vlm(base).to(BF16)
    side, config = 64, model.config.vision_config
    vision = tower_flops(model, (side, side)) / (side // config.spatial_merge_size) ** 2
    return Workload(
        decoder,
        vision,
        (config.patch_size * config.spatial_merge_size) ** 2,
        2.0 * (decoder.weights + decoder.head),
        4.0 * decoder.adapters,
        own,
        assume,
    )


# --- Many GPUs ------------------------------------------------------------------------------------------------------


class Forecast(NamedTuple):
    """Time of a stage.

    Attributes:
        hours: of wall-clock time.
        efficiency: share of the GPUs' time in which they compute.
    """

    hours: float
    efficiency: float


def simulate(
    work: Workload, queries: int, gpus: int, batch: int, steps: int = 500, seed: int = 0
) -> Forecast:
    """Simulate steps on several GPUs, each with a batch of queries, and extend their mean to all queries."""
    a = work.assume
    rng = np.random.default_rng(seed)
    pixels = rng.integers(*a.pixels, size=(steps, gpus, batch), endpoint=True)
    busy = work.seconds(np.round(pixels / work.pixels_per_token))  # [steps, GPUs]
    exchange = 2 * (gpus - 1) / gpus * work.gradient_bytes / a.link
    step = busy.max(1).mean() + exchange
    hours = math.ceil(queries / (gpus * batch)) * step / 3600
    return Forecast(hours, float(busy.mean() / step))


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    qwen = [name for name in MODELS if name.startswith("qwen")]
    parser.add_argument("--model", choices=qwen, default="qwen2_5_vl_7b")
    parser.add_argument("--queries", type=int, default=1_000_000)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    defaults = Assumptions()
    for name in ("peak", "utilisation", "price"):
        parser.add_argument(f"--{name}", type=float, default=getattr(defaults, name))
    args = parser.parse_args(arguments)
    assume = replace(defaults, peak=args.peak, utilisation=args.utilisation, price=args.price)
    with tempfile.TemporaryDirectory() as folder:
        MODELS[args.model].config().save_pretrained(Path(folder))
        print("\n".join(rows(folder, args, assume)))


def rows(folder: str, args: argparse.Namespace, assume: Assumptions) -> list[str]:
    """The rows of the table: both stages and their sum, for each number of GPUs."""
    header = (
        "stage",
        "PFLOP a query",
        "queries a GPU",
        "GPUs",
        "queries/s",
        "hours",
        "GPU hours",
        "busy",
        "cost",
    )
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    totals = dict.fromkeys(args.gpus, 0.0)
    mean = round(sum(assume.pixels) / 2)
    for stage, own in (("1", False), ("2", True)):
        work = workload(folder, own, assume)
        flops = sum(work.flops(round(mean / work.pixels_per_token)).values())
        for gpus in args.gpus:
            forecast = simulate(work, args.queries, gpus, assume.batch)
            totals[gpus] += forecast.hours
            rate = args.queries / forecast.hours / 3600
            cells = [stage, f"{flops / 1e15:.3f}", str(assume.batch), str(gpus), f"{rate:.1f}"]
            lines.append(_line([*cells, *_cost(forecast.hours, gpus, assume), f"{forecast.efficiency:.0%}"]))
    for gpus, hours in totals.items():
        lines.append(_line(["both", "", "", str(gpus), "", *_cost(hours, gpus, assume), ""]))
    return lines


def _cost(hours: float, gpus: int, assume: Assumptions) -> list[str]:
    return [f"{hours:.1f}", f"{hours * gpus:.0f}", f"{hours * gpus * assume.price:,.0f}"]


def _line(cells: Sequence[str]) -> str:
    *start, hours, gpu_hours, cost, busy = cells
    return f"| {' | '.join([*start, hours, gpu_hours, busy, cost])} |"


if __name__ == "__main__":
    main()
