"""The torchmetrics classes: keys, shared state, forward, reset, persistence, casts, categories and refusals."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from vlm_calibration.metrics import CalibrationMetrics, ConfidenceTable, TaskMetrics, UndefinedMetricWarning
from vlm_calibration.metrics.functional import METRICS, REPORTED, table_values
from vlm_calibration.metrics.task import TASK_METRICS, count_answers, task_scores

NAMES = (
    *("n", "ece", "ace", "mce", "brier", "brier_reliability", "brier_resolution", "brier_uncertainty"),
    *("log_loss", "auroc", "aurc", "smooth_ece", "mean_confidence", "overconfidence", "parse_failure_rate"),
)
"""The keys of `metrics.json`."""


def batches(seed=0, sizes=(40, 1, 0, 59)):
    """Batches of (confidence, correct, category), some confidences unparsed, some answers without a category."""
    rng = np.random.default_rng(seed)
    data = []
    for n in sizes:
        confidence = rng.integers(0, 11, n) / 10
        correct = rng.random(n) < 0.2 + 0.6 * confidence
        confidence[rng.random(n) < 0.1] = np.nan
        category = [[None, "a", "b"][i] for i in rng.integers(0, 3, n)]
        data.append((torch.tensor(confidence), torch.tensor(correct, dtype=torch.bool), category))
    return data


def floats(values):
    return {name: float(value) for name, value in values.items()}


@pytest.fixture
def filled():
    metrics = CalibrationMetrics(prefix="val/", categories=(name for name in ("a", "b")))
    for batch in batches():
        metrics.update(*batch)
    return metrics


def expected(data, prefix="", names=REPORTED, categories=("a", "b")):
    confidence, correct = (torch.cat([batch[i] for batch in data]) for i in (0, 1))
    category = [name for batch in data for name in batch[2]]
    values = {}
    for name in ("", *categories):
        chosen = [not name or c == name for c in category]
        table = ConfidenceTable.from_predictions(confidence[chosen], correct[chosen])
        values |= table_values(table, names, f"/{name}" if name else "")
    return {prefix + name: value for name, value in values.items()}


def test_values_and_keys(filled):
    values = filled.compute()
    assert floats(values) == expected(batches(), "val/")
    assert list(values)[:15] == [f"val/{name}" for name in NAMES]
    assert all(v.shape == () and v.dtype == torch.float64 for v in values.values())
    assert isinstance(filled, MetricCollection)
    # Without categories, the category is not used.
    metrics = CalibrationMetrics(postfix="_test")
    for batch in batches():
        metrics.update(*batch)
    total = expected(batches(), categories=())
    assert floats(metrics.compute()) == {f"{name}_test": value for name, value in total.items()}


def test_an_answer_may_be_in_several_categories():
    metrics, tasks = CalibrationMetrics(categories=["a", "b"]), TaskMetrics(categories=["a", "b"])
    confidence, correct = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([True, False, False])
    category = [("a", "b"), None, ["b"]]
    metrics.update(confidence, correct, category)
    tasks.update(["yes", "no", "no"], ["yes", "yes", "yes"], correct, category)
    values = {**metrics.compute(), **tasks.compute()}
    assert [values[f"n{suffix}"] for suffix in ("", "/a", "/b")] == [3, 1, 2]
    assert [values[f"accuracy{suffix}"] for suffix in ("", "/a", "/b")] == [pytest.approx(1 / 3), 1, 1 / 2]
    assert float(values["mean_confidence/b"]) == pytest.approx(0.55)


def test_an_update_runs_one_bincount(monkeypatch):
    """All metrics and two categories: one count an update, and one a forward, which returns the values of its batch."""
    calls, data = [], batches(sizes=(40, 30, 7))
    sizes = [2 * len(category) - category.count(None) for _, _, category in data]  # overall and by category
    batch, total = expected([data[2]], names=METRICS), expected(data, names=METRICS)
    bincount = torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda x, **k: (calls.append(len(x)), bincount(x, **k))[1])
    metrics = CalibrationMetrics(categories=["a", "b"], metrics=METRICS)
    for answers in data[:2]:
        metrics.update(*answers)
    assert calls == sizes[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert floats(metrics(*data[2])) == pytest.approx(batch, nan_ok=True)
        assert calls == sizes
        assert floats(metrics.compute()) == pytest.approx(total, nan_ok=True)


def test_reset(filled):
    filled.reset()
    with pytest.warns(
        UndefinedMetricWarning, match="auroc, auroc/a, auroc/b: all answers are correct or all"
    ) as caught:
        values = filled.compute()
    assert len(caught) == 1
    assert values["val/n"] == values["val/n/a"] == 0
    assert all(math.isnan(v) for k, v in values.items() if "/n" not in k)
    filled.update(*batches(2)[0])
    assert floats(filled.compute()) == pytest.approx(expected([batches(2)[0]], "val/"), nan_ok=True)


def test_pickling_and_copying(filled):
    for copied in (pickle.loads(pickle.dumps(filled)), copy.deepcopy(filled), filled.clone()):
        assert floats(copied.compute()) == floats(filled.compute())
        copied.update(*batches(1)[0])
        assert floats(copied.compute()) == expected([*batches(), batches(1)[0]], "val/")
    assert floats(filled.compute()) == expected(batches(), "val/")
    renamed = filled.clone(prefix="test/")
    assert next(iter(renamed.compute())) == "test/n"


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.set_dtype(torch.float32),
        lambda m: torch.nn.ModuleDict({"m": m}).to(torch.bfloat16)["m"],
    ],
)
def test_casts_leave_the_counts_alone(filled, cast):
    cast(filled)
    for member in filled.values():
        member.set_dtype(torch.float16)
        assert member.counts.dtype == torch.int64
    filled.update(*batches(1)[0])
    assert floats(filled.compute()) == expected([*batches(), batches(1)[0]], "val/")


def test_moving_to_a_device_moves_the_state(filled):
    moved = copy.deepcopy(filled).to("meta")
    assert all(member.counts.device.type == "meta" for member in moved.values(copy_state=False))
    assert all(member.counts.device.type == "cpu" for member in filled.values(copy_state=False))
    assert filled.to("cpu").compute()["val/ece"].device.type == "cpu"


def test_inference_mode_then_training():
    """Counts from inference mode, such as a Lightning validation, can be added to outside of it."""
    metrics = CalibrationMetrics()
    with torch.inference_mode():
        metrics.update(*batches()[0][:2])
    metrics.update(*batches()[1][:2])
    assert int(metrics.compute()["n"]) == 41
    with torch.inference_mode():
        metrics.reset()
    metrics.update(*batches()[0][:2])
    assert int(metrics.compute()["n"]) == 40


def test_task_metrics():
    rng = np.random.default_rng(0)
    metrics = TaskMetrics(categories=["a", "b"])
    rows = []
    for n in (20, 0, 31):
        gold = rng.choice(["yes", "no", "a bus"], n).tolist()
        said = [[g, "no", None][i] for g, i in zip(gold, rng.choice(3, n, p=[0.6, 0.3, 0.1]), strict=True)]
        correct = [g == s for g, s in zip(gold, said, strict=True)]
        category = rng.choice(["a", "b"], n).tolist()
        metrics.update(said, gold, torch.tensor(correct, dtype=torch.bool), category)
        rows += zip(said, gold, correct, category, strict=True)
    values = metrics.compute()
    for suffix in ("", "/a", "/b"):
        said, gold, correct, _ = zip(*(r for r in rows if suffix in ("", f"/{r[3]}")), strict=True)
        for name, value in task_scores(count_answers(said, gold, correct)).items():
            assert float(values[f"{name}{suffix}"]) == value
    assert len(values) == 15
    assert list(values)[:5] == list(TASK_METRICS)
    with pytest.warns(UserWarning, match="accuracy/b: there is no answer"):
        batch = metrics(["yes"], ["yes"], torch.tensor([True]), ["a"])
    assert batch["precision"] == 1
    assert pickle.loads(pickle.dumps(metrics)).compute().keys() == values.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_steps": 0}, "grid_steps must be"),
        ({"metrics": ["bogus"]}, "unknown metric 'bogus'"),
        ({"categories": "a"}, "list of names, got the string 'a'"),
        ({"categories": ["a", "a"]}, "must differ"),
        ({"categories": [""]}, "not be empty"),
        ({"nonsense": 1}, "Unexpected keyword"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationMetrics(**options)


@pytest.mark.parametrize(
    ("confidence", "category", "message"),
    [
        ([0.5, 0.5], ["a", "z"], r"unknown categories \['z'\]; declared are \['a', 'b'\]"),
        ([0.5, 0.5], ["a"], "one name for each of the 2 answers"),
        ([0.5, 0.5], "ab", "one name for each"),
        ([0.5, 1.5], [("a", "b"), ("a",)], r"confidence\[1\] = 1.5 is outside"),
    ],
)
def test_a_bad_update_leaves_the_state(filled, confidence, category, message):
    before = floats(filled.compute())
    with pytest.raises(ValueError, match=message):
        filled.update(torch.tensor(confidence), torch.tensor([True, False]), category)
    assert floats(filled.compute()) == before
