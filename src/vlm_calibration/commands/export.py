"""`vlm-calibration export`: an adapter with its model card, or the whole model with the adapter merged into it."""

from __future__ import annotations

import re
import shutil
import tempfile
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_calibration.files import replacing, write_json
from vlm_calibration.models.base import (
    CONFIG,
    BaseModel,
    Dtype,
    adapter_digest,
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
    base: str | None = None,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Export an adapter, or its base model with the adapter merged into it, with a model card.

    A README.md that a person has edited stays as it is; what it may lack is printed.

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
        base: name or folder of the base model, instead of the one that the adapter names; the export then names it too
        base_revision: branch, tag or commit of the base model on the Hub
        trust_remote_code: run code that comes with the base model
    """
    if out is None and push_to_hub is None:
        raise ArgumentError(None, "nowhere to export to: give --out FOLDER, --push-to-hub NAME, or both")
    if license is not None and not re.fullmatch(r"[a-z0-9.+-]+", license):
        examples = "such as apache-2.0, mit or cc-by-nc-4.0"
        raise DataError(f"--license {license}: not a name that the Hub has for a licence, {examples}")
    # Before the imports, which take seconds.
    source = find_adapter(adapter)
    from vlm_calibration.callbacks.adapter import shown_path
    from vlm_calibration.estimators.decision import rule_of_adapter
    from vlm_calibration.hub import base_license, check_upload, is_hub_name, upload
    from vlm_calibration.reporting.card import Card, load_card, renew_card
    from vlm_calibration.reporting.report.summary import read_evaluation

    model = base_of_adapter(source) if base is None else BaseModel(base)
    model = replace(model, revision=base_revision or model.revision, trust_remote_code=trust_remote_code)
    if push_to_hub is not None:
        check_upload(push_to_hub, model.name_or_path)
    if out is not None:
        _check_out(out, source, model.name_or_path, overwrite)
    digest, rule = adapter_digest(source), rule_of_adapter(source)
    card = load_card(source) or Card(model.name_or_path)
    evaluations = [read_evaluation(Path(folder), digest) for folder in evaluation]
    stated = {"license": license} if license else None
    stated = stated or base_license(model.name_or_path, model.revision, download=push_to_hub is not None)
    card = replace(
        card,
        base=model.name_or_path,
        base_on_hub=is_hub_name(model.name_or_path),
        revision=model.revision,
        location=push_to_hub or shown_path(out or Path()),
        # An adapter may have been replaced below its card.
        evaluations=evaluations or [e for e in card.evaluations if e.adapter == digest],
        guarantee=rule.guarantee if rule is not None else "",
        license=stated or card.license,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary) / "export"
        with replacing(folder) as written:
            written.mkdir()
            if merge:
                _write_merged(source, model, card, dtype, written)
            else:
                shutil.copytree(source, written, dirs_exist_ok=True)
                config = read_object(source / CONFIG)
                names = {"base_model_name_or_path": model.name_or_path, "revision": model.revision}
                if any(config.get(key) != value for key, value in names.items()):
                    write_json(written / CONFIG, {**config, **names})
                # The same weights, whose configuration may name the base model otherwise.
                digest = adapter_digest(written)
                shown = [replace(evaluation, adapter=digest) for evaluation in card.evaluations]
                renew_card(written, replace(card, evaluations=shown))
        if out is not None:
            print(f"wrote {out}")
        if push_to_hub is not None:
            upload(folder, push_to_hub, private)
            print(f"pushed to {push_to_hub}")


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


def _write_merged(adapter: Path, base: BaseModel, card: Card, dtype: Dtype, folder: Path) -> None:
    from vlm_calibration.data.module import load_processor
    from vlm_calibration.models.export import merge_adapter, save_merged
    from vlm_calibration.reporting.card import TEXT, is_edited, save_card

    if is_edited(adapter):
        consequence = "the merged model gets a card without these edits"
        print(f"{adapter / TEXT} has been edited since training: {consequence}")
    merged, layers = merge_adapter(str(adapter), base, dtype)
    save_merged(merged, base, folder)
    processor = load_processor(processor_source(adapter, base), base.revision, base.trust_remote_code)
    processor.save_pretrained(folder)
    has_rule = _write_merged_rule(adapter, folder, base, dtype)
    save_card(folder, replace(card, merged=True, guarantee=card.guarantee if has_rule else ""))
    print(f"merged {len(layers)} layers of {adapter} into a copy of {base.name_or_path}")


def _write_merged_rule(adapter: Path, folder: Path, base: BaseModel, dtype: Dtype) -> bool:
    """Keep the adapter's decision rule for the merged model, if that computes what was evaluated up to rounding; whether it did."""
    from vlm_calibration.estimators.decision import read_rule, write_rule
    from vlm_calibration.models.loading import model_config, weights_digest

    if (rule := read_rule(adapter)) is None:
        return False
    stored = str(model_config(base).dtype).removeprefix("torch.")
    evaluated, written = (stored if kind == "auto" else kind for kind in (rule.dtype, dtype))
    if rule.weights != adapter_weights_digest(adapter):
        reason = "other weights"
    elif (rule.quantization, evaluated) != ("none", written):
        reason = f"quantization {rule.quantization}, dtype {evaluated}, and here it is none, {written}"
    else:
        weights = weights_digest(BaseModel(str(folder)))
        assert weights is not None, "the merged model has just been written"
        write_rule(replace(rule, base=base.name_or_path, weights=weights), folder)
        return True
    advice = "choose them again on an evaluation of the merged model"
    print(f"left out the thresholds of {adapter}: they were chosen with {reason}; {advice}")
    return False
