"""`vlm-calibration export`: an adapter with its model card, or the whole model with the adapter merged into it."""

from __future__ import annotations

import re
import shutil
import tempfile
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_calibration.files import replacing, write_json, writing
from vlm_calibration.models.base import (
    CONFIG,
    BaseModel,
    Dtype,
    adapter_weights_digest,
    base_of_adapter,
    find_adapter,
    processor_source,
    read_object,
)
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    # These take seconds to import, and the help does not need them.
    from vlm_calibration.reporting.card import Card
    from vlm_calibration.reporting.evaluation import Evaluation


@dataclass(frozen=True)
class Export:
    """What is exported, found and checked before anything is loaded or written.

    Attributes:
        adapter: the adapter's folder.
        base: the base model that the export names.
        location: where the export will be, as its card says.
        evaluations: results of this adapter to put into the card.
        license: metadata of the licence that is asked for; empty for none.
        base_license: those of the base model's licence; empty if it is not known.
    """

    adapter: Path
    base: BaseModel
    location: str
    evaluations: list[Evaluation]
    license: dict[str, Any]
    base_license: dict[str, Any]


def export(
    adapter: str,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    merge: bool = False,
    dtype: Dtype = "auto",
    evaluation: Sequence[str] = (),
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    branch: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Export an adapter, or its base model with the adapter merged into it, with a model card.

    Args:
        adapter: a run directory, the folder of an adapter, or its name on the Hub (owner/name, owner/name@revision)
        out: folder to write to
        overwrite: replace what is in `out`
        merge: merge the adapter into its base model and export the whole model; takes 4 bytes of memory a parameter
        dtype: dtype of the merged weights; "auto" is that of the base model's checkpoint
        evaluation: run directories of `vlm-calibration test`, whose results of this adapter and its base model the card shows
        license: licence of the adapter by its name on the Hub, e.g. apache-2.0, instead of the one that the base model's card states
        push_to_hub: name on the Hugging Face Hub to upload to; the repository is created if there is none
        private: make a created repository private
        branch: branch on the Hub to upload to; it is created if there is none
        base: name or folder of the base model, instead of the one that the adapter names; the export then names it too
        base_revision: branch, tag or commit of the base model on the Hub
        trust_remote_code: run code that comes with the base model

    Raises:
        ArgumentError: neither `out` nor `push_to_hub` is given.
        DataError: there is no adapter, it cannot be merged, an evaluation is not of this adapter, `out` is not empty, or the Hub
            refuses.
    """
    if out is None and push_to_hub is None:
        raise ArgumentError(None, "nowhere to export to: give --out FOLDER, --push-to-hub NAME, or both")
    from vlm_calibration.callbacks.adapter import shown_path
    from vlm_calibration.hub import base_license, check_upload, upload

    source = find_adapter(adapter)
    model = _base_of(source, base, base_revision, trust_remote_code)
    if push_to_hub is not None:
        check_upload(push_to_hub, model.name_or_path)
    if out is not None:
        _check_out(out, source, model.name_or_path, overwrite)
    exported = Export(
        source,
        model,
        push_to_hub or shown_path(out or Path()),
        _read_evaluations(source, evaluation),
        _license(license),
        {} if license else base_license(model.name_or_path, model.revision, download=push_to_hub is not None),
    )
    with _output_folder(out) as folder:
        if merge:
            _write_merged(exported, dtype, folder)
        else:
            _write_adapter(exported, folder)
        if push_to_hub is not None and out is None:
            upload(folder, push_to_hub, private, branch)
    if out is not None:
        print(f"wrote {out}")
        if push_to_hub is not None:
            upload(out, push_to_hub, private, branch)
    if push_to_hub is not None:
        print(f"pushed to {push_to_hub}")


def _base_of(adapter: Path, base: str | None, revision: str | None, trust_remote_code: bool) -> BaseModel:
    """The base model that is asked for, or else the one that the adapter names."""
    named = base_of_adapter(adapter) if base is None else BaseModel(base)
    return replace(named, revision=revision or named.revision, trust_remote_code=trust_remote_code)


def _check_out(out: Path, adapter: Path, base: str, overwrite: bool) -> None:
    """Refuse an output folder that is not empty, or whose replacement would delete the adapter, the base or this folder."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file")
    for path in (adapter, Path(base), Path()):
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise DataError(f"--out {out} would replace {path.resolve()}: choose another folder")
    if out.resolve().is_relative_to(adapter.resolve()):
        raise DataError(f"--out {out} lies within the adapter's folder: choose another folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise DataError(f"--out {out} is not empty: choose another folder, or give --overwrite")


@contextmanager
def _output_folder(out: Path | None) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends; without `out` it is deleted."""
    if out is not None:
        with replacing(out) as temporary:
            temporary.mkdir()
            yield temporary
    else:
        with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _read_evaluations(adapter: Path, folders: Sequence[str]) -> list[Evaluation]:
    """The results of an adapter that its card has already, and those of further evaluations, which replace results on the same data."""
    from vlm_calibration.models.base import adapter_digest
    from vlm_calibration.reporting.card_files import load_card
    from vlm_calibration.reporting.evaluation import read_evaluation

    digest, card = adapter_digest(adapter), load_card(adapter)
    # An adapter may have been replaced below its card.
    known = [e for e in card.evaluations if e.adapter == digest] if card else []
    by_data = {e.key: e for e in known}
    asked: dict[Any, str] = {}
    for folder in folders:
        evaluation = read_evaluation(Path(folder), digest)
        if (other := asked.setdefault(evaluation.key, folder)) != folder:
            raise DataError(f"--evaluation {other} {folder}: both evaluate the same queries: choose one")
        by_data[evaluation.key] = evaluation
    return list(by_data.values())


def _license(name: str | None) -> dict[str, Any]:
    """The metadata of the licence that is asked for."""
    if name is None:
        return {}
    if not re.fullmatch(r"[a-z0-9.+-]+", name):
        raise DataError(
            f"--license {name}: not a name that the Hub has for a licence, such as apache-2.0, mit or cc-by-nc-4.0"
        )
    return {"license": name}


def _write_adapter(export: Export, folder: Path) -> None:
    from vlm_calibration.models.base import adapter_digest
    from vlm_calibration.reporting.card_files import renew_card

    adapter, base = export.adapter, export.base
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = read_object(adapter / CONFIG)
    names = {"base_model_name_or_path": base.name_or_path, "revision": base.revision}
    if any(config.get(key) != value for key, value in names.items()):
        write_json(folder / CONFIG, {**config, **names})
    digest = adapter_digest(folder)
    card = _card(export)
    # The same weights, whose configuration may name the base model otherwise.
    card = replace(card, evaluations=[replace(e, adapter=digest) for e in card.evaluations])
    renew_card(folder, card, export.license)


def _write_merged(export: Export, dtype: Dtype, folder: Path) -> None:
    from vlm_calibration.data.module import load_processor
    from vlm_calibration.models.export import merge_adapter, save_merged
    from vlm_calibration.reporting.card_files import TEXT, is_edited, save_card

    adapter, base = export.adapter, export.base
    if is_edited(adapter):
        print(
            f"{adapter / TEXT} has been edited since training: the merged model gets a card without these edits"
        )
    merged = merge_adapter(str(adapter), base, dtype)
    save_merged(merged, folder)
    processor = load_processor(processor_source(adapter, base), base.revision, base.trust_remote_code)
    processor.save_pretrained(folder)
    card = replace(_card(export), merged=True)
    if not _write_merged_rule(adapter, folder, base, dtype):
        card = replace(card, guarantee="")
    save_card(folder, card)
    print(f"merged {len(merged.layers)} layers of {adapter} into {base.name_or_path}")


def _write_merged_rule(adapter: Path, folder: Path, base: BaseModel, dtype: Dtype) -> bool:
    """Keep the adapter's decision rule for the merged model, if that computes what was evaluated up to rounding; whether it did."""
    from vlm_calibration.estimators.decision import read_rule, write_rule
    from vlm_calibration.models.loading import model_config, weights_digest

    rule = read_rule(adapter)
    if rule is None:
        return False
    stored = str(model_config(base).dtype).removeprefix("torch.")
    evaluated, written = (stored if kind == "auto" else kind for kind in (rule.dtype, dtype))
    weights = weights_digest(BaseModel(str(folder)))
    if rule.weights != adapter_weights_digest(adapter):
        reason = "they were chosen with other weights"
    elif rule.quantization != "none":
        reason = (
            f"they were chosen with the base model in {rule.quantization}, and here it is in full precision"
        )
    elif written != evaluated:
        reason = f"they were chosen with dtype {evaluated!r}, and here it is {written!r}"
    else:
        assert weights is not None, "the merged model has just been written"
        write_rule(replace(rule, base=base.name_or_path, weights=weights), folder)
        return True
    print(
        f"left out the thresholds of {adapter}: {reason}; choose them again on an evaluation of the merged model"
    )
    return False


def _card(export: Export) -> Card:
    """The adapter's card with the base model, location, results, guarantee and licence of the export."""
    from vlm_calibration.estimators.decision import rule_of_adapter
    from vlm_calibration.hub import is_hub_name
    from vlm_calibration.reporting.card import Card
    from vlm_calibration.reporting.card_files import load_card

    base = export.base.name_or_path
    card, rule = load_card(export.adapter) or Card(base), rule_of_adapter(export.adapter)
    return replace(
        card,
        base=base,
        base_on_hub=is_hub_name(base),
        revision=export.base.revision,
        location=export.location,
        evaluations=export.evaluations,
        guarantee=rule.guarantee if rule is not None else "",
        license=export.license or export.base_license or card.license,
    )
