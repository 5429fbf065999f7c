"""How likely the base model holds its own answer to each untouched image: the file that `levels fit` writes for anchored levels.

A Parquet file with the columns `id`, `likelihood` and `content`, a digest of the question and the image; its metadata names the model and the
prompt. pyarrow is imported where it is used, since it is slow to import.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_calibration.files import replacing

FORMAT = "vlm_calibration.likelihoods/2"
COMPARED = ("weights", "prompt", "max_pixels")
"""Keys of the provenance that must be those of the level table."""


class Measured(NamedTuple):
    """How likely the base model holds its own answer to a query.

    Attributes:
        likelihood: in [0, 1], in single precision.
        content: digest of the question and the image that it was measured on, in [0, 2^64) (`QuerySource.content_digest`).
    """

    likelihood: float
    content: int


def write_likelihoods(path: Path, likelihoods: Mapping[str, Measured], provenance: Mapping[str, Any]) -> None:
    """Write likelihoods, atomically.

    Args:
        path: the file.
        likelihoods: query id -> what was measured.
        provenance: that of the level table measured in the same run.

    Raises:
        DataError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "id": pa.array(list(likelihoods), pa.string()),
            "likelihood": pa.array([m.likelihood for m in likelihoods.values()], pa.float32()),
            "content": pa.array([m.content for m in likelihoods.values()], pa.uint64()),
        },
        metadata={"format": FORMAT, "provenance": json.dumps({key: provenance[key] for key in COMPARED})},
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_likelihoods(path: Path, provenance: Mapping[str, Any], table: str) -> dict[str, Measured]:
    """Query id -> what was measured.

    Args:
        path: a file of `write_likelihoods`.
        provenance: that of a level table, which must have been measured with the same model and prompt.
        table: name of the table, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of likelihoods, or was measured with another model or prompt.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"no likelihoods at {path}; write them with `vlm-calibration levels fit`")
    try:
        content = pq.read_table(path)
        metadata = content.schema.metadata or {}
        if metadata.get(b"format") != FORMAT.encode():
            raise ValueError(
                f"expected the format {FORMAT!r}, found {metadata.get(b'format')!r}: measure it again with `vlm-calibration levels fit`"
            )
        measured = dict(json.loads(metadata[b"provenance"]))
        ids, contents = (content[name].to_pylist() for name in ("id", "content"))
        values = np.asarray(content["likelihood"], dtype=np.float64)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a file of likelihoods: {reason}") from error
    differing = [key for key in COMPARED if measured.get(key) != provenance.get(key)]
    if differing:
        raise ValueError(
            f"{path} and {table} were measured with another {', '.join(differing)}: write both with `vlm-calibration levels fit`"
        )
    if len(values) and not (values.min() >= 0 and values.max() <= 1):  # also refuses NaN
        raise ValueError(f"{path}: likelihoods must be in [0, 1], found {values.min()} to {values.max()}")
    return dict(zip(ids, map(Measured, values.tolist(), contents), strict=True))
