"""How soon `vlm-calibration monitor` notices a drift of the demo's questions: `python -m tests.performance.drift` prints a Markdown table.

An adapter answers scenes that nothing else uses, once. Each stream then draws a reference and new answers from these without
replacement, whole scenes of three questions, either all answers in random order or scene by scene. There are two references, of the
size of the demo's calibration set: its mix of easy, hard and perturbed scenes, and easy scenes alone. Streams of the reference's own
kind give false alarms, which should be at most 5% in random order; answers about one scene are not independent, so that in the order
of scenes nothing is guaranteed. For the other streams the table has how many alarm before their scenes are used up, and after how many
answers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tests.performance.demo_seeds import finish, into, start

from vlm_calibration.demo.shifts import SHIFTS
from vlm_calibration.estimators.predictions import PREDICTIONS, read_predictions
from vlm_calibration.metrics.drift import detect_drift

ERROR = 0.05
REFERENCE = 183
"""Scenes of the demo's calibration set."""
PARTS = {
    "clean": {"scenes": 250, "first": 30000},
    "natural": {"scenes": 126, "first": 31000, "hard": 1.0},
    "perturbed": {"scenes": 150, "first": 32000, "hard": 0.3},
    "shifted": {"scenes": 400, "first": 33000, "shifted": True},
    "foreign": {"scenes": 80, "first": 35000, "hand": "line"},
}
"""Part of the test set of `configs/eval/demo.yaml` -> scenes of the calibration split in its place."""
EASY_OF_MIX, HARD_OF_MIX = 150, 66
"""Easy and hard scenes in the mix, in proportion to `data.calibration` of that file. The others are for streams against the mix."""
SOURCE = "vlm_calibration.demo.source.DemoSource"

Pool = np.ndarray
"""float64 [scenes, 3], confidences, NaN if unparsed."""


def answer(adapter: Path, out: Path) -> Path:
    """Answer the scenes, unless it is done; returns the file of predictions."""
    parts = {
        name: {"source": {"class_path": SOURCE, "init_args": {"split": "calibration", **settings}}}
        for name, settings in PARTS.items()
    }
    parts["perturbed"]["noise"] = "drawn"  # type: ignore[assignment]
    scenes = out / "scenes.yaml"
    out.mkdir(parents=True, exist_ok=True)
    scenes.write_text(json.dumps({"data": {"test": parts, "calibration": None}}), encoding="utf-8")
    settings = {
        "adapters": json.dumps({"adapter": str(adapter)}),
        "with_base": "false",
    }
    arguments = [a for name, value in settings.items() for a in (f"--model.init_args.{name}", value)]
    config = ["--config", "configs/eval/demo.yaml", "--config", str(scenes)]
    finish(start("test", *config, *into(out / "eval"), *arguments, "--resume", threads=2))
    return out / "eval" / "adapter" / PREDICTIONS


def pools_of(path: Path) -> dict[str, Pool]:
    """Part or kind of shift -> confidences of its scenes."""
    scenes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for p in read_predictions(path):
        part, *others = (p.category or "").split("/")
        confidence = math.nan if p.confidence is None else p.confidence
        name = next((other for other in others if other in SHIFTS), part)
        scenes[name][p.image or ""].append(confidence)
    return {name: np.array(list(by_scene.values())) for name, by_scene in scenes.items()}


def delays(reference: Pool, new: Pool | None, streams: int, *, by_scene: bool) -> list[float]:
    """The answer at which each stream gives an alarm, infinite if it gives none.

    Args:
        reference: scenes to draw the reference from.
        new: the scenes of the stream, in random order; None: those that the reference leaves.
        streams: number of streams.
        by_scene: keep the answers about a scene together.
    """
    alarms = []
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(reference))
        drawn = rng.permutation(new) if new is not None else reference[order[REFERENCE:]]
        stream = drawn.reshape(-1)
        stream = stream if by_scene else rng.permutation(stream)
        alarm = detect_drift(reference[order[:REFERENCE]].reshape(-1), stream, ERROR, seed).alarm
        alarms.append(math.inf if alarm is None else float(alarm))
    return alarms


def row(name: str, pool: Pool, measured: list[list[float]]) -> str:
    """Mean confidence of a kind of stream, and for each reference: alarms, median and 90% quantile of the answers before them."""
    cells = [name, f"{np.nanmean(pool):.3f}", f"{np.isnan(pool).mean():.1%}"]
    for alarms in measured:
        median, late = (np.quantile(alarms, q, method="higher") for q in (0.5, 0.9))
        cells += [
            f"{np.isfinite(alarms).mean():.1%}",
            *(f"{d:.0f}" if d < math.inf else "-" for d in (median, late)),
        ]
    return f"| {' | '.join(cells)} |"


def table(pools: Mapping[str, Pool], streams: int) -> list[str]:
    easy, hard = pools["clean"], pools["natural"]
    mix = np.concatenate([easy[:EASY_OF_MIX], hard[:HARD_OF_MIX], pools["perturbed"]])
    own = {"the mix": mix, "easy scenes": easy}
    new = {
        "easy scenes": easy[EASY_OF_MIX:],
        "hard scenes": hard[HARD_OF_MIX:],
        **{shift.replace("_", " "): pools[shift] for shift in SHIFTS},
        "line drawings": pools["foreign"],
    }
    heads = [f"{head}, against {name}" for name in own for head in ("alarms", "median", "90% quantile")]
    lines = [
        f"| stream | mean confidence | unparsed | {' | '.join(heads)} |",
        "|---|" + "---:|" * (2 + len(heads)),
    ]
    for by_scene in (False, True):
        how = "scene by scene" if by_scene else "random order"
        fresh = [delays(pool, None, streams, by_scene=by_scene) for pool in own.values()]
        lines.append(row(f"of the reference's kind, {how}", mix, fresh))
    for name, pool in new.items():
        # Easy scenes against easy scenes are the first row.
        measured = [
            delays(reference, None if name == kind else pool, streams, by_scene=False)
            for kind, reference in own.items()
        ]
        lines.append(row(name, pool, measured))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("runs/dpo/adapter"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/drift"))
    parser.add_argument("--streams", type=int, default=200)
    args = parser.parse_args()
    if not args.adapter.is_dir():
        parser.error(f"--adapter {args.adapter}: no such folder; train one with `make demo`")
    pools = pools_of(answer(args.adapter, args.out))
    print("\n".join(table(pools, args.streams)))


if __name__ == "__main__":
    main()
