"""The level table and levels that several tests share."""

import pytest

from vlm_calibration.perturbation.levels import AnchoredLevels, StepCount

COUNTS = {
    "yes_no": [StepCount(0, 200, 190), StepCount(500, 200, 150), StepCount(1000, 200, 104)],
    # By chance the accuracy at 1000 is higher than at 500.
    "short": [StepCount(0, 100, 97), StepCount(500, 100, 20), StepCount(1000, 300, 90)],
}


@pytest.fixture
def levels():
    return AnchoredLevels.fit(COUNTS, provenance={"model": "tiny", "schedule": "linear", "seed": 0})
