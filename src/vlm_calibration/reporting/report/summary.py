"""The summary at the top of the report: a verdict on the stated confidence, and the sentences that explain it.

The verdict follows a rule (`verdict_of`) with thresholds that the page prints. They are this project's choice; there are no established ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vlm_calibration.reporting.report.agreement import TOLERANCE, Band, Group, Match, told
from vlm_calibration.reporting.report.data import ORACLE, System
from vlm_calibration.reporting.report.table import Compared, Row

Verdict = Literal["yes", "partly", "no", "unknown"]
TRUSTED, ROUGH = (0.05, 0.70), (0.10, 0.60)
"""Largest ECE and smallest AUROC of a confidence that can be trusted, and of one that can be trusted in part."""
MIN_CHECKED = 100
"""Answers of the smallest group or band that can be checked."""
MIN_ANSWERS = 30
"""Smallest group of answers that the summary may name."""
MAX_PLACES = 3
"""Number of groups and bands that the verdict names; the tables have the rest."""


class Checks(NamedTuple):
    """The groups and bands that the verdict depends on, see `checks_of`.

    Attributes:
        bands: name of a band -> what it states and how often that is correct.
        groups: the same for groups of answers.
    """

    bands: Mapping[str, Match]
    groups: Mapping[str, Match]


class Summary(NamedTuple):
    """The summary of a report.

    Attributes:
        system: name of the system that it describes.
        verdict: whether its stated confidence can be trusted.
        sentence: the verdict as a sentence, with where it holds and where not.
        headline: one sentence on the most frequent band.
        sentences: the sentences below it.
        bands: bands of stated confidence, the highest first.
    """

    system: str
    verdict: Verdict
    sentence: str
    headline: str
    sentences: list[str]
    bands: list[Band]


def subject_of(systems: Sequence[System]) -> System:
    """The system that a report describes by default: the last one that is not the oracle."""
    return ([s for s in systems if s.name != ORACLE] or list(systems))[-1]


def summarize_system(system: System, compared: Compared) -> Summary:
    """Summarise one system and compare it with the first one."""
    stated = {row.system: row for row in compared.rows if row.is_stated}
    row, base = stated[system.name], next(iter(stated.values()))
    bands, groups = compared.bands[system.name], compared.groups[system.name]
    checks = checks_of(bands, groups)
    verdict = verdict_of(row, checks)
    sentences = [_overall(row)]
    if base is not row:
        sentences.append(_compared_with(row, base))
    if worst := largest_error(groups):
        sentences.append(f"Its {worst}")
    sentence = verdict_sentence(verdict, row, checks)
    return Summary(system.name, verdict, sentence, _headline(bands), sentences, list(bands))


def largest_error(groups: Sequence[Group]) -> str:
    """The weakest group, in words; empty without one."""
    if (worst := weakest_group(groups)) is None:
        return ""
    return (
        f"largest error is on “{worst.name}”: it says {worst.match.says:.0f}% and is right "
        f"{worst.match.right:.0f}% of the time ({worst.match.answers:,} answers)."
    )


def weakest_group(groups: Sequence[Group]) -> Group | None:
    """The group of at least `MIN_ANSWERS` answers whose stated confidence and accuracy differ most; None without one."""
    known = [group for group in groups if group.match.answers >= MIN_ANSWERS]
    return max(known, key=lambda group: abs(group.match.says - group.match.right), default=None)


def checks_of(bands: Sequence[Band], groups: Sequence[Group]) -> Checks:
    """The bands and groups of at least `MIN_CHECKED` answers, without those that have too few to tell.

    An interval wider than `TOLERANCE` would leave it open for most calibrated models.
    """

    def is_checked(match: Match) -> bool:
        is_narrow = match.high - match.low <= TOLERANCE
        return match.answers >= MIN_CHECKED and (is_narrow or match.agrees is not None)

    return Checks(
        *({part.name: part.match for part in parts if is_checked(part.match)} for parts in (bands, groups))
    )


def verdict_of(row: Row, checks: Checks) -> Verdict:
    """Judge a stated confidence.

    What counts are 95% intervals, so that chance decides nothing: a limit is kept if the whole interval is within it, and broken if all
    of the interval is beyond it. Checked are groups of answers (category, part of a category, answer type) and bands of stated
    confidence (`EDGES`), see `checks_of`; their limit is a difference of `TOLERANCE` points between stated confidence and accuracy.

    - "no": no answer states a confidence, every checked band breaks its limit, the ECE breaks 10% or the AUROC 0.60 (`ROUGH`)
    - "partly": else, a checked group or band breaks its limit, the ECE breaks 5% or the AUROC 0.70 (`TRUSTED`)
    - "yes": a band is checked, and all these limits are kept
    - "unknown": all else

    The AUROC is undefined if all answers are correct, and then there is nothing to rank.
    """
    ece, auroc = row.metrics["ece"], row.metrics["auroc"]
    bands = [match.agrees for match in checks.bands.values()]
    if row.metrics["parse_failure_rate"].value == 1 or ece.low > ROUGH[0] or auroc.high < ROUGH[1]:
        return "no"
    if bands and not any(agrees is not False for agrees in bands):
        return "no"
    kept = [*_keeps(row), *bands, *(match.agrees for match in checks.groups.values())]
    if False in kept:
        return "partly"
    return "yes" if bands and None not in kept else "unknown"


def _keeps(row: Row) -> tuple[bool | None, bool | None]:
    """Whether ECE and AUROC keep the limits of `TRUSTED`; None where their intervals leave it open."""
    ece, auroc = row.metrics["ece"], row.metrics["auroc"]
    return (
        told(ece.high <= TRUSTED[0], ece.low > TRUSTED[0]),
        told(math.isnan(auroc.value) or auroc.low >= TRUSTED[1], auroc.high < TRUSTED[1]),
    )


def verdict_sentence(verdict: Verdict, row: Row, checks: Checks) -> str:
    """The verdict as one sentence: where stated confidence and accuracy agree, and with numbers where they do not."""
    ece, auroc = row.metrics["ece"], row.metrics["auroc"]
    keeps_ece, keeps_auroc = _keeps(row)
    if row.metrics["parse_failure_rate"].value == 1:
        return f"No: none of its {row.n:,} answers states a confidence that could be parsed."
    if verdict == "unknown" and not checks.bands:
        return f"It cannot be told: none of its ranges of confidence has enough of the {row.n:,} answers for a check."
    if verdict == "unknown":
        between = f"it may be off by {100 * ece.low:.1f} to {100 * ece.high:.1f} points on average (ECE)"
        ranks = f"its AUROC may be {auroc.low:.2f} to {auroc.high:.2f}"
        places = _places(checks, None)
        unclear = [
            *([between] if keeps_ece is None else []),
            *([ranks] if keeps_auroc is None else []),
            *([f"it may be off by more than {TOLERANCE} points {places}"] if places else []),
        ]
        return f"It cannot be told from {row.n:,} answers: {'; '.join(unclear)}."
    if verdict == "yes":
        return (
            "Yes: its stated confidence can be trusted, in every group and every range of confidence with enough answers to tell "
            f"({len(checks.groups)} groups, {len(checks.bands)} ranges)."
        )
    holds, fails = _places(checks, True), _places(checks, False)
    hardly = f"it hardly tells right answers from wrong ones (AUROC {auroc.value:.2f})"
    ranking = hardly if keeps_auroc is False else ""
    limit = TRUSTED[0] if verdict == "partly" else ROUGH[0]
    apart = f"it is off by {100 * ece.value:.1f} points on average (ECE)" if ece.low > limit else ""
    if verdict == "partly":
        but = "; ".join(part for part in (fails and f"not {fails}", apart, ranking) if part)
        return f"Partly: its stated confidence can be trusted {holds or 'in part'}, but {but}."
    why = "; ".join(part for part in (apart, fails and f"it does not hold {fails}", ranking) if part)
    where = f"only {holds}" if holds else "nowhere for certain"
    return f"No: its stated confidence cannot be trusted: {why}; it holds {where}."


def _places(checks: Checks, agrees: bool | None) -> str:
    """The first checked groups and bands that agree, that do not, or that are unclear (None), in words; empty if there are none.

    Those that do not agree come with their numbers, coarse groups first, since they explain their parts.
    """
    places = [
        (start, name, match)
        for start, matches in (("on", checks.groups), ("where it says", checks.bands))
        for name, match in matches.items()
        if match.agrees is agrees
    ]
    if agrees is False:
        places.sort(key=lambda p: (p[0], p[1].count("/"), -abs(p[2].says - p[2].right)))
    parts = []
    for start, joint in (("on", "and"), ("where it says", "or")):
        names = [
            f"{name} ({match.numbers})" if agrees is False else name
            for kind, name, match in places[:MAX_PLACES]
            if kind == start
        ]
        if names:
            *most, last = names
            parts.append(f"{start} {', '.join(most)} {joint} {last}" if most else f"{start} {last}")
    return " and ".join(parts)


def _headline(bands: Sequence[Band]) -> str:
    if not bands:
        return "None of its answers states a confidence that could be parsed."
    band = max(bands, key=lambda band: band.match.answers)
    says, right = band.match.says, band.match.right
    return f"When it says {band.name}, on average {says:.0f}%, it is right {right:.0f}% of the time."


def _overall(row: Row) -> str:
    unparsed = row.metrics["parse_failure_rate"].value
    if unparsed == 1:
        return f"None of its {row.n:,} answers states a confidence that could be parsed."
    confidence, gap = row.metrics["mean_confidence"].value, row.metrics["overconfidence"].value
    missing = (
        f" {round(unparsed * row.n):,} of the answers state none that could be parsed." if unparsed else ""
    )
    return (
        f"Over {row.n:,} answers it says {_percent(confidence)} on average and is right {_percent(confidence - gap)} of the time; "
        f"stated confidence and accuracy differ by {100 * row.metrics['ece'].value:.1f} points on average (ECE).{missing}"
    )


def _compared_with(row: Row, base: Row) -> str:
    was, now, p = base.metrics["ece"].value, row.metrics["ece"].value, row.p["ece"]
    chance = "" if p is None or math.isnan(p) else f", {_chance(p)}"
    return (
        f"“{base.system}” says {_percent(base.metrics['mean_confidence'].value)} on average, is right "
        f"{_percent(base.metrics['accuracy'].value)} of the time and is off by {100 * was:.1f} points: the error is "
        f"{_change(was, now)}{chance}."
    )


def _chance(p: float) -> str:
    return f"which is {'more than chance' if p < 0.05 else 'within chance'} (p = {p:.3f})"


def _change(was: float, now: float) -> str:
    if math.isnan(was) or math.isnan(now) or was == 0:
        return "not comparable"
    return f"{_percent(abs(1 - now / was))} {'smaller' if now < was else 'larger'}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}%"
