"""`load_calibrated`: a base model with its adapter as one object that answers questions as in an evaluation."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.resolution import check_resolution
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import Estimator, LocalSystem
from vlm_calibration.estimators.decision import DecisionRule, read_rule
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import EXPECTED
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.hub import is_hub_name, loading
from vlm_calibration.inference.asking import BASE, CALIBRATED, CalibratedModel
from vlm_calibration.models.adapters import load_adapters
from vlm_calibration.models.base import (
    DEMO_MODEL,
    FACTS,
    THRESHOLDS,
    WEIGHTS,
    BaseModel,
    adapter_weights_digest,
    base_of_adapter,
    find_adapter,
    processor_source,
)
from vlm_calibration.models.loading import load_base, weights_digest
from vlm_calibration.records import VERBALIZED, DataError
from vlm_calibration.reporting.card import EXAMPLE, Card, load_card
from vlm_calibration.settings import digest, file_digest
from vlm_calibration.text.confidence import ElicitationPrompt

logger = logging.getLogger(__name__)


def load_calibrated(
    base: str | BaseModel | None = None,
    adapter: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> CalibratedModel:
    """Load a base model, with or without an adapter, to ask it questions.

    Images are shrunk as in the training (`data.max_pixels`). `thresholds.json` beside the weights, which `vlm-calibration threshold` writes,
    decides for each answer whether it may be given (`Answer.decision`).

    Args:
        base: name or folder of the base model, or its loading settings; None: the model that the adapter names, with the
            dtype and quantisation of the training.
        adapter: a run directory, the folder of an adapter, or its name on the Hub, `owner/name` or `owner/name@revision`;
            None: the base model alone, which may have an adapter merged in.
        device: device of the model; None: a GPU if there is one.
        prompt: the prompt, with `{question}` in it; None: that of the training, from the adapter's card.
        max_new_tokens: length limit of an answer; None: that of the training.

    Raises:
        DataError: model or adapter cannot be loaded, neither is given, or the thresholds were chosen with other weights or prompts.
    """
    device = _usable_device(device)
    folder = None if adapter is None else find_adapter(adapter)
    if base is None and folder is None:
        raise DataError("nothing to ask: give a base model, an adapter, or both")
    model = BaseModel(base) if isinstance(base, str) else base or base_of_adapter(cast(Path, folder))
    files = folder or _model_files(model)
    card = load_card(files) or Card(model.name_or_path)
    template = prompt or card.template
    elicitation = ElicitationPrompt(template) if template else ElicitationPrompt()
    if (rule := read_rule(files)) is not None:
        _check_rule(rule, files, folder, model, elicitation)
    loaded = load_adapters(load_base(model, device), {} if folder is None else {CALIBRATED: str(folder)})
    if model.quantization == "none":
        loaded = loaded.to(device)
    of_model: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    source = processor_source(folder, model)
    data = PerturbedQueryDataModule(source, prompt=elicitation, max_pixels=card.max_pixels, **of_model)
    if prompt is None and card.conversation not in (None, data.chat.render(EXAMPLE)):
        logger.warning(f"{folder or model.name_or_path}: its chat template differs from that of the training")
    loaded = loaded.requires_grad_(False).eval()
    estimators: list[Estimator] = [ExpectedConfidence()]
    if rule is not None and rule.estimator == AnswerLikelihood.name:
        estimators.append(AnswerLikelihood())
    tokenizer, limit = AnswerTokenizer(data.chat), max_new_tokens or card.max_new_tokens
    adapters: dict[str, str | None] = {BASE: None} if folder is None else {BASE: None, CALIBRATED: CALIBRATED}
    collate, noise = PromptCollator(data.chat, grading=None), NoisePolicy()
    # For messages; retraining changes it.
    name = f"{model.name_or_path} at {model.revision}" if model.revision else model.name_or_path
    name += f" in {model.quantization}" if model.quantization != "none" else ""
    if folder is not None:
        weights = folder / WEIGHTS
        content = file_digest(weights) if weights.is_file() else digest([])
        name += f" with {folder} ({content[:8]})"
    try:
        check_resolution(data.processor)
    except DataError:
        noise = NoisePolicy(resolution="native")  # the size at which the model sees an image is not known
    return CalibratedModel(
        name,
        {name: LocalSystem(loaded, a, tokenizer, limit, estimators) for name, a in adapters.items()},
        lambda samples: collate(samples).to(loaded.device),
        noise,
        loaded.device,
        loaded,
        data.processor.image_processor,
        is_demo=Path(model.name_or_path).is_dir() and Path(model.name_or_path).samefile(DEMO_MODEL),
        rule=rule,
    )


def rule_of(base: BaseModel, adapter: str | Path | None) -> DecisionRule | None:
    """The decision rule beside an adapter, or beside a base model's own weights; None if there is none, DataError if it is broken."""
    return read_rule(find_adapter(adapter) if adapter is not None else _model_files(base))


def _check_rule(
    rule: DecisionRule, files: Path, adapter: Path | None, model: BaseModel, prompt: ElicitationPrompt
) -> None:
    """Refuse a decision rule that was chosen with other weights or another prompt; warn of another quantisation."""
    path, what = files / THRESHOLDS, None
    weights = weights_digest(model) if adapter is None else adapter_weights_digest(adapter)
    if rule.weights != weights:
        what = f"other weights (digest {rule.weights!s:.8}, here {weights!s:.8})"
    elif rule.prompt != prompt.template:
        what = f"another prompt ({rule.prompt!r}, here {prompt.template!r})"
    if what is not None:
        raise DataError(
            f"{path}: its thresholds were chosen with {what}, so they promise nothing here: evaluate this model and run "
            "`vlm-calibration threshold` on the evaluation, or remove the file"
        )
    known = (VERBALIZED, EXPECTED, AnswerLikelihood.name)
    if rule.estimator not in known:
        raise DataError(f"{path}: the estimator {rule.estimator!r} is not one of {', '.join(known)}")
    if rule.quantization != model.quantization:
        chosen = f"the thresholds were chosen with quantization {rule.quantization!r}"
        loaded = f"the model is loaded with {model.quantization!r}"
        logger.warning(f"{path}: {chosen}, and {loaded}: their guarantee may not hold")


def _usable_device(device: str | torch.device | None) -> torch.device:
    """The device, checked before anything is loaded; for None, a GPU if there is one."""
    try:
        usable = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DataError(f'device: expected "cpu", "cuda" or "cuda:N", found {device!r}') from error
    if usable.type == "cuda" and (usable.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} that this PyTorch ({torch.__version__}) can use"
        raise DataError(f'device: {str(usable)!r} needs a GPU, found {found}: take "cpu", or leave it out')
    return usable


def _model_files(model: BaseModel) -> Path:
    """The folder with card and thresholds of a merged model: its own folder, or the cache of a model on the Hub."""
    folder = Path(model.name_or_path)
    if is_hub_name(model.name_or_path):
        with loading("a model card", model.name_or_path):
            for name in (FACTS, THRESHOLDS):
                try:
                    folder = Path(hf_hub_download(model.name_or_path, name, revision=model.revision)).parent
                except EntryNotFoundError:
                    continue
    return folder
