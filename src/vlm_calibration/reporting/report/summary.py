"""The summary at the top of the report: a verdict on the stated confidence, and the sentences that explain it.

The verdict follows a rule (`verdict_of`) with thresholds that the page prints. They are this project's choice; there are no established ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vlm_calibration.reporting.report.agreement import Band, Group, Match, bands_of, groups_of_system
from vlm_calibration.reporting.report.data import ORACLE, System
from vlm_calibration.reporting.report.table import Row

Verdict = Literal["yes", "partly", "no", "unknown"]
TRUSTED, ROUGH = (0.05, 0.70), (0.10, 0.60)
"""Largest ECE and smallest AUROC of a confidence that can be trusted, and of one that can be trusted in part."""
MIN_CHECKED = 100
"""Answers of the smallest group or band on which the verdict depends."""
MIN_ANSWERS = 30
"""Smallest group of answers that the summary may name."""
MAX_PLACES = 3
"""Number of groups, and of bands, that the verdict names."""


class Checks(NamedTuple):
    """The groups and bands of at least `MIN_CHECKED` answers.

    Attributes:
        bands: name of a band -> what it states and how often that is correct.
        groups: the same for groups of answers.
    """

    bands: Mapping[str, Match]
    groups: Mapping[str, Match]

    @property
    def all_agree(self) -> bool:
        return all(match.agrees for match in (*self.bands.values(), *self.groups.values()))


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


def summarize_system(system: System, rows: Sequence[Row]) -> Summary:
    """Summarise one system and compare it with the first one."""
    stated = {row.system: row for row in rows if row.is_stated}
    row, base = stated[system.name], next(iter(stated.values()))
    bands, groups = bands_of(system.predictions), groups_of_system(system)
    checks = checks_of(bands, groups)
    verdict = verdict_of(row, checks)
    sentences = [_overall(row)]
    if base is not row:
        sentences.append(_compared_with(row, base))
    if worst := largest_error(groups):
        sentences.append(f"Its {worst}")
    sentence = verdict_sentence(verdict, row, checks)
    return Summary(system.name, verdict, sentence, _headline(bands), sentences, bands)


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
    """The bands and groups that are large enough to be checked."""
    return Checks(
        *(
            {part.name: part.match for part in parts if part.match.answers >= MIN_CHECKED}
            for parts in (bands, groups)
        )
    )


def verdict_of(row: Row, checks: Checks) -> Verdict:
    """Judge a stated confidence.

    A group of answers (category, part of a category, answer type) or a band of stated confidence (`EDGES`) is checked if it has
    at least `MIN_CHECKED` answers whose confidence was parsed. It agrees if its mean stated confidence and its accuracy differ
    by at most `TOLERANCE` points, or the 95% Wilson interval of the accuracy contains the stated confidence (`Match.agrees`).
    The interval takes answers as independent.

    - "unknown": no band is large enough to be checked
    - "yes": every checked group and band agrees, the ECE is at most 5% and the AUROC at least 0.70 (`TRUSTED`)
    - "no": no answer states a confidence, no checked band agrees, the ECE is above 10% or the AUROC below 0.60 (`ROUGH`)
    - "partly": all else

    The AUROC is undefined if all answers are correct, and then there is nothing to rank.
    """
    if row.metrics["parse_failure_rate"].value == 1:
        return "no"
    if not checks.bands:
        return "unknown"
    if checks.all_agree and _within(row, TRUSTED):
        return "yes"
    some_agree = any(match.agrees for match in checks.bands.values())
    return "partly" if some_agree and _within(row, ROUGH) else "no"


def _within(row: Row, limits: tuple[float, float]) -> bool:
    ece, auroc = row.metrics["ece"].value, row.metrics["auroc"].value
    return ece <= limits[0] and (math.isnan(auroc) or auroc >= limits[1])


def verdict_sentence(verdict: Verdict, row: Row, checks: Checks) -> str:
    """The verdict as one sentence: where stated confidence and accuracy agree, and with numbers where they do not."""
    ece, auroc = row.metrics["ece"].value, row.metrics["auroc"].value
    if row.metrics["parse_failure_rate"].value == 1:
        return f"No: none of its {row.n:,} answers states a confidence that could be parsed."
    if verdict == "unknown":
        return f"It cannot be told: none of its ranges of confidence has the {MIN_CHECKED} answers that a check needs."
    if verdict == "yes":
        return (
            "Yes: its stated confidence can be trusted, in every group and every range of confidence with at least "
            f"{MIN_CHECKED} answers ({len(checks.groups)} groups, {len(checks.bands)} ranges)."
        )
    holds, fails = _places(checks, True), _places(checks, False)
    ranking = (
        ""
        if math.isnan(auroc) or auroc >= TRUSTED[1]
        else (f"it hardly tells right answers from wrong ones (AUROC {auroc:.2f})")
    )
    limit = TRUSTED[0] if verdict == "partly" else ROUGH[0]
    apart = f"it is off by {100 * ece:.1f} points on average (ECE)" if ece > limit else ""
    if verdict == "partly":
        but = "; ".join(part for part in (fails and f"not {fails}", apart, ranking) if part)
        return f"Partly: its stated confidence can be trusted {holds}, but {but}."
    why = "; ".join(part for part in (apart, fails and f"it does not hold {fails}", ranking) if part)
    return f"No: its stated confidence cannot be trusted: {why}; it holds {f'only {holds}' if holds else 'nowhere'}."


def _places(checks: Checks, agrees: bool) -> str:
    """The checked groups and bands that agree, or those that do not with their numbers, in words; empty if there are none."""
    parts = []
    for start, joint, unit, matches in (
        ("on", "and", "groups", checks.groups),
        ("where it says", "or", "ranges", checks.bands),
    ):
        chosen = [(name, match) for name, match in matches.items() if match.agrees == agrees]
        if not agrees:
            # Coarse groups first, since they explain their parts; among these the farthest apart.
            chosen.sort(key=lambda item: (item[0].count("/"), -abs(item[1].says - item[1].right)))
        names = [name if agrees else f"{name} ({match.numbers})" for name, match in chosen[:MAX_PLACES]]
        if more := len(chosen) - len(names):
            names.append(f"{more} more {unit if more > 1 else unit[:-1]}")
        if names:
            parts.append(f"{start} {_listed(names, joint)}")
    return " and ".join(parts)


def _listed(names: Sequence[str], joint: str) -> str:
    *most, last = names
    return f"{', '.join(most)} {joint} {last}" if most else last


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
