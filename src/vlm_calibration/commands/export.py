"""`vlm-calibration export`: an adapter with its model card, or the whole model with the adapter merged into it."""

from __future__ import annotations

import shutil
import tempfile
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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
from vlm_calibration.reporting.card import TEXT, Card, is_edited, load_card, save_card


def export(
    run: str,
    *,
    out: str | None = None,
    merge: bool = False,
    dtype: Dtype = "auto",
    base: str | None = None,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> None:
    """Export an adapter, or its base model with the adapter merged into it, with a model card.

    Args:
        run: a run directory, the folder of an adapter, or its name on the Hub
        out: folder to write to
        merge: merge the adapter into its base model and export the whole model; takes 4 bytes of memory a parameter
        dtype: dtype of the merged weights; "auto" is that of the base model's checkpoint
        base: name or folder of the base model, instead of the one that the adapter names; the export then names it too
        base_revision: branch, tag or commit of `base` on the Hub
        trust_remote_code: run modelling code that comes with the base model
        overwrite: replace what is in `out`
        push_to_hub: name on the Hugging Face Hub to upload to; the repository is created if there is none
        private: make a created repository private
        revision: branch on the Hub to upload to; it is created if there is none

    Raises:
        ArgumentError: neither `out` nor `push_to_hub` is given.
        DataError: there is no adapter, it cannot be merged, `out` is not empty, or the Hub refuses.
    """
    if out is None and push_to_hub is None:
        raise ArgumentError(None, "nowhere to export to: give --out FOLDER, --push-to-hub NAME, or both")
    # Lightning and transformers take seconds to import; the help does not need them.
    from vlm_calibration.callbacks.adapter import shown_path
    from vlm_calibration.hub import check_upload, upload

    adapter = find_adapter(run)
    model = _base_of(adapter, base, base_revision, trust_remote_code)
    if push_to_hub is not None:
        check_upload(push_to_hub, model.name_or_path)
    if out is not None:
        _check_out(Path(out), adapter, model.name_or_path, overwrite)
    location = push_to_hub or shown_path(Path(out or "."))
    with _output_folder(out) as folder:
        if merge:
            _write_merged(adapter, model, dtype, folder, location)
        else:
            _write_adapter(adapter, model, folder, location)
        if push_to_hub is not None and out is None:
            upload(folder, push_to_hub, private, revision)
    if out is not None:
        print(f"wrote {out}")
        if push_to_hub is not None:
            upload(Path(out), push_to_hub, private, revision)
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
def _output_folder(out: str | None) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends; without `out` it is deleted."""
    if out is not None:
        with replacing(Path(out)) as temporary:
            temporary.mkdir()
            yield temporary
    else:
        with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _write_adapter(adapter: Path, base: BaseModel, folder: Path, location: str) -> None:
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = read_object(adapter / CONFIG)
    names = {"base_model_name_or_path": base.name_or_path, "revision": base.revision}
    if any(config.get(key) != value for key, value in names.items()):
        write_json(folder / CONFIG, {**config, **names})
    # Keep a card that someone has edited.
    if not is_edited(adapter):
        save_card(folder, _card(adapter, base, location))


def _write_merged(adapter: Path, base: BaseModel, dtype: Dtype, folder: Path, location: str) -> None:
    from vlm_calibration.data.module import load_processor
    from vlm_calibration.models.export import merge_adapter, save_merged

    if is_edited(adapter):
        print(
            f"{adapter / TEXT} has been edited since training: the merged model gets a card without these edits"
        )
    merged = merge_adapter(str(adapter), base, dtype)
    save_merged(merged.model, folder, base.trust_remote_code)
    processor = load_processor(processor_source(adapter, base), base.revision, base.trust_remote_code)
    processor.save_pretrained(folder)
    save_card(folder, replace(_card(adapter, base, location), merged=True))
    _write_merged_rule(adapter, folder, base, dtype)
    print(f"merged {len(merged.layers)} layers of {adapter} into {base.name_or_path}")


def _write_merged_rule(adapter: Path, folder: Path, base: BaseModel, dtype: Dtype) -> None:
    """Keep the adapter's decision rule for the merged model, if that computes what was evaluated up to rounding."""
    from vlm_calibration.estimators.decision import read_rule, write_rule
    from vlm_calibration.models.loading import weights_digest

    rule = read_rule(adapter)
    if rule is None:
        return
    weights = weights_digest(BaseModel(str(folder)))
    if rule.weights != adapter_weights_digest(adapter):
        reason = "they were chosen with other weights"
    elif rule.quantization != "none":
        reason = (
            f"they were chosen with the base model in {rule.quantization}, and here it is in full precision"
        )
    elif dtype != rule.dtype:
        reason = f"they were chosen with dtype {rule.dtype!r}, and here it is {dtype!r}"
    else:
        assert weights is not None, "the merged model has just been written"
        write_rule(replace(rule, base=base.name_or_path, weights=weights), folder)
        return
    print(
        f"left out the thresholds of {adapter}: {reason}; choose them again on an evaluation of the merged model"
    )


def _card(adapter: Path, base: BaseModel, location: str) -> Card:
    """The adapter's card with another base model and location."""
    card = load_card(adapter) or Card(base.name_or_path)
    return replace(card, base=base.name_or_path, revision=base.revision, location=location)
