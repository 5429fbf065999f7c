"""What the report says in words: a verdict on the stated confidence, the sentences that explain it, and what confidence listens to.

The verdict follows a rule (`verdict_of`) with thresholds that the page prints. They are this project's choice; there are no established ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.metrics.probes import SWAPPED
from vlm_calibration.reporting.report.data import ORACLE, System
from vlm_calibration.reporting.report.table import RAW, TOLERANCE, Compared, Group, Match, Row

Verdict = Literal["yes", "partly", "no", "unknown"]
TRUSTED, ROUGH = (0.05, 0.70), (0.10, 0.60)
"""Largest ECE and smallest AUROC of a confidence that can be trusted, and of one that can be trusted in part."""
MIN_CHECKED = 100
"""Answers of the smallest group or band that can be checked."""
MIN_ANSWERS = 30
"""Smallest group of answers that the summary may name."""
MAX_PLACES = 3
"""Number of groups and bands that the verdict names; the tables have the rest."""
PROBES = {
    "image": "Without the image",
    "object": "Without the key object",
    "distractor": "Without another object",
    SWAPPED: "With the opposite answer",
}
"""What a probe does, in words."""


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
        verdict: whether the stated confidence can be trusted.
        sentence: the verdict as a sentence, with where it holds and where not.
        headline: one sentence on the most frequent band.
        sentences: the sentences below it.
    """

    verdict: Verdict
    sentence: str
    headline: str
    sentences: list[str]


def subject_of(systems: Sequence[System], name: str | None = None) -> System:
    """The system that a report describes: that of this name, by default the last one that is not the oracle."""
    named = [s for s in systems if s.name == name] or [s for s in systems if s.name != ORACLE]
    return (named or list(systems))[-1]


def summarize_system(system: System, compared: Compared) -> Summary:
    """Summarise one system and compare it with the first one."""
    stated = {
        row.system: row for row in compared.rows if (row.estimator, row.recalibration) == (VERBALIZED, RAW)
    }
    row, base = stated[system.name], next(iter(stated.values()))
    bands, groups = compared.bands[system.name], compared.groups[system.name]
    checks = checks_of(bands, groups)
    verdict = verdict_of(row, checks)
    none = "None of its{} answers states a confidence that could be parsed."
    headline, sentences = none.format(""), [none.format(f" {row.n:,}")]
    if bands:
        band = max(bands, key=lambda band: band.n)
        headline = f"When it says {band.name}, on average {band.match.says:.0f}%, it is right {band.match.right:.0f}% of the time."
        mean, gap, ece, unparsed = (
            row.metrics[name].value
            for name in ("mean_confidence", "overconfidence", "ece", "parse_failure_rate")
        )
        missing = f" {round(unparsed * row.n):,} of the answers state none that could be parsed."
        sentences = [
            f"Over {row.n:,} answers it says {mean:.0%} on average and is right {mean - gap:.0%} of the time; "
            f"stated confidence and accuracy differ by {100 * ece:.1f} points on average (ECE).{missing if unparsed else ''}"
        ]
    if base is not row:
        sentences.append(_compared_with(row, base))
    if worst := largest_error(groups):
        sentences.append(f"Its {worst}")
    return Summary(verdict, verdict_sentence(verdict, row, checks), headline, sentences)


def _compared_with(row: Row, base: Row) -> str:
    """How the error of a system's stated confidence differs from that of the first system."""
    was, now, p = base.metrics["ece"].value, row.metrics["ece"].value, row.p["ece"]
    change, chance = "not comparable", ""
    if was > 0 and not math.isnan(now):
        change = f"{abs(1 - now / was):.0%} {'smaller' if now < was else 'larger'}"
    if p is not None and not math.isnan(p):
        chance = f", which is {'more than chance' if p < 0.05 else 'within chance'} (p = {p:.3f})"
    says, right = base.metrics["mean_confidence"].value, base.metrics["accuracy"].value
    return (
        f"“{base.system}” says {'-' if math.isnan(says) else f'{says:.0%}'} on average, is right {right:.0%} of the time and is off by "
        f"{100 * was:.1f} points: the error is {change}{chance}."
    )


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


# --- The verdict ----------------------------------------------------------------------------------------------------


def checks_of(bands: Sequence[Group], groups: Sequence[Group]) -> Checks:
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
    if bands and all(agrees is False for agrees in bands):
        return "no"
    kept = [*_keeps(row), *bands, *(match.agrees for match in checks.groups.values())]
    if False in kept:
        return "partly"
    return "yes" if bands and None not in kept else "unknown"


def _keeps(row: Row) -> tuple[bool | None, bool | None]:
    """Whether ECE and AUROC keep the limits of `TRUSTED`; None where their intervals leave it open."""
    ece, auroc = row.metrics["ece"], row.metrics["auroc"]
    keeps_ece = True if ece.high <= TRUSTED[0] else False if ece.low > TRUSTED[0] else None
    if math.isnan(auroc.value) or auroc.low >= TRUSTED[1]:
        return keeps_ece, True
    return keeps_ece, False if auroc.high < TRUSTED[1] else None


def verdict_sentence(verdict: Verdict, row: Row, checks: Checks) -> str:
    """The verdict as one sentence: where stated confidence and accuracy agree, and with numbers where they do not."""
    ece, auroc = row.metrics["ece"], row.metrics["auroc"]
    keeps_ece, keeps_auroc = _keeps(row)
    holds, fails, unclear = (_places(checks, agrees) for agrees in (True, False, None))
    if row.metrics["parse_failure_rate"].value == 1:
        return f"No: none of its {row.n:,} answers states a confidence that could be parsed."
    if verdict == "yes":
        return (
            "Yes: its stated confidence can be trusted, in every group and every range of confidence with enough answers to tell "
            f"({len(checks.groups)} groups, {len(checks.bands)} ranges)."
        )
    if verdict == "unknown" and not checks.bands:
        return f"It cannot be told: none of its ranges of confidence has enough of the {row.n:,} answers for a check."
    if verdict == "unknown":
        between = f"off by {100 * ece.low:.1f} to {100 * ece.high:.1f} points on average (ECE)"
        doubts = [
            f"it may be {between}" if keeps_ece is None else "",
            f"its AUROC may be {auroc.low:.2f} to {auroc.high:.2f}" if keeps_auroc is None else "",
            f"it may be off by more than {TOLERANCE} points {unclear}" if unclear else "",
        ]
        return f"It cannot be told from {row.n:,} answers: {'; '.join(filter(None, doubts))}."
    limit = TRUSTED[0] if verdict == "partly" else ROUGH[0]
    reasons = [
        f"it is off by {100 * ece.value:.1f} points on average (ECE)" if ece.low > limit else "",
        f"it does not hold {fails}" if fails else "",
        f"it hardly tells right answers from wrong ones (AUROC {auroc.value:.2f})"
        if keeps_auroc is False
        else "",
    ]
    if verdict == "partly":
        but = f"not {fails}" if fails else "; ".join(filter(None, reasons))
        return f"Partly: its stated confidence can be trusted {holds or 'in part'}, but {but}."
    where = f"only {holds}" if holds else "nowhere for certain"
    return (
        f"No: its stated confidence cannot be trusted: {'; '.join(filter(None, reasons))}; it holds {where}."
    )


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
            parts.append(f"{start} {listed(names, joint)}")
    return " and ".join(parts)


def listed(names: Sequence[str], joint: str = "and") -> str:
    """Names as an enumeration: "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} {joint} {last}" if most else last


# --- What confidence listens to -------------------------------------------------------------------------------------


def probe_sentences(values: Mapping[str, float]) -> list[str]:
    """A sentence on each probe that applies to an answer of a system, from its metrics `probe_...`."""
    sentences = []
    for probe, start in PROBES.items():
        n = int(values.get(f"probe_{probe}_n", 0))
        if not n:
            continue
        change = values[f"probe_{probe}_change"]
        way, share = ("falls", "fell") if change <= 0 else ("rises", "rose")
        points = f"{abs(100 * change):.0f}"
        moves = f"{way} by {points} point{'' if points == '1' else 's'}"
        if points == "0":
            moves = "moves by less than a point" if change else "does not move"
        sentence = f"{start}, its confidence {moves} on average (it {way} in {values[f'probe_{probe}_{share}']:.0%} of {n:,} answers)."
        if probe == SWAPPED:
            both = values[f"probe_{probe}_sum"]
            sentence += f" The confidences in an answer and in its opposite add up to {both:.0%} on average; 100% would be consistent."
        sentences.append(sentence)
    return sentences
