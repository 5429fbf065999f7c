"""Executes the notebooks, for their tests and for the outputs that are committed:

    python -m tests.notebooks.execution [NAME.ipynb ...]
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
QUIET = {
    # Without ipywidgets there are no bars, and so nothing that a web page cannot show.
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
"""Environment in which a notebook prints the same on every machine."""


def execute(
    name: str, folder: Path = NOTEBOOKS, environment: Mapping[str, str] | None = None, timeout: int | None = None
) -> Any:
    """Run a notebook in a new kernel.

    Args:
        name: its file in `notebooks/`.
        folder: where the kernel starts.
        environment: further variables of the kernel, e.g. `SCENES` and `RUNS_DIR`.
        timeout: limit of a cell in seconds.

    Returns:
        The notebook with outputs, and with nothing that depends on who ran it when: no times, no version of Python, and none of
        standard error, which has progress and the notices of libraries about this machine.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    metadata = notebook.metadata.copy()
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, **QUIET, **(environment or {})})
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [cleaned(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def cleaned(output: Any) -> Any:
    """An output without the path of the checkout, and the escape codes that rich puts into the plain text of its tables."""
    if "text" in output:
        output.text = output.text.replace(f"{NOTEBOOKS.parent}/", "")
    if "text/plain" in output.get("data", {}):
        output.data["text/plain"] = re.sub(r"\x1b\[[\d;]*m", "", output.data["text/plain"])
    return output


if __name__ == "__main__":
    for chosen in sys.argv[1:] or sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")):
        began = time.monotonic()
        executed = execute(chosen)
        nbformat.write(executed, NOTEBOOKS / chosen)
        print(f"{chosen}: {time.monotonic() - began:.0f} s, {(NOTEBOOKS / chosen).stat().st_size} bytes")
