"""Every metric, declared once: here as a pure function of `(confidence, correct)`, and in `METRICS` as one of a `ConfidenceTable`.

`confidence` is float [N] in [0, 1] without NaN, `correct` is bool [N]; a ValueError names the first value that is neither. Values are
grouped by one sort and not rounded. The result is a float64 scalar on the device of `confidence` (float32 on MPS), NaN with one
`UndefinedMetricWarning` where the metric is undefined. Ranking metrics are in expectation over random orders of equally confident answers.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_calibration.metrics import smooth
from vlm_calibration.metrics.table import Binning, ConfidenceTable, GapNorm, bin_index, bin_sums

UNPARSED = "there is no answer with a readable confidence"


class UndefinedMetricWarning(UserWarning):
    """A metric is undefined on the given answers, such as AUROC when all are correct, and is NaN."""


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """The declaration of a metric.

    Attributes:
        heading: short name for table columns.
        undefined: when the value is NaN, as the end of a sentence.
        higher_is_better: None where neither direction is better by itself.
        lower, upper: smallest and largest possible value; infinity if there is none.
        format: of the value in tables.
    """

    heading: str
    undefined: str
    higher_is_better: bool | None = None
    lower: float = 0.0
    upper: float = 1.0
    format: str = ".3f"


@dataclass(frozen=True, kw_only=True)
class CalibrationMetric(MetricSpec):
    """The declaration of a metric of confidence; called with a table or a batch of replicates, it returns its value.

    Attributes:
        function: from a `ConfidenceTable` to float64 [...], NaN where undefined, without a warning.
        gaps: the metric as a norm of gaps, for its confidence interval; None if it is no calibration error.
    """

    function: Callable[[ConfidenceTable], Tensor]
    gaps: GapNorm | None = None

    def __call__(self, table: ConfidenceTable) -> Tensor:
        return self.function(table)


METRICS: dict[str, CalibrationMetric] = {}
"""The declarations of all metrics of confidence by flat name, those of `metrics.json` first and in their order there."""


def table_values(table: ConfidenceTable, names: Iterable[str], suffix: str = "") -> dict[str, float]:
    """The named metrics of one table, NaN where undefined, without a warning."""
    return {name + suffix: float(METRICS[name](table)) for name in names}


def to_device_of(value: Tensor, like: Tensor) -> Tensor:
    """Move a float64 result to another tensor's device; MPS has no float64 and gets float32."""
    return value.to(like.device, torch.float32 if like.device.type == "mps" else torch.float64)


def of_values(formula: Callable[[ConfidenceTable], Any], undefined: str = UNPARSED) -> Callable[..., Any]:
    """Turn a formula of a `ConfidenceTable` into a function of raw values."""

    @wraps(formula, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def function(confidence: Tensor, correct: Tensor) -> Any:
        table = ConfidenceTable.from_predictions(confidence, correct, None)
        if table.unparsed:
            index = int(confidence.isnan().nonzero()[0])
            raise ValueError(f"confidence[{index}] is not a number; leave out answers without a confidence")
        value = formula(table)
        parts = value if isinstance(value, tuple) else (value,)
        if any(bool(part.isnan()) for part in parts):
            message = f"{formula.__name__} is undefined (NaN): {undefined}"
            warnings.warn(message, UndefinedMetricWarning, stacklevel=2)
        moved = [to_device_of(part, confidence) for part in parts]
        return type(value)(*moved) if isinstance(value, tuple) else moved[0]

    del function.__wrapped__  # else `inspect.signature` shows that of the formula
    return function


def metric(
    name: str, heading: str, undefined: str = UNPARSED, **declaration: Any
) -> Callable[[Callable[[ConfidenceTable], Tensor]], Callable[..., Tensor]]:
    """Enter the decorated formula in `METRICS`, and put its function of raw values in its place."""

    def declare(formula: Callable[[ConfidenceTable], Tensor]) -> Callable[..., Tensor]:
        spec = CalibrationMetric(heading=heading, undefined=undefined, function=formula, **declaration)
        METRICS[name] = spec
        return of_values(formula, undefined)

    return declare


@metric("n", "n", "", upper=float("inf"))
def answer_count(table: ConfidenceTable) -> Tensor:
    """Number of all answers, unparsed ones included.

    >>> answer_count(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(3., dtype=torch.float64)
    """
    return table.total + table.unparsed


def membership(table: ConfidenceTable, binning: Binning) -> Tensor:
    """Which confidence is in which of the ten bins, float64 [L, K]; bins without an answer are left out."""
    one_hot = torch.nn.functional.one_hot(bin_index(table, 10, binning), 10).double()
    return one_hot[:, table.answers @ one_hot > 0]


UNIFORM, QUANTILE = partial(membership, binning="uniform"), partial(membership, binning="quantile")


@metric("ece", "ECE", higher_is_better=False, gaps=GapNorm(UNIFORM, lambda gaps: gaps.abs().sum(-1)))
def expected_calibration_error(table: ConfidenceTable) -> Tensor:
    r"""Expected calibration error (ECE), Naeini et al. (AAAI 2015) and Guo et al. (arXiv 1706.04599).

    :math:`\sum_b w_b |acc_b - conf_b|`, with the share of answers `w_b`, mean confidence `conf_b` and accuracy `acc_b` of each
    of ten bins of equal width. An edge belongs to the bin above it, and 1 to the last bin. Here 2/3 * |0.5 - 0.9| + 1/3 * |0 - 0.3|:

    >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.3667, dtype=torch.float64)
    """
    return bin_sums(table, 10, "uniform").gap.abs().sum(-1) / table.total


@metric("ace", "ACE", higher_is_better=False, gaps=GapNorm(QUANTILE, lambda gaps: gaps.abs().mean(-1), True))
def adaptive_calibration_error(table: ConfidenceTable) -> Tensor:
    r"""Adaptive calibration error (ACE), Nixon et al. (arXiv 1904.01685): mean gap over equal-mass bins.

    :math:`\frac{1}{B} \sum_b |acc_b - conf_b|` over the B of ten bins that hold an answer, as in netcal. Equal confidences
    stay in one bin, so the order of ties does not matter.

    >>> adaptive_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.3500, dtype=torch.float64)
    """
    sums = bin_sums(table, 10, "quantile")
    return sums.mean_gap.abs().sum(-1) / (sums.answers > 0).sum(-1).double()


@metric("mce", "MCE", higher_is_better=False, gaps=GapNorm(UNIFORM, lambda gaps: gaps.abs().amax(-1), True))
def maximum_calibration_error(table: ConfidenceTable) -> Tensor:
    r"""Maximum calibration error (MCE), :math:`\max_b |acc_b - conf_b|` over the bins of the ECE that hold an answer.

    >>> maximum_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.4000, dtype=torch.float64)
    """
    return torch.where(table.total > 0, bin_sums(table, 10, "uniform").mean_gap.abs().amax(-1), torch.nan)


@metric("brier", "Brier", higher_is_better=False)
def brier_score(table: ConfidenceTable) -> Tensor:
    r"""Brier score (1950), :math:`\frac{1}{N} \sum_i (c_i - y_i)^2`.

    >>> brier_score(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.3033, dtype=torch.float64)
    """
    squares = table.wrong * table.value.square() + table.correct * (1 - table.value).square()
    return squares.sum(-1) / table.total


@metric("brier_reliability", "reliability", higher_is_better=False)
def brier_reliability(table: ConfidenceTable) -> Tensor:
    r"""Murphy's reliability :math:`\sum_k w_k (c_k - acc_k)^2` over distinct confidences.

    >>> brier_reliability(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.1367, dtype=torch.float64)
    """
    gap = table.answers * table.value - table.correct
    return (gap.square() / table.answers.clamp_min(1)).sum(-1) / table.total


@metric("brier_resolution", "resolution", higher_is_better=True, upper=0.25)
def brier_resolution(table: ConfidenceTable) -> Tensor:
    r"""Murphy's resolution :math:`\sum_k w_k (acc_k - acc)^2` over distinct confidences.

    >>> brier_resolution(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.0556, dtype=torch.float64)
    """
    base = (table.correct.sum(-1) / table.total).unsqueeze(-1)
    accuracy = table.correct / table.answers.clamp_min(1)
    return (table.answers * (accuracy - base).square()).sum(-1) / table.total


@metric("brier_uncertainty", "uncertainty", upper=0.25)
def brier_uncertainty(table: ConfidenceTable) -> Tensor:
    """Murphy's uncertainty `acc * (1 - acc)`, which does not depend on the confidences.

    >>> brier_uncertainty(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.2222, dtype=torch.float64)
    """
    accuracy = table.correct.sum(-1) / table.total
    return accuracy * (1 - accuracy)


@metric("log_loss", "log loss", higher_is_better=False, upper=float("inf"))
def log_loss(table: ConfidenceTable) -> Tensor:
    r"""Logarithmic loss in nats, :math:`-\frac{1}{N} \sum_i [y_i \ln c_i + (1 - y_i) \ln (1 - c_i)]`.

    A wrong answer at 100% would cost infinity, which makes every mean infinite and which JSON cannot write. As in
    scikit-learn, confidences are clipped to [eps, 1 - eps] with float64's eps of 2.2e-16: it costs 36.04 nats.

    >>> log_loss(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.9215, dtype=torch.float64)
    """
    eps = torch.finfo(torch.float64).eps
    value = table.value.clamp(eps, 1 - eps)
    likelihood = torch.xlogy(table.correct, value) + torch.xlogy(table.wrong, 1 - value)
    return (0 - likelihood).sum(-1) / table.total


@metric("auroc", "AUROC", "all answers are correct or all are wrong", higher_is_better=True)
def auroc(table: ConfidenceTable) -> Tensor:
    r"""Area under the ROC curve: the probability that a correct answer has more confidence than a wrong one.

    :math:`\frac{1}{n_+ n_-} \sum_{i: y_i = 1} \sum_{j: y_j = 0} [c_i > c_j] + \frac{1}{2} [c_i = c_j]` (Mann-Whitney).

    >>> auroc(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.7500, dtype=torch.float64)
    """
    wrong, correct = table.wrong, table.correct
    wrong_below = wrong.cumsum(-1) - wrong
    return (correct * (wrong_below + wrong / 2)).sum(-1) / (correct.sum(-1) * wrong.sum(-1))


@metric("aurc", "AURC", higher_is_better=False)
def area_under_risk_coverage(table: ConfidenceTable) -> Tensor:
    r"""Area under the risk-coverage curve (AURC), Geifman & El-Yaniv (arXiv 1805.08206).

    :math:`\frac{1}{N} \sum_{k=1}^N risk_k`, where `risk_k` is the error rate of the `k` most confident answers, in
    expectation over the order of ties.

    >>> area_under_risk_coverage(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.5556, dtype=torch.float64)
    """
    answers, wrong = table.answers.flip(-1), table.wrong.flip(-1)
    answers_before = answers.cumsum(-1) - answers
    wrong_before = wrong.cumsum(-1) - wrong
    rate = wrong / answers.clamp_min(1)
    # E[risk after k answers] = (wrong_before + (k - answers_before) * rate) / k; a sum of 1 / k is a difference of digamma functions.
    reciprocals = torch.digamma(answers_before + answers + 1) - torch.digamma(answers_before + 1)
    area = wrong + (wrong_before - answers_before * rate) * reciprocals
    return area.sum(-1) / table.total


smooth_calibration_error = metric(
    "smooth_ece", "smooth ECE", higher_is_better=False, gaps=smooth.SMOOTH_GAPS
)(smooth.smooth_calibration_error)


@metric("mean_confidence", "mean conf.")
def mean_confidence(table: ConfidenceTable) -> Tensor:
    r"""Mean confidence :math:`\frac{1}{N} \sum_i c_i`.

    >>> mean_confidence(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.7000, dtype=torch.float64)
    """
    return (table.answers * table.value).sum(-1) / table.total


@metric("overconfidence", "overconf.", lower=-1.0, format="+.3f")
def overconfidence(table: ConfidenceTable) -> Tensor:
    """Mean confidence minus accuracy, signed: positive is overconfident.

    >>> overconfidence(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.3667, dtype=torch.float64)
    """
    return (table.answers * table.value - table.correct).sum(-1) / table.total


@metric("parse_failure_rate", "unparsed", "there is no answer", higher_is_better=False, format=".1%")
def parse_failure_rate(table: ConfidenceTable) -> Tensor:
    """Share of all answers whose confidence could not be read; 0 for raw values, which all are read.

    >>> parse_failure_rate(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0., dtype=torch.float64)
    """
    return table.unparsed / (table.total + table.unparsed)


REPORTED = tuple(METRICS)  # the names that `metrics.json` holds: `n` to `parse_failure_rate`


@metric("parsed_accuracy", "accuracy (parsed)", higher_is_better=True)
def parsed_accuracy(table: ConfidenceTable) -> Tensor:
    """Accuracy over the answers with a readable confidence.

    >>> parsed_accuracy(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    tensor(0.3333, dtype=torch.float64)
    """
    return table.correct.sum(-1) / table.total


class BrierDecomposition(NamedTuple):
    """Murphy's parts of the Brier score, float64 scalars: `brier = reliability - resolution + uncertainty`."""

    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor


@of_values
def brier_decomposition(table: ConfidenceTable) -> BrierDecomposition:
    """Murphy's parts of the Brier score (1973), over distinct confidences, so that they add up exactly.

    >>> parts = brier_decomposition(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
    >>> parts.reliability - parts.resolution + parts.uncertainty
    tensor(0.3033, dtype=torch.float64)
    """
    return BrierDecomposition(*(METRICS[f"brier_{part}"](table) for part in BrierDecomposition._fields))
