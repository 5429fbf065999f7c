"""A calibration of one's own, over several seeds: `python -m tests.performance.own_data my_data --model MODEL --out runs/own`.

`my_data` holds `queries.jsonl`, which is split, or the four files of `data/jsonl`; MODEL is a preset of `configs/model` or a file. Further
arguments are those of `vlm-calibration calibrate`. Levels are measured once, with the first seed. The tables show, as mean ± standard
deviation over the seeds, what the reports (`report.csv`) say: all answers, the groups of `category`, and what confidence listens to.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tests.performance.easy_vqa import command
from tests.performance.machine import processor, spread

from vlm_calibration.files import read_json

CONFIDENCES = {
    ("base", "verbalized", "raw"): "base, as stated",
    ("base", "verbalized", "platt"): "base, as stated, Platt",
    ("base", "likelihood", "platt"): "base, likelihood, Platt",
    ("sft", "verbalized", "raw"): "stage 1, as stated",
    ("dpo", "verbalized", "raw"): "**stage 2, as stated**",
    ("dpo", "expected", "raw"): "stage 2, expected",
    ("dpo", "teacher", "raw"): "stage 2, its teacher",
}
METRICS = {
    "mean_confidence": "mean confidence",
    "accuracy": "accuracy",
    "ece": "ECE",
    "brier": "Brier",
    "auroc": "AUROC",
}
PROBES = ("image", "object", "answer")


def calibrate(data: Path, model: str, out: Path, seeds: Sequence[int], further: Sequence[str]) -> None:
    """Calibrate with each seed into `out`/SEED; what has finished is not repeated."""
    if not (data / "train.jsonl").is_file():
        command("data", "split", str(data / "queries.jsonl"))
    for seed in seeds:
        runs, first = out / str(seed), out / str(seeds[0])
        stages: tuple[str, ...] = ()
        if seed != seeds[0]:
            stages = ("sft", "dpo", "evaluate", "report")
            runs.mkdir(parents=True, exist_ok=True)
            for name in ("levels.json", "likelihoods.parquet"):
                shutil.copy(first / name, runs / name)
        seeded = [
            f"--{stage}.{key}={seed}"
            for stage in ("sft", "dpo", "evaluate")
            for key in ("seed_everything", "data.noise.seed")
        ]
        shared = ("--model", model, "--data", "jsonl", "--data-root", str(data), "--runs", str(runs))
        command("calibrate", *stages, *shared, *seeded, *further)


def rows_of(reports: Sequence[pd.DataFrame], **chosen: str) -> list[str]:
    """The cells of one row of the reports, over the seeds; empty if none has it."""
    found = [report.loc[(report[list(chosen)] == pd.Series(chosen)).all(axis=1)] for report in reports]
    if any(rows.empty for rows in found):
        return []
    rows = [row.astype(object).where(row.notna(), None).iloc[0] for row in found]  # None if undefined
    return [spread([row[name] for row in rows]) for name in METRICS]


def tables(out: Path, seeds: Sequence[int]) -> str:
    reports = [pd.read_csv(out / str(seed) / "eval/report.csv").fillna({"group": ""}) for seed in seeds]
    lines = [f"{len(seeds)} seeds on {processor()}; {reports[0].iloc[0]['n']} test answers each", ""]
    lines += [f"| all answers | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
    for (system, estimator, method), title in CONFIDENCES.items():
        about = {"system": system, "estimator": estimator, "recalibration": method, "kind": "all"}
        if cells := rows_of(reports, **about):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    groups = reports[0].query("kind == 'group' and system == 'base'").group
    lines += ["", "| group, as stated | system | ECE | AUROC | accuracy |", "|---|---|---|---|---|"]
    for group in groups:
        for system in ("base", "sft", "dpo"):
            _, accuracy, ece, _, auroc = rows_of(reports, system=system, kind="group", group=group)
            lines.append(f"| {group} | {system} | {ece} | {auroc} | {accuracy} |")
    lines += [
        "",
        "| change of the stated confidence | without the image | without the object | answer swapped |",
        "|---|---|---|---|",
    ]
    for system in ("base", "sft", "dpo"):
        metrics = [read_json(out / str(seed) / "eval" / system / "metrics.json") for seed in seeds]
        cells_of = [spread([m.get(f"probe_{probe}_change") for m in metrics]) for probe in PROBES]
        lines.append(f"| {system} | {' | '.join(cells_of)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, further = parser.parse_known_args(arguments)
    calibrate(args.data, args.model, args.out, args.seeds, further)
    print(tables(args.out, args.seeds))


if __name__ == "__main__":
    main()
