"""`load_calibrated`: a base model with its adapter as one object that answers questions as in an evaluation."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from vlm_calibration.data.collate import ChatFormat, PromptCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.data.resolution import check_resolution, resize_to_model
from vlm_calibration.demo.questions import unknown_part
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.decision import AppliedRule, DecisionRule, check_rule, read_rule
from vlm_calibration.estimators.generating import GenerationRecorder
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import VERBALIZED, graded_prediction
from vlm_calibration.estimators.verbal import ExpectedConfidence, rounded
from vlm_calibration.hub import is_hub_name, loading
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.asking import BASE, CALIBRATED, Asker
from vlm_calibration.models.adapters import load_adapters, using_adapter
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
from vlm_calibration.models.forward import shared_vision
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.models.loading import load_base, weights_digest
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.reporting.card import EXAMPLE, Card, load_card
from vlm_calibration.settings import digest, file_digest
from vlm_calibration.text.confidence import end_of_confidence, strip_confidence
from vlm_calibration.text.prompts import ElicitationPrompt

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

    Prompt and length of answers default to those of the training, from the adapter's card; images are shrunk as in the training
    (`data.max_pixels`). `thresholds.json` beside the weights, which `vlm-calibration threshold` writes, decides for each answer whether it may
    be given (`Answer.decision`).

    Args:
        base: name or folder of the base model, or its loading settings; None: the model that the adapter names, with the
            dtype and quantisation of the training.
        adapter: a run directory, the folder of an adapter, or its name on the Hub, `owner/name` or `owner/name@revision`;
            None: the base model alone, which may have an adapter merged in.
        device: device of the model; None: a GPU if there is one.
        prompt: the prompt, with `{question}` in it.
        max_new_tokens: length limit of an answer.

    Raises:
        DataError: there is no such model or adapter, neither is given, they do not fit each other, or the thresholds were chosen with
            other weights or another prompt.
    """
    device = _usable_device(device)
    folder = None if adapter is None else find_adapter(adapter)
    if base is None and folder is None:
        raise DataError("nothing to ask: give a base model, an adapter, or both")
    model = BaseModel(base) if isinstance(base, str) else base or base_of_adapter(cast(Path, folder))
    files = folder or _model_files(model)
    card = load_card(files) or Card(model.name_or_path)
    elicitation = _prompt(prompt or card.template)
    rule = read_rule(files)
    if rule is not None:
        _check_rule(rule, files, folder, model, elicitation)
    loaded = load_adapters(load_base(model, device), {} if folder is None else {CALIBRATED: str(folder)})
    if model.quantization == "none":
        loaded = loaded.to(device)
    data = PerturbedQueryDataModule(
        processor_source(folder, model),
        prompt=elicitation,
        max_pixels=card.max_pixels,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    if prompt is None and card.conversation not in (None, data.chat.render(EXAMPLE)):
        logger.warning(f"{folder or model.name_or_path}: its chat template differs from that of the training")
    return CalibratedModel(
        loaded.requires_grad_(False).eval(),
        data.chat,
        max_new_tokens or card.max_new_tokens,
        name=_name(model, folder),
        is_demo=_is_demo_model(model.name_or_path),
        rule=rule,
    )


def rule_of(base: BaseModel, adapter: str | Path | None) -> DecisionRule | None:
    """The decision rule beside an adapter, or beside a base model's own weights; None if there is none.

    Raises:
        DataError: there is no such adapter, or the file is not a rule.
    """
    return read_rule(find_adapter(adapter) if adapter is not None else _model_files(base))


def _prompt(template: str | None) -> ElicitationPrompt:
    return ElicitationPrompt(template) if template else ElicitationPrompt()


def _check_rule(
    rule: DecisionRule,
    files: Path,
    adapter: Path | None,
    model: BaseModel,
    prompt: ElicitationPrompt,
) -> None:
    """Refuse a decision rule that does not hold for this model; warn if the base model is quantised otherwise.

    Raises:
        DataError: see `check_rule`; or the model has no such estimator.
    """
    path = files / THRESHOLDS
    weights = weights_digest(model) if adapter is None else adapter_weights_digest(adapter)
    check_rule(rule, path, weights, prompt.template)
    known = (VERBALIZED, ExpectedConfidence.name, AnswerLikelihood.name)
    if rule.estimator not in known:
        raise DataError(f"{path}: the estimator {rule.estimator!r} is not one of {', '.join(known)}")
    if rule.quantization != model.quantization:
        logger.warning(
            f"{path}: the thresholds were chosen with quantization {rule.quantization!r}, and the model is loaded with "
            f"{model.quantization!r}: their guarantee may not hold"
        )


def _name(base: BaseModel, adapter: Path | None) -> str:
    """A name for messages that also identifies the adapter's weights: retraining changes it."""
    parts = [base.name_or_path, base.revision and f"at {base.revision}"]
    if base.quantization != "none":
        parts.append(f"in {base.quantization}")
    if adapter is not None:
        weights = adapter / WEIGHTS
        content = file_digest(weights) if weights.is_file() else digest([])
        parts.append(f"with {adapter} ({content[:8]})")
    return " ".join(part for part in parts if part)


def _usable_device(device: str | torch.device | None) -> torch.device:
    """The device, checked before anything is loaded; for None, a GPU if there is one.

    Raises:
        DataError: there is no such device.
    """
    try:
        usable = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DataError(f'device: expected "cpu", "cuda" or "cuda:N", found {device!r}') from error
    if usable.type == "cuda" and (usable.index or 0) >= torch.cuda.device_count():
        raise DataError(
            f"device: {str(usable)!r} needs a GPU, found {torch.cuda.device_count()} that this PyTorch ({torch.__version__}) "
            'can use: take "cpu", or leave it out'
        )
    return usable


def _is_demo_model(name: str) -> bool:
    return Path(name).is_dir() and Path(name).samefile(DEMO_MODEL)


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


class CalibratedModel(Asker):
    """A base model, with or without an adapter, that answers questions about images; see `load_calibrated`.

    It is thread-safe: one batch is answered at a time.

    Attributes:
        model: the transformers or peft model.
        chat: formats questions for the model.
        max_new_tokens: length limit of an answer.
        name: name for messages.
        is_demo: whether the base model is the demo's, of which it is known what it knows.
        systems: "base", and "calibrated" if there is an adapter.
        rule: decides about the answers of the last system; None: nothing does.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        max_new_tokens: int,
        name: str = "model",
        is_demo: bool = False,
        rule: DecisionRule | None = None,
    ) -> None:
        self.model = model
        self.chat = chat
        self._answer_tokenizer = AnswerTokenizer(chat)
        self.max_new_tokens = max_new_tokens
        self.name = name
        self.is_demo = is_demo
        self.rule = rule
        self.systems = (BASE, CALIBRATED) if hasattr(model, "peft_config") else (BASE,)
        self.noise = NoisePolicy(resolution=_resolution(chat.processor))
        self.image_processor = chat.processor.image_processor
        self.device = model.device
        self._one_at_a_time = threading.Lock()

    def unknown_part(self, question: str) -> str | None:
        """What the demo model does not know in a question; None if it knows it, and for any other model."""
        return unknown_part(question) if self.is_demo else None

    def seen(self, sample: Sample) -> np.ndarray:
        """The sample's image at the model's input resolution, uint8 [H, W, 3]."""
        return resize_to_model(self.chat.processor.image_processor, sample.image)

    def answers(self, samples: Sequence[Sample], systems: Sequence[str]) -> dict[str, list[Answer]]:
        """Answer one batch of samples with each of some systems, as `Asker.answers` says; systems share the vision tower's pass."""
        batch = PromptCollator(self.chat)(samples).to(self.model.device)
        answers: dict[str, list[Answer]] = {}
        sharing = shared_vision(self.model) if len(systems) > 1 else nullcontext()
        with self._one_at_a_time, torch.no_grad(), sharing:
            for system in systems:
                with using_adapter(self.model, None if system == BASE else system):
                    answers[system] = self._answer(batch, self.rule if system == self.systems[-1] else None)
        return answers

    def _answer(self, batch: Any, rule: DecisionRule | None) -> list[Answer]:
        generating = GenerationRecorder(self.model, keep_cache=True)
        texts = generate_texts(
            generating, batch.inputs, self.chat.processor.tokenizer, self.max_new_tokens, end_of_confidence
        )
        predictions = [
            graded_prediction(q, text, None, None, None) for q, text in zip(batch.queries, texts, strict=True)
        ]
        answered = AnsweredBatch(
            self.model,
            batch,
            predictions,
            generating.passes,
            self._answer_tokenizer,
            self.max_new_tokens,
            generating.cache,
        )
        expected = ExpectedConfidence().estimate(answered).confidence
        compared = expected
        if rule is not None and rule.estimator == AnswerLikelihood.name:
            compared = AnswerLikelihood().estimate(answered).confidence
        answers = []
        rows = zip(predictions, expected, compared, answered.scored, strict=True)
        for prediction, mean, estimate, scored in rows:
            p = [] if scored is None else torch.softmax(scored.level_log_p.double(), -1).tolist()
            answers.append(
                Answer(
                    text=prediction.text,
                    answer=strip_confidence(prediction.text),
                    confidence=prediction.confidence,
                    expected=mean,
                    distribution=dict(zip(scored.levels, p, strict=True)) if scored is not None else {},
                    answer_type=prediction.answer_type,
                    warning=self.unknown_part(prediction.question),
                    rule=_applied(rule, prediction, estimate),
                )
            )
        return answers


def _applied(rule: DecisionRule | None, prediction: Prediction, estimate: float | None) -> AppliedRule | None:
    """The rule for an answer, with the confidence as an evaluation measures it; `estimate` is that of another estimator than the stated one."""
    if rule is None:
        return None
    confidence = prediction.confidence
    if rule.estimator != VERBALIZED:
        confidence = None if estimate is None else rounded(estimate)
    return rule.applied(confidence, prediction.category)


def _resolution(processor: Any) -> Any:
    """The resolution at which images are noised: the model's, or the image's own if the processor's is unknown."""
    try:
        check_resolution(processor)
    except DataError:
        return "native"
    return "model"
