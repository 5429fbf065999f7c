"""The machine and versions that a benchmark ran on, the peak memory of a process (Linux), and how results over seeds are written."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path


def setting(*packages: str) -> str:
    """Versions of the packages and the architecture: "numpy 2.3.1, torch 2.9.0, x86_64"."""
    return ", ".join([*(f"{name} {version(name)}" for name in packages), platform.machine()])


def processor() -> str:
    """The processor's name and the number of cores that this process may use: "AMD EPYC, 2 cores"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"


def reset_peak() -> None:
    """Reset the peak that `peak_bytes` returns."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak resident memory of this process since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def spread(values: list[float | None]) -> str:
    """Mean ± standard deviation of those that are defined; "-" without any."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.mean(numbers):.3f}"
    return f"{mean} ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else mean
