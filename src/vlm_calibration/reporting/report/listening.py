"""What confidences listen to, in words: how far they fall without the image, an object or a distractor, and with the opposite answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlm_calibration.estimators.predictions import EstimatedPrediction, probes_of
from vlm_calibration.metrics.bootstrap import Interval
from vlm_calibration.metrics.probes import SWAPPED, count_probes, probe_difference, probe_values
from vlm_calibration.records import ORIGINAL
from vlm_calibration.reporting.report.bootstrap import ImageBootstrap

WITHOUT = {
    "image": "without the image",
    "object": "without the key object",
    "distractor": "without another object",
    SWAPPED: "with the opposite answer",
}
"""What a probe does, in words."""


class ProbeEffect(NamedTuple):
    """The effect of one probe on the confidence of one system.

    Attributes:
        change: the mean change of the confidence in [-1, 1], probed minus original.
        fell: share of answers whose confidence fell; NaN without answers, as the next two.
        stayed: share of answers whose confidence stayed the same.
        rose: share of answers whose confidence rose.
        n: number of answers that the probe applies to.
        sum: the mean sum of both confidences, in [0, 2], for the opposite answer; else None.
    """

    change: Interval
    fell: float
    stayed: float
    rose: float
    n: int
    sum: Interval | None


def probe_effects(
    predictions: Sequence[EstimatedPrediction], bootstrap: ImageBootstrap
) -> dict[str, ProbeEffect]:
    """The effect of each probe that all answers of a system have; empty if it was not probed."""
    probes = probes_of(predictions)
    counts = count_probes((p.probes for p in predictions), probes, [[0]] * len(predictions), 1)
    values = probe_values(counts[0], probes)
    effects = {}
    for probe in probes:
        changes = [probe_difference(p.probes, probe) for p in predictions]
        sums = [
            None if change is None else change + 2 * (p.probes[ORIGINAL] or 0.0)
            for p, change in zip(predictions, changes, strict=True)
        ]
        effects[probe] = ProbeEffect(
            bootstrap.mean(changes),
            fell=values[f"probe_{probe}_fell"],
            stayed=values[f"probe_{probe}_stayed"],
            rose=values[f"probe_{probe}_rose"],
            n=int(values[f"probe_{probe}_n"]),
            sum=bootstrap.mean(sums) if probe == SWAPPED else None,
        )
    return effects


def probe_sentences(effects: Mapping[str, ProbeEffect]) -> list[str]:
    """A sentence on each probe of one system that applies to an answer."""
    sentences = []
    for probe, words in WITHOUT.items():
        effect = effects.get(probe)
        if effect is None or not effect.n:
            continue
        start = words[0].upper() + words[1:]
        sentence = f"{start}, its confidence {_moves(effect.change.value)} on average ({_share_of(effect)})."
        if effect.sum is not None:
            sentence += (
                f" The confidences in an answer and in its opposite add up to {100 * effect.sum.value:.0f}% on average; "
                "100% would be consistent."
            )
        sentences.append(sentence)
    return sentences


def _moves(change: float) -> str:
    """A mean change in words: "falls by 31 points"."""
    points = f"{abs(100 * change):.0f}"
    if points == "0":
        return "moves by less than a point" if change else "does not move"
    return f"{'falls' if change < 0 else 'rises'} by {points} point{'' if points == '1' else 's'}"


def _share_of(effect: ProbeEffect) -> str:
    """In which share of the answers the confidence moves the way that it moves on average."""
    way, share = ("falls", effect.fell) if effect.change.value <= 0 else ("rises", effect.rose)
    return f"it {way} in {_percent(share)} of {effect.n:,} answers"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
