"""`vlm-calibration data convert FORMAT`: published questions about images, converted to a file of queries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vlm_calibration.arguments import Subcommands
from vlm_calibration.data.convert.gqa import gqa
from vlm_calibration.data.convert.hf import hf, rlaif_v
from vlm_calibration.data.convert.reading import Output, Source
from vlm_calibration.data.convert.sharegpt import sharegpt
from vlm_calibration.data.convert.vqav2 import vqav2


def _command(convert: Callable[..., Source]) -> Callable[..., None]:
    """The command of a format: the function's own parameters, and those of the output."""

    def command(*, output: Output, **settings: Any) -> None:
        # Imports OpenCV, which the help does not need.
        from vlm_calibration.data.convert.writing import QueryWriter

        writer = QueryWriter(output)
        writer.write(convert(**settings))
        kinds = ", ".join(f"{count} {kind}" for kind, count in writer.answer_types.most_common())
        print(f"{output.out}: {writer.queries} queries about {len(writer.image_names)} images: {kinds}")
        if writer.skipped:
            print(f"left out {sum(count for count, _ in writer.skipped.values())} bad records:")
        for count, first in sorted(writer.skipped.values(), reverse=True):
            print(f"  {count} such as {first}")
        root = "" if writer.root == output.out.parent else f" --root {writer.root}"
        if root:
            advice = f"set `root: {writer.root}` in every source that reads them"
            print(f"image paths are relative to {writer.root}: {advice}")
        print(f"next: vlm-calibration data split {output.out}{root}")
        if missing := writer.queries - writer.regions:
            print(f"{missing} queries have no regions; if they ask about objects, find them after the split:")
            command = "vlm-calibration predict --config regions --config data/jsonl"
            print(f"  {command} --data-root {output.out.parent}")

    own = inspect.signature(convert, eval_str=True).parameters.values()
    shared = inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, annotation=Output)
    command.__signature__ = inspect.Signature([*own, shared])  # type: ignore[attr-defined]
    command.__doc__ = convert.__doc__
    return command


FORMATS: tuple[Any, ...] = (sharegpt, hf, vqav2, gqa, rlaif_v)
CONVERT = Subcommands(
    "Convert published questions about images to a file of queries, as `data split` and all stages read it.",
    {convert.__name__: _command(convert) for convert in FORMATS},
)
