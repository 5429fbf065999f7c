"""Compare calibration metrics of many predictions with torchmetrics and netcal: time, memory and bytes to exchange.

Run as `python -m tests.performance.metrics [--predictions 10000000]`; prints one Markdown table. Every row is a
separate process on one thread. All get the same predictions (stated percentages and correctness, float32 and
bool) in batches; netcal takes them at once. Memory is the peak above that of the predictions.
"""

import argparse
import json
import subprocess
import sys
import time

from tests.performance.machine import peak_bytes, reset_peak

BATCH = 100_000
HEADER = (
    "what",
    "predictions",
    "update (s)",
    "compute (s)",
    "total (s)",
    "relative",
    "peak memory (MiB)",
    "to exchange (bytes)",
    "ECE",
    "AUROC",
)


def ours(metrics):
    """A run of our collection with these metrics."""

    def run(confidence, correct):
        from vlm_calibration.metrics import CalibrationMetrics

        collection = CalibrationMetrics(metrics=metrics)
        update = feed(collection.update, confidence, correct)
        compute, values = timed(collection.compute)
        return update, compute, state_bytes(collection.values()), values["ece"], values["auroc"]

    return run


def torchmetrics_of(thresholds):
    """A run of torchmetrics' calibration error and AUROC, exact or at fixed thresholds."""

    def run(confidence, correct):
        from torchmetrics.classification import BinaryAUROC, BinaryCalibrationError

        members = [BinaryCalibrationError(n_bins=10), BinaryAUROC(thresholds=thresholds)]
        update = feed(lambda c, y: [member.update(c, y.int()) for member in members], confidence, correct)
        compute, values = timed(lambda: [member.compute() for member in members])
        return update, compute, state_bytes(members), *values

    return run


def netcal(confidence, correct):
    """A run of netcal's ECE, which supports neither batches nor processes."""
    from netcal.metrics import ECE

    compute, value = timed(lambda: ECE(10).measure(confidence.numpy(), correct.int().numpy()))
    return 0.0, compute, None, value, float("nan")


def all_reported():
    """The names that `metrics.json` holds."""
    from vlm_calibration.metrics.functional import REPORTED

    return REPORTED


CANDIDATES = {
    "ours, ECE and AUROC": lambda: ours(("ece", "auroc")),
    "ours, all 15 metrics": lambda: ours(all_reported()),
    "torchmetrics BinaryCalibrationError + BinaryAUROC": lambda: torchmetrics_of(None),
    "torchmetrics, AUROC at 101 thresholds": lambda: torchmetrics_of(101),
    "netcal ECE": lambda: netcal,
}


def timed(call):
    """Seconds and result of a call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def feed(update, confidence, correct):
    """Seconds to update with all predictions, batch by batch."""
    start = time.perf_counter()
    for i in range(0, len(confidence), BATCH):
        update(confidence[i : i + BATCH], correct[i : i + BATCH])
    return time.perf_counter() - start


def state_bytes(members):
    """Bytes of state that a process sends to the others to compute metrics."""
    total = 0
    for member in members:
        for state in member.metric_state.values():
            total += sum(
                t.numel() * t.element_size() for t in (state if isinstance(state, list) else [state])
            )
    return total


def measure(name, n):
    """Measure one row in this process: warm up on 1,000 predictions, then run on `n`."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(0, 101, (n,), generator=generator) / 100
    correct = torch.rand(n, generator=generator) < 0.2 + 0.7 * confidence
    run = CANDIDATES[name]()
    run(confidence[:1000], correct[:1000])
    reset_peak()
    before = peak_bytes()
    update, compute, sent, ece, auroc = run(confidence, correct)
    memory = peak_bytes() - before
    return {
        "update": update,
        "compute": compute,
        "memory": memory,
        "sent": sent,
        "ece": float(ece),
        "auroc": float(auroc),
    }


def row(name, n, result, reference):
    """One row of the table."""
    total = result["update"] + result["compute"]
    sent = "-" if result["sent"] is None else f"{result['sent']:,}"
    auroc = "-" if result["auroc"] != result["auroc"] else f"{result['auroc']:.4f}"
    cells = (
        name,
        f"{n:,}",
        f"{result['update']:.3f}",
        f"{result['compute']:.3f}",
        f"{total:.3f}",
        f"{total / reference:.1f}x" if reference else "",
        f"{result['memory'] / 2**20:,.1f}",
        sent,
        f"{result['ece']:.4f}",
        auroc,
    )
    return f"| {' | '.join(cells)} |"


def child(name, n):
    """`measure` in a separate process."""
    command = [
        sys.executable,
        "-m",
        "tests.performance.metrics",
        "--candidate",
        name,
        "--predictions",
        str(n),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    """Print the table, or with `--candidate` the numbers of one row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--predictions", type=int, default=10_000_000)
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.candidate:
        print(json.dumps(measure(arguments.candidate, arguments.predictions)))
        return
    n = arguments.predictions
    results = {name: child(name, n) for name in CANDIDATES}
    all_ours = results["ours, all 15 metrics"]
    reference = all_ours["update"] + all_ours["compute"]
    print(f"| {' | '.join(HEADER)} |")
    print(f"|{'---|' * len(HEADER)}")
    for name, result in results.items():
        print(row(name, n, result, reference))
    for smaller in (n // 10, n // 100):
        print(row("ours, all 15 metrics", smaller, child("ours, all 15 metrics", smaller), None))


if __name__ == "__main__":
    main()
