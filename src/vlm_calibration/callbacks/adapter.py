"""Writes the trained adapter as plain PEFT, with the processor and a model card in the same folder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor

from vlm_calibration.callbacks.before_after import BeforeAfterCheck
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.files import replacing
from vlm_calibration.hub import base_license, is_hub_name
from vlm_calibration.models.adapters import adapted_parts
from vlm_calibration.models.base import ADAPTER
from vlm_calibration.models.sharding import full_state_dict
from vlm_calibration.perturbation.levels import AnchoredLevels
from vlm_calibration.reporting.card import EXAMPLE, Card, save_card
from vlm_calibration.reporting.tables import COLUMNS
from vlm_calibration.settings import init_args
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.scoring import HasResults
from vlm_calibration.stages.sft import SFTModule

SECRETS = ("token", "password", "secret", "api_key")
"""Suffixes of setting names that hold secrets."""


class AdapterWriter(L.Callback):
    """Writes `adapter/` in the run directory when training ends; peft alone can load it."""

    def __init__(self) -> None:
        self.results: dict[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The last validation's results, for a run that resumes after it."""
        return {"results": self.results}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.results = state_dict["results"]

    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        """The adapter's folder."""
        return [folder / ADAPTER]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.results = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Fail now rather than after training if the model card cannot be made.
        self.card(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.results = dict(cast(HasResults, module).results[""])

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = full_state_dict(cast(Any, module).model)
        if trainer.is_global_zero and not trainer.interrupted:
            self.write(trainer, module, Path(trainer.default_root_dir) / ADAPTER, weights)
        trainer.strategy.barrier("adapter")

    def write(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        folder: Path,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the current adapter, processor and card, and replace `folder` at once when all are written.

        `weights` are the gathered ones of a sharded model.
        """
        model, data = cast(Any, module).model, trainer.datamodule  # type: ignore[attr-defined]
        card = self.card(trainer, module)
        config = model.peft_config["default"]
        # peft's own loaders read the base model at this revision.
        config.revision = card.revision
        for name, value in vars(config).items():
            if isinstance(value, set):
                # The order of a set, and so the file, would differ between processes.
                setattr(config, name, sorted(value))
        with replacing(folder) as temporary:
            # A preference stage has a second adapter, its frozen reference.
            model.save_pretrained(temporary, selected_adapters=["default"], state_dict=weights)
            backend = getattr(data.processor.tokenizer, "backend_tokenizer", None)
            if backend is not None:
                # It would be saved with the padding of the last batch, which depends on where a run was resumed.
                backend.no_padding()
                backend.no_truncation()
            data.processor.save_pretrained(temporary)
            save_card(temporary, card)

    def validated(self, trainer: L.Trainer) -> dict[str, dict[str, float]]:
        """The metrics of the validations before training, if `BeforeAfterCheck` has them, and after it."""
        checks = [c for c in trainer.callbacks if isinstance(c, BeforeAfterCheck)]  # type: ignore[attr-defined]
        results = {"before": checks[0].before if checks else None, "after": self.results}
        return {name: values for name, values in results.items() if values is not None}

    def card(self, trainer: L.Trainer, module: L.LightningModule) -> Card:
        """The model card of the adapter in its present state."""
        data: PerturbedQueryDataModule = trainer.datamodule  # type: ignore[attr-defined]
        trained = cast(Any, module)
        results = {
            # JSON lacks NaN.
            when: {name: v[name] if math.isfinite(v[name]) else None for name in ("n", *COLUMNS) if name in v}
            for when, v in self.validated(trainer).items()
        }
        return Card(
            base=trained.base.name_or_path,
            base_on_hub=is_hub_name(trained.base.name_or_path),
            revision=getattr(trained.model.config, "_commit_hash", None) or trained.base.revision,
            location=shown_path(Path(trainer.default_root_dir) / ADAPTER),
            trust_remote_code=trained.base.trust_remote_code,
            dtype=trained.base.dtype,
            quantization=trained.base.quantization,
            training=_training(trained, data, trainer.global_step),
            levels=_taught(data.noise),
            results=results,
            license=base_license(trained.base.name_or_path, trained.base.revision),
            template=data.prompt.template,
            conversation=data.chat.render(EXAMPLE),
            has_chat_template=getattr(data.processor, "chat_template", None) is not None,
            max_new_tokens=trained.max_new_tokens,
            parts=list(adapted_parts(trained.model)),
            max_pixels=data.max_pixels,
        )


def shown_path(path: Path) -> str:
    """The path relative to the working directory if it is inside it, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def constructed(value: Any) -> str:
    """Format an object as a constructor call; omit secrets and arguments that are not stored or not plain values."""
    texts = {name: _plain(value) for name, value in init_args(value).items() if not name.endswith(SECRETS)}
    inside = ", ".join(f"{name}={text}" for name, text in texts.items() if text is not None)
    return f"{type(value).__name__}({inside})"


def _plain(value: Any) -> str | None:
    """Numbers, texts and sources, and lists of them, as text; None for anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_plain(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(str(_plain(v)) for v in value) + "]"
    return constructed(value) if isinstance(value, QuerySource) else None


def _training(module: Any, data: PerturbedQueryDataModule, steps: int) -> dict[str, str]:
    stage = module.title(data) if isinstance(module, DPOModule | SFTModule) else type(module).__name__
    if isinstance(module, DPOModule):
        start = "a new adapter" if module.adapter is None else f"the adapter {module.adapter}"
        stage += f", loss {module.loss!r}, reference {module.reference!r}, from {start}"
    config, levels = module.model.peft_config["default"], data.noise.levels
    kinds = [name for name, used in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if used]
    # Ranked levels do not say how often an answer is correct.
    ranked = isinstance(levels, AnchoredLevels) and levels.table.ranked
    parts = {
        "stage": stage,
        "steps": str(steps),
        "adapter": f"{' '.join([*kinds, 'LoRA'])}, r={config.r}, alpha={config.lora_alpha}, dropout={config.lora_dropout}",
        "base": constructed(module.base),
        "optimizer": constructed(module.optimizer_settings),
        "levels": constructed(levels) + (", open answers by ranking" if ranked else ""),
        "schedule": constructed(data.noise.schedule),
        "noise": constructed(data.noise),
    }
    for name in ("train", "validation", "candidates"):
        if (value := getattr(data, name)) is not None:
            parts[name] = constructed(value)
    if isinstance(module, DPOModule):
        parts["pairs"] = constructed(module.pairs)
        if module.target.fitted is not None:
            parts["teacher"] = repr(module.target.fitted)
    return parts


def _taught(noise: NoisePolicy) -> dict[str, list[tuple[str, float, float]]]:
    """Answer type -> (kind of perturbation, strength, confidence in [0, 1] that is taught there) for each level, on average."""
    levels = noise.levels
    answer_types = levels.answer_types if isinstance(levels, AnchoredLevels) else ("any answer",)
    return {
        answer_type: [(*p, levels.confidence(p, answer_type)) for p in noise.perturbations]
        for answer_type in answer_types
    }
