"""The model card of an adapter or of a merged model: `README.md` from a template, and its facts in `calibration.json`.

A `README.md` that a person has edited is left alone. Results on test data are those of the very adapter that was evaluated.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlm_calibration.files import write_json, write_text
from vlm_calibration.models.base import FACTS, read_object
from vlm_calibration.records import DataError
from vlm_calibration.reporting.tables import COLUMNS, heading, shown

TEXT = "README.md"
DIGEST = "readme_sha256"
EXAMPLE = "Is there a dog in the image?"  # the question in the examples of cards
TASK = "image-text-to-text"  # the task of such a model on the Hub
HUB_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "ece": ("expected_calibration_error", "Expected calibration error of the stated confidence"),
    "brier": ("brier_score", "Brier score of the stated confidence"),
    "auroc": ("roc_auc", "AUROC of the stated confidence"),
}
"""Metric -> its type and name in the metadata of the Hub."""


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Attributes:
        adapter, system: digest of the evaluated adapter that the card describes, and its name in the evaluation.
        dataset: the kinds of its sources, e.g. "demo" or "jsonl".
        split: the split that the source reads; "test" for sources without splits.
        revision: the digest of the queries.
        results: "base" and the name of each adapter -> `n` and the metrics that tables show, None if undefined.
    """

    adapter: str
    system: str
    dataset: str
    split: str
    revision: str
    parts: list[str]
    results: dict[str, dict[str, float | None]]

    @property
    def n(self) -> int:
        return int(self.results[self.system]["n"] or 0)


@dataclass(frozen=True)
class Card:
    """The facts about an adapter; only the base model must be known.

    Attributes:
        base, revision: name on the Hub (`base_on_hub`) or folder of the base model, and its commit or branch.
        location: where the weights are: a folder, or a name on the Hub.
        merged: whether the weights are those of the whole model, with the adapter merged in.
        trust_remote_code, dtype, quantization: of the base model in training, as in `BaseModel`.
        training: stage, steps and adapter, and setting -> value.
        levels: answer type -> kind of perturbation, strength and the confidence in [0, 1] that was taught for it, on average.
        results: "before" and "after" training -> metrics of the validation queries, None if undefined.
        guarantee: what the thresholds beside the weights promise, as a sentence; empty without thresholds.
        license: metadata of the licence (`hub.LICENSE`).
        template: the prompt, with `{question}` in it.
        conversation: the prompt with `EXAMPLE`, as the chat template formats it.
        has_chat_template: whether the processor has a chat template; PaliGemma's processor formats the prompt itself.
        parts: the parts of the model that the adapter changes, as in `lora.parts`; empty if they are not known.
        max_pixels: limit of an image's pixels in training, as in `data.max_pixels`; the saved processor has it too.
    """

    base: str
    base_on_hub: bool = False
    revision: str | None = None
    location: str = "."
    merged: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantization: str = "none"
    training: dict[str, str] = field(default_factory=dict)
    levels: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    guarantee: str = ""
    license: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    conversation: str | None = None
    has_chat_template: bool = True
    max_new_tokens: int = 64
    parts: list[str] = field(default_factory=list)
    max_pixels: int | None = None


def card_text(card: Card) -> str:
    """Render the card as Markdown, with the Hub's metadata in front. What is not known is left out."""
    title = f"{card.base.rstrip('/').rsplit('/', 1)[-1]}, calibrated"
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=evaluation.dataset,
            dataset_name=f"{evaluation.dataset}: {', '.join(evaluation.parts)}",
            dataset_split=evaluation.split,
            dataset_revision=evaluation.revision,
            dataset_args={"queries": evaluation.n},
            metric_type=kind,
            metric_name=metric,
            metric_value=value,
        )
        # The weights of a merged model are not the ones that were evaluated.
        for evaluation in ([] if card.merged else card.evaluations)
        for name, (kind, metric) in HUB_METRICS.items()
        if (value := evaluation.results[evaluation.system].get(name)) is not None
    ]
    relation = "finetune" if card.merged else "adapter"
    tags = ["vlm-calibration", "calibration", "verbalized-confidence", "arxiv:2504.14848"]
    metadata = ModelCardData(
        **card.license,
        base_model=card.base if card.base_on_hub else None,
        base_model_relation=relation if card.base_on_hub else None,
        base_model_revision=card.revision if card.base_on_hub else None,
        library_name="transformers" if card.merged else "peft",
        pipeline_tag=TASK,
        tags=tags if card.merged else [*tags, "lora"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    levels: dict[tuple[str, float], dict[str, float]] = {}
    for answer_type, taught in card.levels.items():
        for kind, strength, confidence in taught:
            levels.setdefault((kind, strength), {})[answer_type] = confidence
    # A prompt may contain the fence of a block.
    fence = "`" * (1 + max(map(len, re.findall("`+", f"{card.template} {card.conversation} ``"))))
    n = next((values.get("n") for values in card.results.values()), None)
    texts = {"metadata": metadata.to_yaml(), "title": title, "fence": fence, "example": EXAMPLE}
    return _render("card.md.j2", card, levels=levels, n=n, **texts)


def results_text(card: Card) -> str:
    """The results on test data and the guarantee; empty without either."""
    return _render("card_results.md.j2", card)


def templates(folder: Path, **options: Any) -> Environment:
    """The templates in a folder; one that uses an unknown name fails."""
    rules: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=FileSystemLoader(folder), **rules, **options)


def _render(template: str, card: Card, **values: Any) -> str:
    def line(label: str, cells: Iterable[str]) -> str:
        return "| " + " | ".join([label.replace("|", r"\|"), *cells]) + " |"

    def row(label: str, metrics: Mapping[str, float | None]) -> str:
        return line(label, (shown(name, metrics.get(name)) for name in COLUMNS))

    head = f"{line('', map(heading, COLUMNS))}\n{'| --- ' * (1 + len(COLUMNS))}|"
    helpers = {"repr": repr, "quote": shlex.quote, "head": head, "row": row}
    environment = templates(Path(__file__).parent, keep_trailing_newline=True)
    return environment.get_template(template).render(card=card, **helpers, **values)


def save_card(folder: Path, card: Card) -> None:
    """Write `README.md` and `calibration.json`, in place of any others."""
    text = card_text(card)
    write_text(folder / TEXT, text)
    write_json(folder / FACTS, {**asdict(card), DIGEST: _digest(text)})


def renew_card(folder: Path, card: Card) -> None:
    """Write a card; if a person has edited its `README.md`, write the facts alone and print `results_text` on stderr.

    DataError if the card in the folder cannot be read.
    """
    if not is_edited(folder):
        save_card(folder, card)
        return
    if (folder / FACTS).is_file():
        # The digest stays that of the text before it was edited.
        write_json(folder / FACTS, {**asdict(card), DIGEST: read_object(folder / FACTS).get(DIGEST)})
    if block := results_text(card):
        print(f"{TEXT} was edited and stays as it is. It may lack:\n{block}", file=sys.stderr)


def state_guarantee(folder: Path, guarantee: str) -> None:
    """State in an adapter's card what the thresholds beside it promise; without a card of ours nothing is written. DataError as above."""
    if (card := load_card(folder)) is not None:
        renew_card(folder, replace(card, guarantee=guarantee))


def load_card(folder: Path) -> Card | None:
    """Read the card that `save_card` wrote; None if there is none. DataError if the file is not what `save_card` writes."""
    path = folder / FACTS
    if not path.is_file():
        return None
    facts = read_object(path)
    try:
        # A card of another version may have further facts.
        card = Card(**{f.name: facts[f.name] for f in fields(Card) if f.name in facts})
        levels = {t: [(kind, strength, c) for kind, strength, c in rows] for t, rows in card.levels.items()}
        evaluations = [Evaluation(**facts_of_one) for facts_of_one in facts.get("evaluations", ())]
        return replace(card, levels=levels, evaluations=evaluations)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the facts of a model card: {error}") from error


def is_edited(folder: Path) -> bool:
    """Whether `README.md` differs from what `save_card` wrote; raises a DataError if the facts cannot be read."""
    text, facts = folder / TEXT, folder / FACTS
    if not text.is_file():
        return False
    return not facts.is_file() or read_object(facts).get(DIGEST) != _digest(text.read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
