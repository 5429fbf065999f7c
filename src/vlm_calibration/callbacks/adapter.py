"""Writes the trained adapter as plain PEFT, with the processor and a model card in the same folder."""

import os
from pathlib import Path
from typing import Any

import lightning as L

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.files import json_number, replacing
from vlm_calibration.hub import base_license, is_hub_name
from vlm_calibration.models.adapters import adapted_parts
from vlm_calibration.models.base import ADAPTER
from vlm_calibration.models.forward import full_state_dict
from vlm_calibration.perturbation.levels import AnchoredLevels
from vlm_calibration.reporting.card import EXAMPLE, Card, save_card
from vlm_calibration.reporting.runs import read_record
from vlm_calibration.reporting.tables import COLUMNS
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.sft import SFTModule


class AdapterWriter(L.Callback):
    """Writes `adapter/` in the run directory when training ends; peft alone can load it.

    Attributes:
        validations: "after" -> metrics of the last validation; "before" -> of the one before training, which is Lightning's
            sanity check over all batches (`trainer.num_sanity_val_steps: -1`). A resumed run keeps those of the first one.
    """

    def __init__(self) -> None:
        self.validations: dict[str, dict[str, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.validations)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = dict(state_dict)

    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        return [folder / ADAPTER]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.validations = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Fail now rather than after training if the model card cannot be made.
        self.card(trainer, module)

    def on_sanity_check_end(self, trainer: L.Trainer, module: Any) -> None:
        # Without validation queries there are none. A run resumed after its last step validates the trained model here.
        if hasattr(module, "results") and trainer.num_sanity_val_steps == float("inf"):
            self.validations.setdefault("before", dict(module.results[""]))

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validations["after"] = dict(module.results[""])

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        weights = full_state_dict(module.model)
        if trainer.is_global_zero and not trainer.interrupted:
            self.write(trainer, module, Path(trainer.default_root_dir) / ADAPTER, weights)
        trainer.strategy.barrier("adapter")

    def write(self, trainer: L.Trainer, module: Any, folder: Path, weights: Any = None) -> None:
        """Write the current adapter, processor and card, and replace `folder` at once; `weights` are gathered ones of a sharded model."""
        model, data = module.model, trainer.datamodule  # type: ignore[attr-defined]
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
            if (backend := getattr(data.processor.tokenizer, "backend_tokenizer", None)) is not None:
                # It would be saved with the padding of the last batch, which depends on where a run was resumed.
                backend.no_padding()
                backend.no_truncation()
            data.processor.save_pretrained(temporary)
            save_card(temporary, card)

    def card(self, trainer: L.Trainer, module: Any) -> Card:
        """The model card of the adapter in its present state; of the settings it has those in the run's record."""
        data: PerturbedQueryDataModule = trainer.datamodule  # type: ignore[attr-defined]
        folder, levels = Path(trainer.default_root_dir), data.noise.levels
        config, base = module.model.peft_config["default"], module.base
        kinds = [name for name, used in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if used]
        title = module.title(data) if isinstance(module, DPOModule | SFTModule) else type(module).__name__
        lora = f"r={config.r}, alpha={config.lora_alpha}, dropout={config.lora_dropout}"
        adapter = f"{' '.join([*kinds, 'LoRA'])}, {lora}"
        training = {"stage": title, "steps": str(trainer.global_step), "adapter": adapter}
        answer_types = levels.answer_types if isinstance(levels, AnchoredLevels) else ("any answer",)
        if isinstance(levels, AnchoredLevels) and levels.table.ranked:
            # Ranked levels do not say how often an answer is correct.
            training["levels"] = "open answers by ranking"
        if isinstance(module, DPOModule) and module.target.fitted is not None:
            training["teacher"] = f"{module.target.fitted!r}, fitted on data.{data.taught_on}"
        record = read_record(folder)
        for name, value in record.settings.items() if record else ():
            if value is not None and not name.endswith(("token", "password", "secret", "api_key")):
                training[name] = str(value)
        return Card(
            base=base.name_or_path,
            base_on_hub=is_hub_name(base.name_or_path),
            revision=getattr(module.model.config, "_commit_hash", None) or base.revision,
            location=shown_path(folder / ADAPTER),
            trust_remote_code=base.trust_remote_code,
            dtype=base.dtype,
            quantization=base.quantization,
            training=training,
            levels={
                t: [(*p, levels.confidence(p, t)) for p in data.noise.perturbations] for t in answer_types
            },
            # There are no answers of an evaluation yet, so these are no rows of `reporting.report.table`.
            results={
                when: {name: json_number(name, v[name]) for name in ("n", *COLUMNS) if name in v}
                for when, v in self.validations.items()
            },
            license=base_license(base.name_or_path, base.revision),
            template=data.prompt.template,
            conversation=data.chat.render(EXAMPLE),
            has_chat_template=getattr(data.processor, "chat_template", None) is not None,
            max_new_tokens=module.max_new_tokens,
            parts=list(adapted_parts(module.model)),
            max_pixels=data.max_pixels,
        )


def shown_path(path: Path) -> str:
    """The path relative to the working directory if it is inside it, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative
