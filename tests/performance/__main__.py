"""Run the benchmarks one after another and write their tables to one Markdown page: `make bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tests.performance.machine import processor, setting

from vlm_calibration.files import write_text

# Name -> title of its section. Benchmarks that need the whole machine come first, the longest one last.
BENCHMARKS = {
    "perturbation": "Perturbation of a region, by kind",
    "intervals": "Coverage of 95% intervals",
    "data_path": "A query on its way to the model",
    "startup": "Start-up time of help pages and of mistakes",
    "streaming": "A million records in the data module",
    "phrases": "Key-object phrases",
    "serving": "Answers a second, in process and from servers (vLLM needs tests/serving/setup)",
    "long_rows": "Long packed rows, dense masks and block masks",
    "preference": "Training steps, against TRL's",
    "thresholds": "Thresholds: broken promises, and power beside MAPIE's",
    "drift": "Drift: false alarms, and the demo's questions (needs an evaluation of the demo)",
    "ceiling": "What hidden states say of the demo's answers",
    "demo_seeds": "The method on the demo, three seeds (about two hours)",
}
PACKAGES = ("vlm-calibration", "torch", "transformers", "peft", "lightning", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/benchmarks.md"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    args = parser.parse_args()
    page = [f"# Benchmarks\n\n{processor()}; {setting(*PACKAGES)}; {time.strftime('%Y-%m-%d')}\n"]
    failed = []
    for name in args.only:
        print(f"running {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"tests.performance.{name}"]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        failed += [name] if ran.returncode else []
        status = f"\n\nEnded with status {ran.returncode}." if ran.returncode else ""
        page.append(
            f"## {BENCHMARKS[name]}\n\n`python -m tests.performance.{name}`\n\n{ran.stdout.strip()}{status}\n"
        )
    text = "\n".join(page)
    write_text(args.out, text)
    print(text)
    print(f"wrote {args.out}", file=sys.stderr)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
