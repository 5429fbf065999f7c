"""The demo over several seeds: `python -m tests.benchmarks.demo_seeds` prints what the README states.

Each seed has its own noise, order of data, adapter initialisation and test noise; the base model, its levels and the test
scenes are the same. Values are mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SYSTEMS = {
    "base": "base",
    "sft-linear": "SFT, linear levels",
    "sft": "SFT, anchored levels",
    "oracle": "level oracle",
}
PARTS = {
    "": "whole split",
    "/clean": "clean",
    "/noised": "region noise",
    "/shifted": "shifted",
    "/existence": "existence (yes/no)",
    "/position": "corner (short)",
}
METRICS = {"accuracy": "accuracy", "ece": "ECE", "brier": "Brier", "auroc": "AUROC"}


def start(*arguments: str, threads: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vlm_calibration.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"failed: {process.args}")


def into(folder: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(folder)]


def run_seed(seed: int, root: Path) -> dict[str, dict[str, float]]:
    """Train both adapters with this seed and evaluate; system -> metrics."""
    own = ["--seed_everything", str(seed), "--data.noise.seed", str(seed)]
    folders = {"sft": root / f"sft-{seed}", "sft-linear": root / f"sft-linear-{seed}"}
    fits = []
    for name, folder in folders.items():
        levels = ["--config", "configs/levels/linear.yaml"] if name == "sft-linear" else []
        fits.append(start("fit", "--config", "configs/sft.yaml", *levels, *own, *into(folder)))
    for fit in fits:  # side by side, one core each, as `make train-sft` does
        finish(fit)
    evaluated = root / f"eval-{seed}"
    adapters = json.dumps({name: str(folder / "adapter") for name, folder in folders.items()})
    finish(
        start(
            *("test", "--config", "configs/eval/demo.yaml", *own, *into(evaluated)),
            *("--model.init_args.adapters", adapters),
            threads=2,
        )
    )
    return {s: json.loads((evaluated / s / "metrics.json").read_text()) for s in SYSTEMS}


def spread(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.3f} ± {deviation:.3f}"


def markdown(runs: list[dict[str, dict[str, float]]]) -> str:
    lines = []
    for suffix, part in PARTS.items():
        n = runs[0]["base"][f"n{suffix}"]
        lines += [f"| {part} (n = {n}) | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
        for system, name in SYSTEMS.items():
            cells = [spread([run[system][f"{metric}{suffix}"] for run in runs]) for metric in METRICS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/demo"))
    args = parser.parse_args()
    print(markdown([run_seed(seed, args.out) for seed in args.seeds]))


if __name__ == "__main__":
    main()
