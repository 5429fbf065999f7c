"""The torchmetrics classes: keys, shared state, forward, reset, persistence, casts and categories; task metrics; counts of probes."""

import copy
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score
from torchmetrics import MetricCollection

from vlm_calibration.metrics import CalibrationMetrics, ConfidenceTable, TaskMetrics, UndefinedMetricWarning
from vlm_calibration.metrics.counting import ProbeMetrics
from vlm_calibration.metrics.functional import METRICS, REPORTED, table_values
from vlm_calibration.metrics.task import TASK_METRICS, count_answers, task_scores
from vlm_calibration.records import ORIGINAL

NAMES = (
    *("n", "ece", "ace", "mce", "brier", "brier_reliability", "brier_resolution", "brier_uncertainty"),
    *("log_loss", "auroc", "aurc", "smooth_ece", "mean_confidence", "overconfidence", "parse_failure_rate"),
)
"""The keys of `metrics.json`."""


def batches(seed=0, sizes=(40, 1, 0, 59)):
    """Batches of (confidence, correct, categories), some confidences unparsed, some answers in no category or in two."""
    rng = np.random.default_rng(seed)
    data = []
    for n in sizes:
        confidence = rng.integers(0, 11, n) / 10
        correct = rng.random(n) < 0.2 + 0.6 * confidence
        confidence[rng.random(n) < 0.1] = np.nan
        categories = [[(), ("a",), ("b",), ("a", "b")][i] for i in rng.integers(0, 4, n)]
        data.append((torch.tensor(confidence), torch.tensor(correct, dtype=torch.bool), categories))
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
    of_answers = [names for batch in data for names in batch[2]]
    values = {}
    for name in ("", *categories):
        chosen = [not name or name in names for names in of_answers]
        table = ConfidenceTable.from_predictions(confidence[chosen], correct[chosen])
        values |= table_values(table, names, f"/{name}" if name else "")
    return {prefix + name: value for name, value in values.items()}


def test_values_and_keys(filled):
    values = filled.compute()
    assert floats(values) == expected(batches(), "val/")
    assert list(values)[:15] == [f"val/{name}" for name in NAMES]
    assert all(v.shape == () and v.dtype == torch.float64 for v in values.values())
    assert isinstance(filled, MetricCollection)
    # Without categories, those of an update are not used.
    metrics = CalibrationMetrics(postfix="_test")
    for batch in batches():
        metrics.update(*batch)
    total = expected(batches(), categories=())
    assert floats(metrics.compute()) == {f"{name}_test": value for name, value in total.items()}


def test_an_update_runs_one_bincount(monkeypatch):
    """All metrics and two categories: one count an update, and one a forward, which returns the values of its batch."""
    calls, data = [], batches(sizes=(40, 30, 7))
    sizes = [sum(1 + len(names) for names in categories) for _, _, categories in data]
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
    reasons = "auroc, auroc/a, auroc/b: all answers are correct or all"
    with pytest.warns(UndefinedMetricWarning, match=reasons) as caught:
        values = filled.compute()
    assert len(caught) == 1
    assert values["val/n"] == values["val/n/a"] == 0
    assert all(math.isnan(v) for k, v in values.items() if "/n" not in k)
    filled.update(*batches(2)[0])
    assert floats(filled.compute()) == pytest.approx(expected([batches(2)[0]], "val/"), nan_ok=True)


@pytest.mark.parametrize(
    "changed",
    [
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.deepcopy,
        lambda m: m.half(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: torch.nn.ModuleDict({"m": m}).to(torch.bfloat16)["m"],
    ],
)
def test_copies_and_casts_go_on_counting(filled, changed):
    metrics = changed(filled)
    assert floats(metrics.compute()) == expected(batches(), "val/")
    metrics.update(*batches(1)[0])
    assert floats(metrics.compute()) == expected([*batches(), batches(1)[0]], "val/")
    assert all(member.counts.dtype == torch.int64 for member in metrics.values())
    moved = copy.deepcopy(metrics).to("meta")
    assert all(member.counts.device.type == "meta" for member in moved.values(copy_state=False))


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


@pytest.mark.parametrize(
    ("confidence", "categories", "error", "message"),
    [
        ([0.5, 0.5], [["a"], ["z"]], KeyError, "'z'"),
        ([0.5, 0.5], [["a"]], ValueError, "argument 2 is shorter"),
        ([0.5, 1.5], [["a", "b"], ["a"]], ValueError, r"confidence\[1\] = 1.5 is outside"),
    ],
)
def test_a_bad_update_leaves_the_state(filled, confidence, categories, error, message):
    before = floats(filled.compute())
    with pytest.raises(error, match=message):
        filled.update(torch.tensor(confidence), torch.tensor([True, False]), categories)
    assert floats(filled.compute()) == before


# --- task metrics


def test_task_metrics_against_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(25):
        n = int(rng.integers(1, 40))
        gold = rng.choice(["yes", "no"], size=n)
        predicted = rng.choice(["yes", "no", "maybe"], size=n, p=rng.dirichlet([1, 1, 0.5]))
        scores = task_scores(count_answers(predicted.tolist(), gold.tolist(), gold == predicted))
        y, x = gold == "yes", predicted == "yes"
        assert scores["accuracy"] == pytest.approx((gold == predicted).mean())
        assert scores["precision"] == pytest.approx(precision_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["recall"] == pytest.approx(recall_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["f1"] == pytest.approx(f1_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["yes_ratio"] == pytest.approx(x.mean())


def test_open_questions_count_in_the_accuracy_only():
    """An unparsed answer is negative and stays in the ratio."""
    counts = count_answers(
        ["yes", "Yes.", None, "no", "a red bus", None],
        ["yes", "no", " YES ", "No", "a red bus", "seven"],
        [True, False, False, True, True, False],
    )
    assert task_scores(counts, "/a") == pytest.approx(
        {"accuracy/a": 3 / 6, "precision/a": 1 / 2, "recall/a": 1 / 2, "f1/a": 1 / 2, "yes_ratio/a": 2 / 4}
    )


def test_answers_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="got 1 predicted, 2 answers"):
        count_answers(["yes"], ["no", "no"], [True, True])


def test_task_metrics():
    rng = np.random.default_rng(0)
    metrics = TaskMetrics(categories=["a", "b"])
    rows = []
    for n in (20, 0, 31):
        gold = rng.choice(["yes", "no", "a bus"], n).tolist()
        said = [[g, "no", None][i] for g, i in zip(gold, rng.choice(3, n, p=[0.6, 0.3, 0.1]), strict=True)]
        correct = [g == s for g, s in zip(gold, said, strict=True)]
        category = rng.choice(["a", "b"], n).tolist()
        metrics.update(said, gold, torch.tensor(correct, dtype=torch.bool), [[name] for name in category])
        rows += zip(said, gold, correct, category, strict=True)
    values = metrics.compute()
    for suffix in ("", "/a", "/b"):
        said, gold, correct, _ = zip(*(r for r in rows if suffix in ("", f"/{r[3]}")), strict=True)
        for name, value in task_scores(count_answers(said, gold, correct)).items():
            assert float(values[f"{name}{suffix}"]) == value
    assert len(values) == 15
    assert list(values)[:5] == list(TASK_METRICS)
    with pytest.warns(UserWarning, match="accuracy/b: there is no answer"):
        batch = metrics(["yes"], ["yes"], torch.tensor([True]), [["a"]])
    assert batch["precision"] == 1


# --- probes


PROBES = ("image", "answer")
GROUPS = ("a", "b", "empty")


def draw(n):
    """Confidences of whole percents and of millionths, some missing, and the groups of each answer."""
    rng = np.random.default_rng(0)

    def one():
        if rng.random() < 0.2:
            return None
        return float(rng.integers(0, 11) / 10) if rng.random() < 0.7 else round(float(rng.random()), 6)

    probed = [{name: one() for name in (ORIGINAL, *PROBES)} for _ in range(n)]
    return probed, [[g for g in ("a", "b") if rng.random() < 0.5] for _ in range(n)]


def by_hand(probed, probe):
    pairs = [
        (Fraction(str(p[ORIGINAL])), Fraction(str(p[probe])))
        for p in probed
        if p[ORIGINAL] is not None and p[probe] is not None
    ]
    n = len(pairs)
    if not n:
        return {"n": 0.0, **dict.fromkeys(("change", "fell", "stayed", "rose", "sum"), math.nan)}
    return {
        "n": float(n),
        "change": float(sum(after - before for before, after in pairs) / n),
        "fell": sum(after < before for before, after in pairs) / n,
        "stayed": sum(after == before for before, after in pairs) / n,
        "rose": sum(after > before for before, after in pairs) / n,
        "sum": float(sum(after + before for before, after in pairs) / n),
    }


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_every_number_of_probes_is_that_of_a_loop(batch):
    probed, groups = draw(200)
    metrics = ProbeMetrics(PROBES, GROUPS)
    for start in range(0, 200, batch):
        metrics.update(probed[start : start + batch], groups[start : start + batch])
    values = {name: float(value) for name, value in metrics.compute().items()}
    expected = {}
    for group in ("", *GROUPS):
        members = [p for p, of in zip(probed, groups, strict=True) if not group or group in of]
        for probe in PROBES:
            named = by_hand(members, probe)
            if probe != "answer":
                del named["sum"]
            suffix = f"/{group}" if group else ""
            expected |= {f"probe_{probe}_{name}{suffix}": value for name, value in named.items()}
    assert values == pytest.approx(expected, abs=1e-15, nan_ok=True)
    assert 0 < values["probe_image_fell"] < 1
    assert ProbeMetrics((), GROUPS).compute() == {}
