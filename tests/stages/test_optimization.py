"""AdamW and its learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vlm_calibration.records import DataError
from vlm_calibration.stages.training import OptimizerSettings, adamw_with_schedule, learning_rate_factor


def test_warm_up_then_cosine() -> None:
    settings = OptimizerSettings(warmup_fraction=0.2, final_fraction=0.1)
    factors = [learning_rate_factor(step, 100, settings) for step in range(101)]
    assert factors[:20] == pytest.approx([(s + 1) / 21 for s in range(20)])
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[100] == pytest.approx(0.1)
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert learning_rate_factor(500, 100, settings) == pytest.approx(0.1), "it stays there after the end"


def test_every_step_of_a_short_run_trains() -> None:
    for warmup in (0.0, 0.05, 0.5, 0.99):
        settings = OptimizerSettings(warmup_fraction=warmup)
        for total in (1, 2, 3, 10):
            assert all(0 < learning_rate_factor(step, total, settings) <= 1 for step in range(total))


def test_settings_reach_adamw() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    settings = OptimizerSettings(lr=0.5, weight_decay=0.1, betas=(0.5, 0.6), eps=1e-3, warmup_fraction=0.0)
    configured = adamw_with_schedule([parameter], settings, 4)
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    [group] = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group[k] for k in ("weight_decay", "betas", "eps")] == [0.1, (0.5, 0.6), 1e-3]
    rates = []
    for _ in range(4):
        rates.append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * (0.5 + 0.5 * math.cos(math.pi * i / 4)) for i in range(4)])


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_fraction": 1.0},
        {"final_fraction": math.nan},
        {"lr": 0.0},
        {"lr": math.nan},
        {"weight_decay": -0.1},
    ],
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    [name] = settings
    with pytest.raises(DataError, match=rf"{name} .*found {settings[name]}"):
        OptimizerSettings(**settings)
