"""What the Trainer's strategy changes in an estimate for one GPU."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import Namespace

from vlm_calibration.models.memory import MemoryEstimate
from vlm_calibration.stages.gpu_shares import on_each_gpu, sharing_of

WHOLE = MemoryEstimate(
    parameters=10,
    trained=2,
    weights={"bfloat16": 8000, "float32": 80},
    gradients=800,
    optimizer=1600,
    activations=7,
    largest_gathered=500,
)


def _trainer(strategy: Any, **settings: Any) -> Namespace:
    if isinstance(strategy, tuple):
        name, init_args = strategy
        strategy = Namespace(
            class_path=f"lightning.pytorch.strategies.{name}", init_args=Namespace(init_args)
        )
    return Namespace(strategy=strategy, **{"devices": 1, "num_nodes": 1, **settings})


@pytest.mark.parametrize(
    ("strategy", "devices", "buckets"),
    [
        ("auto", 1, 0),
        ("auto", 2, 800),
        ("auto", "0,1", 800),
        ("ddp", "auto", 800),
        (("DDPStrategy", {}), 4, 800),
        (("DDPStrategy", {"gradient_as_bucket_view": True}), 4, 0),
        ("ddp_find_unused_parameters_true", 4, 800),
    ],
)
def test_ddp_copies_the_gradients(strategy: Any, devices: Any, buckets: int) -> None:
    estimate = on_each_gpu(WHOLE, _trainer(strategy, devices=devices))
    assert estimate.buckets == buckets
    assert estimate.total == WHOLE.total + buckets
    assert sharing_of(_trainer(strategy, devices=devices)).note == ""


def test_fsdp_divides_all_states_and_gathers_some_weights() -> None:
    trainer = _trainer(("ModelParallelStrategy", {"data_parallel_size": 8, "tensor_parallel_size": 1}))
    estimate = on_each_gpu(WHOLE, trainer)
    assert estimate.weights == {"bfloat16": 1000, "float32": 10}
    assert (estimate.gradients, estimate.optimizer, estimate.gathered) == (100, 200, 500)
    assert estimate.total == 1010 + 100 + 200 + 500 + 7


@pytest.mark.parametrize(
    ("strategy", "devices", "says"),
    [
        (("ModelParallelStrategy", {"data_parallel_size": "auto"}), "auto", "trainer.devices"),
        (("ModelParallelStrategy", {"tensor_parallel_size": 2}), 2, "tensor parallelism"),
        ("xla", 1, "xla"),
    ],
)
def test_what_is_not_covered_is_said(strategy: Any, devices: Any, says: str) -> None:
    trainer = _trainer(strategy, devices=devices)
    assert says in sharing_of(trainer).note
    assert on_each_gpu(WHOLE, trainer).weights == WHOLE.weights
